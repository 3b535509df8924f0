"""Evolution strategies: antithetic noise, a vmapped population, fitness shaped by rank."""

from __future__ import annotations

import torch

import fdl
from fdl import random
from tests.support.programs import Program

PAIRS, SIGMA = 5, 0.1


def fitness(theta, target):
    w1, w2 = theta[:24].view(2, 12), theta[24:].view(12, 2)

    def move(position, _):
        return position + 0.2 * torch.tanh((target - position) @ w1) @ w2, ()

    position, _ = fdl.scan(move, torch.zeros(2), length=5)
    return -(position - target).norm()


def step(state, key):
    theta, velocity = state
    noise_key, target_key = random.split(key)
    noise = random.normal(noise_key, (PAIRS, theta.numel()))
    noise = torch.cat([noise, -noise])
    target = random.uniform(target_key, (2,), minval=-1.0, maxval=1.0)
    scores = torch.vmap(fitness, in_dims=(0, None))(theta + SIGMA * noise, target)
    ranks = scores.argsort().argsort().float() / (2 * PAIRS - 1) - 0.5
    gradient = ranks @ noise / (2 * PAIRS * SIGMA)
    velocity = 0.9 * velocity + gradient
    return (theta + 0.05 * velocity, velocity), {"best": scores.max(), "median": scores.median()}


PROGRAM = Program(
    step,
    init=lambda: (random.normal(random.key(0), (48,)) / 5, torch.zeros(48)),
    xs=lambda: random.split(random.key(1), 5),
)
