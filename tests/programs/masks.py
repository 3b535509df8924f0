"""Rows that a constant mask selects: numpy's, a list, a literal, a closed-over tensor."""

from __future__ import annotations

import numpy as np
import torch

from tests.support.programs import FORMS, Program

EVEN = np.array([True, False, True, False])
ODD = torch.tensor([False, True, False, True])


def step(state, row):
    even, odd = state[EVEN], state[ODD]
    last = state[[False, False, False, True]]
    first = state[torch.arange(4) < 1]
    state = state.clone()
    state[EVEN] = odd * 0.5 + row
    return state, (even, odd, last + first)


def init():
    return torch.arange(8, dtype=torch.float64).view(4, 2)


def xs():
    return torch.linspace(-1, 1, 5, dtype=torch.float64)


PROGRAM = Program(
    step, init, xs, faults=dict.fromkeys(FORMS, "a constant boolean index is refused")
)
