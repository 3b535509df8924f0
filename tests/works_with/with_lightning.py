"""A compiled step in Lightning's loop; two hooks put its state into the checkpoints."""

import lightning
import torch

import fdl
from fdl import losses, nn, optim, random

model, opt = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3)), optim.adam(0.01)
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)
rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
step = fdl.jit(fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt))


class Manual(lightning.LightningModule):
    automatic_optimization = False

    def configure_optimizers(self):
        return None


# Recipe
class Run(Manual):
    state = fdl.TrainState.create(model, opt, key=random.key(0))

    def training_step(self, batch, index):
        self.state, metrics = step(self.state, batch)
        self.log("loss", metrics["loss"].value)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state"] = fdl.tree.flatten_dict(self.state)

    def on_load_checkpoint(self, checkpoint):
        self.state = fdl.tree.unflatten_dict(checkpoint["state"], like=self.state)


# Check
run = Run()
trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False)
trainer.fit(run, rows)
trainer.save_checkpoint("run.ckpt")
again = Run.load_from_checkpoint("run.ckpt", weights_only=True)
assert run.state.step == 8 and not fdl.tree.diff(again.state, run.state)
