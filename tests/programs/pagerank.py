"""PageRank by power iteration on edge lists; pages without links jump anywhere."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

PAGES, LINKS = 15, 40
source = random.randint(random.key(0), (LINKS,), 0, PAGES - 2)
target = random.randint(random.key(1), (LINKS,), 0, PAGES)
outgoing = torch.bincount(source, minlength=PAGES)


def step(state, damping):
    rank, teleport = state
    share = torch.where(outgoing > 0, rank / outgoing, 0)
    flow = torch.zeros(PAGES, dtype=rank.dtype).index_add(0, target, share[source])
    dangling = (rank * (outgoing == 0)).sum()
    new = damping * (flow + dangling / PAGES) + (1 - damping) * teleport.softmax(0)
    return (new, teleport), ((new - rank).abs().sum(), new.topk(3).indices)


PROGRAM = Program(
    step,
    init=lambda: (
        torch.full((PAGES,), 1 / PAGES, dtype=torch.float64),
        torch.zeros(PAGES).double(),
    ),
    xs=lambda: torch.linspace(0.8, 0.9, 6, dtype=torch.float64),
)
