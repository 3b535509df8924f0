"""Gaussian-process regression: marginal likelihood, its gradient, and the posterior."""

from __future__ import annotations

import math

import torch

from fdl import random
from tests.support.programs import Program

N = 20


def kernel(a, b, log):
    distance = (a[:, None] - b[None, :]) / log["length"].exp()
    return log["scale"].exp() * torch.exp(-0.5 * distance**2)


def factor(x, y, log):
    covariance = kernel(x, x, log) + (log["noise"].exp() + 1e-4) * torch.eye(len(x))
    chol = torch.linalg.cholesky(covariance)
    return chol, torch.cholesky_solve(y[:, None], chol)[:, 0]


def negative_log_likelihood(log, x, y):
    chol, alpha = factor(x, y, log)
    logdet = 2 * chol.diagonal().log().sum()
    return 0.5 * (y @ alpha + logdet + len(x) * math.log(2 * math.pi))


def step(log, data):
    x, y = data
    grads, loss = torch.func.grad_and_value(negative_log_likelihood)(log, x, y)
    log = {name: value - 0.02 * grads[name].clamp(-5, 5) for name, value in log.items()}
    grid = torch.linspace(-3, 3, 9)
    chol, alpha = factor(x, y, log)
    cross = kernel(x, grid, log)
    half = torch.linalg.solve_triangular(chol, cross, upper=False)
    variance = log["scale"].exp() - (half**2).sum(0)
    return log, {"loss": loss, "mean": cross.T @ alpha, "variance": variance}


def init():
    return {name: torch.zeros(()) for name in ("length", "scale", "noise")}


def data():
    x = random.uniform(random.key(0), (4, N), minval=-3.0, maxval=3.0)
    return x, torch.sin(2 * x) + 0.1 * random.normal(random.key(1), (4, N))


PROGRAM = Program(step, init=init, xs=data)
