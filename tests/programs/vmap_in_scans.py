"""A particle filter: vmapped dynamics and likelihoods, systematic resampling, keys split."""

from __future__ import annotations

import torch
from torch.func import vmap

from fdl import random
from tests.support.programs import Program

PARTICLES = 16


def move(key, particle):
    return (
        particle * 0.9 + torch.sin(particle.flip(0)) + 0.3 * random.normal(key, (2,), torch.float64)
    )


def log_likelihood(particle, observed):
    return -(particle.sum() - observed).square()


def step(state, observed):
    key, particles = state
    key, moves, draws = random.split(key, 3)
    particles = vmap(move)(random.split(moves, PARTICLES), particles)
    weights = vmap(log_likelihood, (0, None))(particles, observed).softmax(0)
    offsets = (torch.arange(PARTICLES) + random.uniform(draws, (), torch.float64)) / PARTICLES
    chosen = torch.searchsorted(weights.cumsum(0), offsets).clamp(max=PARTICLES - 1)
    estimate = weights @ particles
    return (key, particles[chosen]), {"estimate": estimate, "ess": 1 / weights.square().sum()}


def init():
    return random.key(0), random.normal(random.key(1), (PARTICLES, 2), torch.float64)


def xs():
    return torch.linspace(-1, 2, 5, dtype=torch.float64)


PROGRAM = Program(step, init, xs)
