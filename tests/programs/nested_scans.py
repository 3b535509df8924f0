"""Diffusion in two dimensions: scans over the rows within scans over sweeps, with counters."""

from __future__ import annotations

import torch

import fdl
from fdl import random
from tests.support.programs import Program


def sweep(grid, omega):
    def relax(above, row):
        new = row + omega * (0.5 * (above + row.roll(1)) - row)
        return new, new

    _, grid = fdl.scan(relax, grid[-1], grid)
    return grid, (grid - grid.mean()).square().sum()


def step(state, heat):
    grid, sweeps = state
    omegas = torch.linspace(0.2, 0.8, 3, dtype=torch.float64)
    grid, energies = fdl.scan(sweep, grid + heat, omegas)
    return (grid, sweeps + len(omegas)), {"energies": energies, "last": grid[-1]}


def init():
    return random.normal(random.key(0), (5, 4), torch.float64), torch.tensor(0)


def xs():
    return 0.1 * random.normal(random.key(1), (4, 4), torch.float64)


PROGRAM = Program(step, init, xs)
