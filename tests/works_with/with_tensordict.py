"""Parameters that are a TensorDict stay one: in states, gradients, compiled steps and files."""

import torch
from tensordict import TensorDict

import fdl
from fdl import losses, nn, optim, random

model, opt = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3)), optim.adam(0.01)
x, y = random.normal(random.key(1), (32, 4)), random.randint(random.key(2), (32,), 0, 3)

# Recipe
params = TensorDict(model.init(random.key(0)))
state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
step = fdl.jit(fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt))
state, metrics = step(state, (x, y))
fdl.io.save("state.safetensors", state)
again = fdl.io.load("state.safetensors", like=state)

# Check
assert isinstance(state.params, TensorDict) and isinstance(again.params, TensorDict)
assert torch.equal(again.params["0", "weight"], state.params["0", "weight"])
