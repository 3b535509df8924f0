"""SARSA in a batch of worlds: `table[i, s, a]` is written by index_put."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

WORLDS, STATES, ACTIONS = 3, 6, 2
world = torch.arange(WORLDS)


def policy(key, table, s):
    preference = table[world, s] + random.normal(key, (WORLDS, ACTIONS))
    return preference.argmax(-1)


def step(state, key):
    table, s, a, rate = state
    new = (s + 2 * a - 1).clamp(0, STATES - 1)
    reward = (new == STATES - 1).float() - 0.1
    new = torch.where(new == STATES - 1, torch.zeros_like(new), new)
    new_a = policy(key, table, new)
    error = reward + 0.9 * table[world, new, new_a] - table[world, s, a]
    table = table.index_put((world, s, a), rate * error, accumulate=True)
    return (table, new, new_a, rate), {"reward": reward.mean(), "error": error}


PROGRAM = Program(
    step,
    init=lambda: (
        torch.zeros(WORLDS, STATES, ACTIONS),
        torch.zeros(WORLDS, dtype=torch.int64),
        torch.ones(WORLDS, dtype=torch.int64),
        torch.tensor(0.5),
    ),
    xs=lambda: random.split(random.key(0), 8),
)
