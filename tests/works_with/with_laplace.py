"""Laplace approximations of a trained model: all weights, or the last layer of torch's own."""

import torch
from laplace import Laplace

from fdl import interop, nn, random

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
params = model.init(random.key(0))
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)
rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)

# Recipe
module = interop.as_module(model, params)
full = Laplace(module, "classification", "all", "full")
full.fit(rows)

layers = interop.to_sequential(model, params)  # these look for nn.Linear
last = Laplace(layers, "classification", "last_layer", "kron")
last.fit(rows)

# Check
torch.testing.assert_close(full(x).sum(1), torch.ones(64))
torch.testing.assert_close(last(x).sum(1), torch.ones(64))
