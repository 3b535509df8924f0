"""A running histogram by bincount with minlength, and one-hot rows of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.support.programs import Program

BINS = 8


def step(counts, values):
    counts = counts + torch.bincount(values, minlength=BINS)
    return counts, {"rank": counts[values], "hot": F.one_hot(counts.argmax(), BINS)}


def init():
    return torch.zeros(BINS, dtype=torch.int64)


def xs():
    return torch.arange(30).reshape(5, 6).square() % 7


PROGRAM = Program(step, init, xs, differentiable=False)
