"""Tabular Q-learning on a grid: the table is read and written at 0-d indices, as in NumPy."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

SIZE, GOAL = 4, 15
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])


def environment(s, a):
    position = torch.stack([s // SIZE, s % SIZE]) + MOVES[a]
    row, column = position.clamp(0, SIZE - 1)
    new = row * SIZE + column
    return new, (new == GOAL).float()


def step(state, key):
    q, s, epsilon = state
    explore, choose = random.split(key)
    greedy = q[s].argmax()
    a = torch.where(random.uniform(explore) < epsilon, random.randint(choose, (), 0, 4), greedy)
    new, reward = environment(s, a)
    target = reward + 0.9 * q[new].max() * (new != GOAL)
    error = target - q[s, a]
    q = q.clone()
    q[s, a] += 0.5 * error
    s = torch.where(new == GOAL, 0, new)
    return (q, s, epsilon * 0.99), {"reward": reward, "error": error, "state": new}


PROGRAM = Program(
    step,
    init=lambda: (torch.zeros(SIZE * SIZE, 4), torch.tensor(0), torch.tensor(0.9)),
    xs=lambda: random.split(random.key(0), 8),
    fullgraph="PendingUnbackedSymbolNotFound",
)
