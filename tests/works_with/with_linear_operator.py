"""Structured matrices under `grad`, `vmap` and `jit`: in `trace_mode` no values are asked for."""

import torch
from linear_operator import settings, to_linear_operator

import fdl

x = torch.linspace(0, 1, 20, dtype=torch.float64)
y, noise = torch.sin(6 * x), 0.1 * torch.eye(20, dtype=torch.float64)
scales = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)


def kernel(scale):
    return torch.exp(-((x[:, None] - x) / scale).square()) + noise


# Recipe
def density(scale):
    fit, volume = to_linear_operator(kernel(scale)).inv_quad_logdet(y[:, None], logdet=True)
    return -(fit + volume) / 2


slopes = fdl.jit(torch.vmap(torch.func.grad(density)))
with settings.trace_mode():
    found = slopes(scales)


# Check
def by_hand(scale):
    factor = torch.linalg.cholesky(kernel(scale))
    white = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
    return -white.square().sum() / 2 - factor.diagonal().log().sum()


torch.testing.assert_close(found, torch.vmap(torch.func.grad(by_hand))(scales))
