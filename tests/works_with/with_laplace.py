"""Laplace approximations of a trained model: full, or Kronecker factors of `to_sequential`'s."""

import torch
from laplace import Laplace

from fdl import interop, nn, random

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
params = model.init(random.key(0))
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)
rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)

# Recipe
module = interop.as_module(model, params)
posterior = Laplace(module, "classification", "all", "full")
posterior.fit(rows)
probabilities = posterior(x)

# Check
torch.testing.assert_close(probabilities.sum(1), torch.ones(64))
