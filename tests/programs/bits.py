"""A xorshift generator on int64, popcounts in uint8, and a checksum that wraps in int16."""

from __future__ import annotations

import torch

from tests.support.programs import Program

BYTES = torch.arange(0, 64, 8)


def step(state, data):
    x = state["x"]
    x = x ^ (x << 13)
    x = x ^ ((x >> 7) & ((1 << 57) - 1))  # a logical shift
    x = x ^ (x << 17)
    parts = ((x[:, None] >> BYTES) & 255).to(torch.uint8)
    ones = sum((parts >> i) & 1 for i in range(8))
    check = state["check"] * 31 + data.sum(dtype=torch.int16)  # int16, wraps around
    flips = torch.bitwise_not(data) % 7 - data // 3 + torch.bitwise_xor(data, data.flip(0))
    return {"x": x, "check": check}, {"ones": ones.sum(-1), "flips": flips, "odd": x % 2 == 1}


def init():
    return {"x": torch.tensor([1, -5, 2**62 + 3]), "check": torch.tensor(7, dtype=torch.int16)}


def xs():
    return (torch.arange(24).view(6, 4) * 37 - 100).to(torch.int8)


PROGRAM = Program(step, init, xs, differentiable=False)
