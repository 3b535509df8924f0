"""A modern Hopfield network: retrieval by softmax attention, a memory written round a ring."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

MEMORIES, WIDTH = 6, 12


def energy(query, memory, log_beta):
    beta = log_beta.exp()
    return 0.5 * query @ query - torch.logsumexp(beta * memory @ query, 0) / beta


def step(state, pattern):
    memory, log_beta, count = state
    slot = count % MEMORIES
    memory = torch.where((torch.arange(MEMORIES) == slot)[:, None], pattern, memory)
    query = pattern * (torch.arange(WIDTH) < WIDTH // 2)
    energies = []
    for _ in range(3):
        energies.append(energy(query, memory, log_beta))
        query = torch.softmax(log_beta.exp() * memory @ query, 0) @ memory
    error = (torch.sign(query) != pattern).float().mean()
    return (memory, log_beta, count + 1), (torch.stack(energies), error, query)


PROGRAM = Program(
    step,
    init=lambda: (torch.zeros(MEMORIES, WIDTH), torch.tensor(0.5), torch.tensor(0)),
    xs=lambda: 2.0 * random.bernoulli(random.key(0), 0.5, (8, WIDTH)) - 1,
    rtol=1e-4,  # the derivative with respect to β is what is left of larger terms
)
