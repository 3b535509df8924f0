"""L-BFGS: the two-loop recursion over pairs that sit in a ring buffer in the carry."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.programs import Program

MEMORY, DIM = 4, 5


class State(NamedTuple):
    x: Tensor
    gradient: Tensor
    steps: Tensor  # [memory, dim]
    changes: Tensor  # [memory, dim]
    count: Tensor


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def direction(state):
    q, alphas = state.gradient, []
    ages = (state.count - 1 - torch.arange(MEMORY)) % MEMORY  # newest first
    s, y = state.steps[ages], state.changes[ages]
    sy = (s * y).sum(-1)
    rho = torch.where(sy > 1e-10, 1 / sy.clamp(min=1e-10), 0)
    for i in range(MEMORY):
        alphas.append(rho[i] * (s[i] @ q))
        q = q - alphas[i] * y[i]
    scale = torch.where(sy[0] > 1e-10, sy[0] / (y[0] @ y[0]).clamp(min=1e-10), 1e-3)
    r = scale * q
    for i in reversed(range(MEMORY)):
        r = r + s[i] * (alphas[i] - rho[i] * (y[i] @ r))
    return -r


def step(state, rate):
    x = state.x + rate * direction(state)
    gradient, value = torch.func.grad_and_value(rosenbrock)(x)
    slot = (state.count % MEMORY)[None]
    steps = state.steps.index_copy(0, slot, (x - state.x)[None])
    changes = state.changes.index_copy(0, slot, (gradient - state.gradient)[None])
    return State(x, gradient, steps, changes, state.count + 1), (value, gradient.abs().amax())


def init():
    x = torch.linspace(-0.5, 0.8, DIM)
    empty = torch.zeros(MEMORY, DIM)
    return State(x, torch.func.grad(rosenbrock)(x), empty, empty, torch.tensor(0))


PROGRAM = Program(step, init=init, xs=lambda: torch.full((7,), 0.5), rtol=1e-3, atol=1e-4)
