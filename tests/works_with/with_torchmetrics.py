"""Functions of torchmetrics as metrics of steps, and compiled; what does not add up is refused."""

from functools import partial

import torch
from torchmetrics.functional import accuracy, f1_score

import fdl
from fdl import data, losses, metrics, nn, optim, random

model, opt = nn.linear(4, 3), optim.sgd(0.1)
x, y = random.normal(random.key(1), (32, 4)), random.randint(random.key(2), (32,), 0, 3)
options = {"task": "multiclass", "num_classes": 3, "validate_args": False}
state = fdl.TrainState.create(model, opt, key=random.key(0))

# Recipe
right = metrics.per_batch(partial(accuracy, average="micro", **options))
loss = fdl.supervised(model, losses.cross_entropy, metrics={"accuracy": right})
step = fdl.jit(fdl.train_step(loss, opt))
state, found = step(state, data.Batch(x, y, torch.arange(32) < 30))
f1 = f1_score(model.apply(state.params, x), y, average="macro", **options)  # of all rows at once

# Check
start = fdl.TrainState.create(model, opt, key=random.key(0)).params
assert found["accuracy"].value == metrics.accuracy(model.apply(start, x)[:30], y[:30]).value
sums = metrics.precision_recall_f1(model.apply(state.params, x), y)
torch.testing.assert_close(f1.double(), (2 * sums.correct / (sums.predicted + sums.actual)).mean())
