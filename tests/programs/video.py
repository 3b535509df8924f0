"""Video: convolutions in three dimensions, transposed too, pooling, batch and group norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random
from tests.support.programs import Program


def step(state, clip):
    x = F.conv3d(clip, state["kernel"], padding=(0, 1, 1))
    mean, var = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4), unbiased=False)
    running = {"mean": state["mean"].lerp(mean, 0.1), "var": state["var"].lerp(var, 0.1)}
    x = F.batch_norm(x, running["mean"].detach(), running["var"].detach(), training=False)
    x = F.avg_pool3d(F.relu(x), (1, 2, 2))
    x = F.group_norm(x, 2)
    back = F.conv_transpose3d(x, state["kernel"], stride=(1, 2, 2), padding=(0, 1, 1))
    peaks = F.adaptive_max_pool3d(back, (1, 2, 2)).flatten(1)
    kernel = state["kernel"] * 0.99 + 0.01 * back.mean((0, 2, 3, 4))[:, None, None, None]
    return {"kernel": kernel, **running}, peaks


def init():
    return {
        "kernel": random.normal(random.key(0), (2, 2, 2, 3, 3), torch.float64),
        "mean": torch.zeros(2, dtype=torch.float64),
        "var": torch.ones(2, dtype=torch.float64),
    }


def xs():
    return random.normal(random.key(1), (4, 2, 2, 4, 6, 6), torch.float64)


PROGRAM = Program(step, init, xs)
