"""K-means: assignments by argmin, centres by index_add."""

from __future__ import annotations

import torch

import fdl
from tests.support.programs import Program


def step(centres, points):
    distances = torch.cdist(points, centres)
    labels = distances.argmin(1)
    sums = torch.zeros_like(centres).index_add(0, labels, points)
    ones = points.new_ones(len(points))
    counts = points.new_zeros(len(centres)).index_add(0, labels, ones)
    centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres, {"labels": labels, "inertia": distances.min(1).values.square().sum()}


def init():
    return torch.tensor([[0.0, 0.0], [3.0, 3.0], [50.0, 0.0]], dtype=torch.float64)


def xs():
    noise = fdl.random.normal(fdl.random.key(0), (4, 12, 2), torch.float64)
    return noise + 3.0 * (torch.arange(12) % 2)[:, None]


PROGRAM = Program(step, init, xs)
