"""Langevin dynamics in a double well: a batch of chains, annealed temperature, a histogram."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

CHAINS, BINS = 16, 8


def energy(x, tilt):
    return ((x**2 - 1) ** 2 + tilt * x).sum()


def step(state, row):
    x, tilt, histogram = state
    key, temperature = row
    size = 0.05
    drift = torch.func.grad(energy)(x, tilt)
    noise = random.normal(key, x.shape)
    x = x - size * drift + torch.sqrt(2 * size * temperature) * noise
    bins = ((x.clamp(-1.999, 1.999) + 2) / 4 * BINS).long()
    histogram = histogram.scatter_add(0, bins, torch.ones_like(bins))
    return (x, tilt, histogram), {"energy": energy(x, tilt) / CHAINS, "right": (x > 0).sum()}


PROGRAM = Program(
    step,
    init=lambda: (
        random.normal(random.key(0), (CHAINS,)),
        torch.tensor(0.3),
        torch.zeros(BINS, dtype=torch.int64),
    ),
    xs=lambda: (random.split(random.key(1), 8), torch.linspace(1, 0.1, 8)),
)
