"""A controller that reads tensors of globals, an object, defaults, partials, a module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from fdl import random
from tests.support.programs import Program

GAINS = {"p": torch.tensor(0.5, dtype=torch.float64), "filters": [torch.eye(3).double() * 0.9]}
BIAS = torch.full((3,), 0.01, dtype=torch.float64)
LAYER = torch.nn.Linear(3, 3).double().requires_grad_(False)
with torch.no_grad():
    LAYER.weight.copy_(torch.arange(9).view(3, 3) / 10)
    LAYER.bias.fill_(0.1)


@dataclass
class Plant:
    matrix: torch.Tensor
    limit: float = 1.5

    def __call__(self, state, force):
        return (self.matrix @ state + force).clamp(-self.limit, self.limit)


def blend(weight, old, new, *, bias=BIAS):
    return weight * old + (1 - weight) * new + bias


def make_step(rate):
    plant = Plant(random.normal(random.key(5), (3, 3), torch.float64) / 3)
    mix = partial(blend, torch.tensor(rate, dtype=torch.float64))

    def step(state, target):
        error = target - state
        force = GAINS["p"] * error + torch.tanh(LAYER(state))
        filtered = GAINS["filters"][0] @ plant(state, force)
        return mix(state, filtered), {"error": error.square().sum() * rate}

    return step


def init():
    return torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)


def xs():
    return random.normal(random.key(6), (5, 3), torch.float64)


PROGRAM = Program(make_step(0.3), init, xs)
