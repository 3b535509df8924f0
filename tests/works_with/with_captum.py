"""Attributions of a model's output to its inputs, and to layers by torch's own."""

import torch
from captum.attr import IntegratedGradients, LayerActivation

from fdl import interop, nn, random

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
params = model.init(random.key(0))
x = random.normal(random.key(1), (5, 4))

# Recipe
module = interop.as_module(model, params).eval()
shares = IntegratedGradients(module).attribute(x, baselines=0, target=1)

layers = interop.to_sequential(model, params).eval()
hidden = LayerActivation(layers, layers[1]).attribute(x)

# Check
gained = module(x)[:, 1] - module(torch.zeros(4))[1]
torch.testing.assert_close(shares.sum(1).float(), gained, atol=1e-4, rtol=0)
torch.testing.assert_close(model.apply(params, x), layers[2].forward(hidden))
