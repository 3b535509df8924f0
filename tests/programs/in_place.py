"""In-place writes on fresh tensors: rows, += on slices, swaps, a matrix of lags."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

LAGS = 3


def step(state, signal):
    lagged = torch.zeros(LAGS, len(signal), dtype=signal.dtype)
    for lag in range(LAGS):
        lagged[lag, lag:] = signal[: len(signal) - lag]
    lagged[0] += state
    lagged[:, -1].mul_(0.5)
    gram = lagged @ lagged.T
    gram.diagonal().add_(1e-3)
    total = torch.empty_like(signal)
    total[:] = lagged.sum(0)
    order = torch.arange(len(signal))
    order[1:].sub_(1)
    total[order == 2] = -1.0
    new = state.clone()
    new.copy_(total).clamp_(-2, 2)
    new[::2], new[1::2] = new[1::2].clone(), new[::2].clone()
    return new, {"gram": gram, "upper": gram.triu_(1), "total": total.relu_()}


def init():
    return random.normal(random.key(0), (6,), torch.float64)


def xs():
    return random.normal(random.key(1), (5, 6), torch.float64)


PROGRAM = Program(step, init, xs, vmap="doesn't match the broadcast shape")
