"""Integers of every width: wrapping sums, floor division of negatives, remainders, promotion."""

from __future__ import annotations

import torch

from tests.support.programs import Program


def step(state, n):
    byte, short, word, long, unsigned = state
    byte = byte + n.to(torch.int8) * 3  # wraps around at 128
    short = short * 5 - byte  # int8 with int16 gives int16
    word = torch.where(n > 0, word // 3, word - 2**20 * n.to(torch.int32))
    long = long * 6364136223846793005 + 1442695040888963407  # wraps around
    unsigned = unsigned - n.to(torch.uint8)
    results = {
        "floor": torch.div(short, -7, rounding_mode="floor"),
        "trunc": torch.div(short, -7, rounding_mode="trunc"),
        "remainder": torch.remainder(short, -7),
        "fmod": torch.fmod(short, 7),
        "true": word / 7,  # float32
        "shift": (long >> 33) ^ (long << 5),
        "power": byte**2,
        "gcd": torch.gcd(word, word.new_tensor(48)),
        "sum": byte.sum(),  # int64
        "mean": unsigned.float().mean(),
        "abs": byte.abs().amax() - byte.sign().amin(),
        "mixed": byte + unsigned,  # int16
        "bool": (byte < 0) + unsigned,
        "product": byte.prod(),
    }
    return (byte, short, word, long, unsigned), results


def init():
    return (
        torch.tensor([-128, -1, 0, 127], dtype=torch.int8),
        torch.tensor([-32768, -7, 3, 32767], dtype=torch.int16),
        torch.tensor([-(2**31), -5, 6, 2**31 - 1], dtype=torch.int32),
        torch.tensor([-(2**63), -1, 1, 2**63 - 1]),
        torch.tensor([0, 1, 128, 255], dtype=torch.uint8),
    )


def xs():
    return torch.tensor([[1, -2, 3, 4], [0, 5, -6, 7], [100, 50, -50, -100], [9, 9, 9, 9]])


PROGRAM = Program(step, init, xs, differentiable=False)
