"""Hamiltonian Monte Carlo for logistic regression: leapfrog as a scan, accept by key."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fdl
from fdl import random
from tests.support.programs import Program

x = random.normal(random.key(10), (30, 3))
y = (x.sum(-1) > 0).float()


def log_density(w):
    likelihood = -F.binary_cross_entropy_with_logits(x @ w, y, reduction="sum")
    return likelihood - 0.5 * (w @ w)


def leapfrog(w, p, size):
    score = torch.func.grad(log_density)

    def move(state, _):
        w, p = state
        p = p + size / 2 * score(w)
        w = w + size * p
        return (w, p + size / 2 * score(w)), ()

    return fdl.scan(move, (w, p), length=5)[0]


def step(state, key):
    w, log_size = state
    momentum, uniform = random.split(key)
    p = random.normal(momentum, w.shape)
    new_w, new_p = leapfrog(w, p, log_size.exp())
    log_ratio = log_density(new_w) - log_density(w) + 0.5 * (p @ p - new_p @ new_p)
    probability = log_ratio.exp().clamp(max=1.0)
    accept = random.uniform(uniform) < probability
    w = torch.where(accept, new_w, w)
    return (w, log_size + 0.1 * (probability - 0.8)), {"w": w, "accept": accept}


PROGRAM = Program(
    step,
    init=lambda: (torch.zeros(3), torch.tensor(-2.0)),
    xs=lambda: random.split(random.key(0), 6),
)
