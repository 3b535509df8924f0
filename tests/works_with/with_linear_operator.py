"""Structured matrices under `torch.func.grad`; a Cholesky factor by hand where it is compiled."""

import torch
from linear_operator import to_linear_operator

import fdl

x = torch.linspace(0, 1, 20, dtype=torch.float64)
y, noise = torch.sin(6 * x), 0.1 * torch.eye(20, dtype=torch.float64)


def kernel(scale):
    return torch.exp(-((x[:, None] - x) / scale).square()) + noise


# Recipe
def density(scale):
    fit, volume = to_linear_operator(kernel(scale)).inv_quad_logdet(y[:, None], logdet=True)
    return -(fit + volume) / 2


def by_hand(scale):
    factor = torch.linalg.cholesky(kernel(scale))
    white = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
    return -white.square().sum() / 2 - factor.diagonal().log().sum()


slopes = fdl.jit(torch.vmap(torch.func.grad(by_hand)))
scales = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)

# Check
torch.testing.assert_close(slopes(scales)[1], torch.func.grad(density)(scales[1]))
