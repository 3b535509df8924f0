"""Float16 with a loss scale: overflow gives inf, which skips the update and halves the scale."""

from __future__ import annotations

import torch

from fdl import random, tree
from tests.support.programs import Program


def loss(weights, x):
    hidden = torch.relu(x @ weights["in"])
    return (hidden @ weights["out"] - 1).square().mean()


def step(state, x):
    half = tree.map(lambda w: w.half(), state["weights"])

    def scaled(half):
        value = loss(half, x)
        return value * state["scale"].half(), value

    grads, value = torch.func.grad(scaled, has_aux=True)(half)
    finite = torch.stack([g.isfinite().all() for g in tree.leaves(grads)]).all()
    grads = tree.map(lambda g: g.float() / state["scale"], grads)
    weights = tree.map(lambda w, g: torch.where(finite, w - 0.1 * g, w), state["weights"], grads)
    scale = torch.where(finite, state["scale"] * 1.5, state["scale"] / 2)
    return {"weights": weights, "scale": scale}, {"loss": value, "finite": finite}


def init():
    first, second = random.split(random.key(0))
    weights = {"in": random.normal(first, (3, 4)), "out": random.normal(second, (4,)) / 2}
    return {"weights": weights, "scale": torch.tensor(2.0**14)}


def xs():
    return random.normal(random.key(1), (5, 6, 3)).half()


PROGRAM = Program(step, init, xs, rtol=2e-3, atol=2e-3, differentiable=False)
