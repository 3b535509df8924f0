"""K-means: assignments by argmin, centres by index_add; an empty cluster keeps its centre."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

CLUSTERS, DIM, POINTS = 4, 2, 60


def step(centres, points):
    distance = torch.cdist(points, centres)
    nearest = distance.argmin(1)
    sums = torch.zeros_like(centres).index_add(0, nearest, points)
    counts = torch.zeros(CLUSTERS).index_add(0, nearest, torch.ones(len(points)))
    new = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    loss = distance.gather(1, nearest[:, None]).square().mean()
    return new, {"loss": loss, "nearest": nearest}


def points():
    offsets = random.normal(random.key(1), (5, POINTS, DIM))
    return offsets + 4 * (torch.arange(POINTS) % 3)[None, :, None]


PROGRAM = Program(
    step,
    init=lambda: random.normal(random.key(0), (CLUSTERS, DIM)),
    xs=points,
    route="one program",
)
