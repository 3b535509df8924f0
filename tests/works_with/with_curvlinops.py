"""Curvature as linear operators: Hessian, Gauss-Newton, and KFAC of torch's own layers."""

import torch
from curvlinops import HessianLinearOperator, KFACLinearOperator

from fdl import interop, losses, nn, random, transforms, tree

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
params = model.init(random.key(0))
x, y = random.normal(random.key(1), (32, 4)), random.normal(random.key(2), (32, 3))

# Recipe
module = interop.as_module(model, params)
weights = [*module.parameters()]
hessian = HessianLinearOperator(module, torch.nn.MSELoss(), weights, [(x, y)])
product = hessian @ [torch.ones_like(w) for w in weights]

layers = interop.to_sequential(model, params)  # KFAC looks for nn.Linear
weights = [*layers.parameters()]
kfac = KFACLinearOperator(layers, torch.nn.MSELoss(), weights, [(x, y)])
smooth = kfac @ [torch.ones_like(w) for w in weights]

# Check
ones = tree.map(torch.ones_like, params)
ours = transforms.hvp(lambda p: losses.mse(model.apply(p, x), y), params, ones)
assert tree.allclose(tree.leaves(ours), product, atol=1e-5)
assert [s.shape for s in smooth] == [p.shape for p in product]
