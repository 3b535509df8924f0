"""A ring buffer with a counter in the state: a row is written at it, another is read behind it."""

from __future__ import annotations

import torch

from tests.support.programs import Program

SIZE = 3


def step(state, sample):
    buffer, count = state["buffer"], state["count"]
    slot = count % SIZE
    oldest = buffer[slot]
    buffer = buffer.index_copy(0, slot[None], sample[None])
    newest = buffer.select(0, -1)
    at = torch.arange(SIZE) == slot
    mean = buffer.sum(0) / (count + 1).clamp(max=SIZE)
    return {"buffer": buffer, "count": count + 1}, (mean, oldest, newest, at)


def init():
    return {"buffer": torch.zeros(SIZE, 2, dtype=torch.float64), "count": torch.tensor(0)}


def xs():
    return torch.arange(14, dtype=torch.float64).reshape(7, 2).sin()


PROGRAM = Program(
    step,
    init,
    xs,
    fullgraph="unbacked",
)
