"""Order: a beam search by top-k, ranks, medians, a merge of sorted lists, soft ranks."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

BEAM, CHOICES = 3, 5


def step(state, logits):
    scores, history = state
    total = scores[:, None] + logits.log_softmax(-1)  # [beam, choices]
    scores, flat = total.flatten().topk(BEAM)
    history = torch.cat([history[flat // CHOICES, 1:], (flat % CHOICES)[:, None]], 1)
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = order.argsort(-1)
    merged = torch.cat([values[0], values[1]]).msort()
    places = torch.searchsorted(merged, values[2], right=True)
    return (scores, history), {
        "ranks": ranks,
        "median": logits.median(-1).values + logits.mode(-1).values,
        "third": logits.kthvalue(3, -1).values,
        "places": torch.bucketize(values[1], merged) + places,
        "top": torch.cummax(logits, 0).values,
        "least": logits.topk(2, largest=False, sorted=True),
    }


def init():
    history = torch.zeros(BEAM, 4, dtype=torch.int64)
    return torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64), history


def xs():
    return random.normal(random.key(0), (5, BEAM, CHOICES), torch.float64)


PROGRAM = Program(step, init, xs)
