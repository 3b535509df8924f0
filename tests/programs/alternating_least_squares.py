"""Matrix factorisation by alternating least squares with masked ratings: batched solves."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

USERS, ITEMS, RANK, PENALTY = 7, 9, 3, 0.1
eye = torch.eye(RANK, dtype=torch.float64)


def solve_rows(factors, ratings, seen):
    """The rows u that minimise |ratings − u·factors|² over what was seen, plus a penalty."""
    gram = torch.einsum("ui,ir,is->urs", seen, factors, factors) + PENALTY * eye
    right = (seen * ratings) @ factors
    return torch.linalg.solve(gram, right)


def step(state, seen):
    ratings, items = state["ratings"], state["items"]
    users = solve_rows(items, ratings, seen.double())
    items = solve_rows(users, ratings.T, seen.T.double())
    error = torch.where(seen, ratings - users @ items.T, 0)
    rmse = (error.square().sum() / seen.sum()).sqrt()
    return {"ratings": ratings, "items": items}, {"rmse": rmse, "users": users}


def init():
    left, right, items = random.split(random.key(0), 3)
    ratings = random.normal(left, (USERS, RANK), torch.float64)
    ratings = ratings @ random.normal(right, (RANK, ITEMS), torch.float64)
    return {"ratings": ratings, "items": random.normal(items, (ITEMS, RANK), torch.float64)}


PROGRAM = Program(
    step,
    init=init,
    xs=lambda: random.bernoulli(random.key(1), 0.7, (5, USERS, ITEMS)),
)
