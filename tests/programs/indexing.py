"""A deck of cards: rows by a vector, pairs of indices, masks, gathers, slices and rolls."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program


def step(deck, pick):
    rows = deck[pick["rows"]]  # [3, 6]
    cells = deck[pick["rows"], pick["columns"]]  # [3]
    mask = deck > deck.mean()
    kept = torch.where(mask, deck, 0.5 * deck)
    best = kept.argmax(1, keepdim=True)
    top = torch.take_along_dim(kept, best, 1)  # [5, 1]
    sorted_rows = kept.gather(1, kept.argsort(1))
    for i in range(2):  # a counter of Python
        kept = kept + 0.1 * sorted_rows.roll((i, 1), (0, 1))
        kept = torch.cat([kept[i:], kept[:i]])
    corner = kept[1:-1, ::2].sum() + kept[-1, 2] + kept[..., -1].mean()
    return kept / kept.norm(), {"cells": cells, "rows": rows, "top": top, "corner": corner}


def init():
    return random.normal(random.key(0), (5, 6), torch.float64)


def xs():
    rows, columns = random.split(random.key(1))
    return {
        "rows": random.randint(rows, (6, 3), 0, 5),
        "columns": random.randint(columns, (6, 3), 0, 6),
    }


PROGRAM = Program(step, init, xs)
