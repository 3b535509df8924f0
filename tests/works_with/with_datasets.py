"""Batches of a data set of Hugging Face as they are: dicts with the names of a `Batch`."""

import datasets

import fdl
from fdl import losses, nn, optim, random

model, opt = nn.linear(4, 3), optim.sgd(0.1)
x, y = random.normal(random.key(1), (90, 4)), random.randint(random.key(2), (90,), 0, 3)
rows = datasets.Dataset.from_dict({"x": x.numpy(), "y": y.numpy()}).with_format("torch")

# Recipe
state = fdl.TrainState.create(model, opt, key=random.key(0))
step = fdl.jit(fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt))
for batch in rows.iter(batch_size=20, drop_last_batch=True):
    state, metrics = step(state, batch)

# Check
assert state.step == 4 and len(step.report()) == 1
