"""A compiled step in an engine of ignite, whose metrics read the predictions."""

import torch
from ignite.engine import Engine
from ignite.metrics import Accuracy

import fdl
from fdl import losses, metrics, nn, optim, random

model, opt = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3)), optim.adam(0.01)
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)
rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
step = fdl.jit(fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt))

# Recipe
state = fdl.TrainState.create(model, opt, key=random.key(0))


def update(engine, batch):
    global state
    state, metrics = step(state, batch)
    return metrics["loss"].value


Engine(update).run(rows, max_epochs=2)
test = Engine(lambda engine, batch: (model.apply(state.params, batch[0]), batch[1]))
Accuracy().attach(test, "accuracy")

# Check
ours = metrics.accuracy(model.apply(state.params, x), y).value
assert state.step == 8 and abs(test.run(rows).metrics["accuracy"] - ours) < 1e-6
