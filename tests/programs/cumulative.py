"""Sums along the way: moving averages, compound interest, log-space sums, drawdowns."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program


def step(state, returns):
    wealth = state["wealth"] * torch.cumprod(1 + 0.1 * returns, 0)
    drawdown = 1 - wealth / wealth.cummax(0).values
    sums = torch.cumsum(returns, 0)
    window = sums[3:] - sums[:-3]
    logs = torch.logcumsumexp(returns, 0) - torch.logsumexp(returns, 0)
    integral = torch.cumulative_trapezoid(returns, dx=0.5)
    count = torch.cumsum(returns > 0, 0) + state["count"]  # int64
    last = {"wealth": wealth[-1].clamp(0.1, 10.0), "count": count[-1]}
    return last, (drawdown, window, logs, integral, count, torch.diff(returns, n=2), sums.amax())


def init():
    return {"wealth": torch.tensor(1.0, dtype=torch.float64), "count": torch.tensor(0)}


def xs():
    return random.normal(random.key(0), (5, 9), torch.float64)


PROGRAM = Program(step, init, xs)
