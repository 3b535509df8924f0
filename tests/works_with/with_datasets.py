"""Batches of a data set of Hugging Face as they are; `pad_to` keeps the last one in one program."""

import datasets

import fdl
from fdl import data, losses, nn, optim, random

model, opt = nn.linear(4, 3), optim.sgd(0.1)
x, y = random.normal(random.key(1), (90, 4)), random.randint(random.key(2), (90,), 0, 3)
rows = datasets.Dataset.from_dict({"x": x.numpy(), "y": y.numpy()}).with_format("torch")

# Recipe
state = fdl.TrainState.create(model, opt, key=random.key(0))
step = fdl.jit(fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt))
seen = 0
for batch in rows.iter(batch_size=20):
    state, metrics = step(state, data.pad_to(batch, 20))
    seen += metrics["loss"].count

# Check
assert state.step == 5 and seen == 90 and len(step.report()) == 1
