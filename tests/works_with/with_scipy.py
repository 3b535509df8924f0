"""A minimiser of SciPy on the parameters as one float64 vector."""

import torch
from scipy.optimize import minimize

import fdl
from fdl import losses, nn, random, tree

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)
params = tree.cast(model.init(random.key(0)), torch.float64)

# Recipe
start, unravel = tree.ravel(params)
loss = fdl.supervised(model, losses.cross_entropy)
slope = fdl.jit(torch.func.grad_and_value(lambda v: loss(unravel(v), (x.double(), y))[0]))
found = minimize(
    lambda v: [each.numpy() for each in slope(torch.from_numpy(v))[::-1]],
    start.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 20},
)  # fmt: skip
params = unravel(torch.from_numpy(found.x))

# Check
assert found.fun < 0.9 < slope(start)[1]
