"""Choices by where: a safe square root, Huber's loss, saturating counters, NaN where undefined."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program


def safe_sqrt(x):
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def huber(x, delta=0.7):
    return torch.where(x.abs() < delta, x.square() / 2, delta * (x.abs() - delta / 2))


def step(state, row):
    x, hits = state
    go_left = x.sum() < row.sum()
    moved = torch.where(go_left, x - 0.1 * row, x * 0.5 + torch.clamp(row, -1.0, 1.0))
    hits = torch.where(moved > 0.5, hits + 1, torch.zeros_like(hits)).clamp(max=3)
    outcome = {
        "root": safe_sqrt(moved),
        "loss": huber(moved - row),
        "ratio": (moved - moved) / (hits - hits),  # NaN everywhere
        "logs": torch.log(moved.detach()),  # NaN where negative
        "sign": torch.sign(moved) * torch.heaviside(moved.detach(), torch.tensor(0.5).double()),
        "side": torch.logical_xor(go_left, hits.bool()),
    }
    return (moved, hits), outcome


def init():
    return random.normal(random.key(7), (6,), torch.float64), torch.zeros(6, dtype=torch.int32)


def xs():
    return random.normal(random.key(8), (5, 6), torch.float64)


PROGRAM = Program(step, init, xs)
