"""Curvature as linear operators, and KFAC of the module that `to_sequential` builds."""

import torch
from curvlinops import HessianLinearOperator

from fdl import interop, losses, nn, random, transforms, tree

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
params = model.init(random.key(0))
x, y = random.normal(random.key(1), (32, 4)), random.normal(random.key(2), (32, 3))

# Recipe
module = interop.as_module(model, params)
weights = [*module.parameters()]
hessian = HessianLinearOperator(module, torch.nn.MSELoss(), weights, [(x, y)])
product = hessian @ [torch.ones_like(w) for w in weights]

# Check
ones = tree.map(torch.ones_like, params)
ours = transforms.hvp(lambda p: losses.mse(model.apply(p, x), y), params, ones)
assert tree.allclose(tree.leaves(ours), product, atol=1e-5)
