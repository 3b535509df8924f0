"""Least squares on a window of rows, by linalg.lstsq."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program


def step(coefficients, data):
    features, targets = data[:, :3], data[:, 3:]
    residual = targets - features @ coefficients
    solution = torch.linalg.lstsq(features, residual).solution
    return coefficients + 0.5 * solution, residual.square().mean()


def init():
    return torch.zeros(3, 1, dtype=torch.float64)


def xs():
    return random.normal(random.key(0), (5, 8, 4), torch.float64)


PROGRAM = Program(step, init, xs, fullgraph="Dynamic shape operator")
