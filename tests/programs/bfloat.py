"""Bfloat16 weights with float32 sums: autocast, mixed dtypes, a cast back into the state."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random
from tests.support.programs import Program


def step(state, x):
    weights, average = state["weights"], state["average"]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = F.linear(x, weights)  # bfloat16
        normal = F.layer_norm(hidden, (4,))
    scores = hidden.float().softmax(-1)
    update = (scores.T @ x).to(torch.bfloat16)
    weights = weights * 0.9 + update * 0.01
    average = average.lerp(hidden.mean(0, dtype=torch.float32), 0.1)
    return {"weights": weights, "average": average}, {
        "hidden": hidden,
        "normal": normal.float(),
        "sum": (hidden * 2.0).sum(-1),
        "scores": scores,
    }


def init():
    weights = random.normal(random.key(0), (4, 3)).bfloat16()
    return {"weights": weights, "average": torch.zeros(4)}


def xs():
    return random.normal(random.key(1), (5, 6, 3))


PROGRAM = Program(step, init, xs, rtol=2e-2, atol=1e-1)
