"""An optimizer of TorchOpt in a step of fdl."""

import torch
import torchopt

import fdl
from fdl import losses, nn, optim, random

model = nn.linear(4, 1)
x, y = random.normal(random.key(1), (32, 4)), torch.ones(32, 1)
loss = fdl.supervised(model, losses.mse)

# Recipe
opt = torchopt.adam(0.1)
state = fdl.TrainState.create(model, opt, key=random.key(0))
step = fdl.jit(fdl.train_step(loss, opt))
for _ in range(5):
    state, metrics = step(state, (x, y))

# Check
ours = fdl.train_step(loss, optim.adam(0.1))
expected = fdl.TrainState.create(model, optim.adam(0.1), key=random.key(0))
for _ in range(5):
    expected, _ = ours(expected, (x, y))
assert fdl.tree.allclose(state.params, expected.params, atol=1e-5)
