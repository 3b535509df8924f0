"""Attributions of a model's output to its inputs."""

import torch
from captum.attr import IntegratedGradients

from fdl import interop, nn, random

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
x = random.normal(random.key(1), (5, 4))

# Recipe
module = interop.as_module(model, model.init(random.key(0))).eval()
shares = IntegratedGradients(module).attribute(x, baselines=0, target=1)

# Check
gained = module(x)[:, 1] - module(torch.zeros(4))[1]
torch.testing.assert_close(shares.sum(1).float(), gained, atol=1e-4, rtol=0)
