"""A memory of slots that is read and written at indices: put, scatter, copy, fill, masked."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

TRIANGLE = torch.tril_indices(4, 4)
EVEN = torch.tensor([True, False, True, False]).nonzero()[:, 0]


def step(memory, access):
    where, value = access
    memory = memory.index_put((where,), value, accumulate=True)
    memory = memory.scatter(1, where[:, None], value[:, :1])
    memory = memory.scatter_add(0, where[None, :].expand(2, 4), value[:2])
    memory = memory.index_fill(0, where[:1], 0.25)
    memory = torch.where(memory.abs() > 2, memory.sign() * 2, memory)
    lower = memory[TRIANGLE[0], TRIANGLE[1]]
    picked = memory[[0, 2]] - memory[:, None][EVEN][:, 0] + memory.index_select(0, where[:2])
    memory = memory.masked_fill(memory.abs() < 1e-3, 0.0)
    return memory, (lower, picked, memory.diagonal(1), memory[where[..., None], [[0, 1]]])


def init():
    return random.normal(random.key(3), (4, 4), torch.float64)


def xs():
    where, value = random.split(random.key(4))
    drawn = random.randint(where, (5, 4), 0, 4)
    return drawn, random.normal(value, (5, 4, 4), torch.float64)


PROGRAM = Program(step, init, xs)
