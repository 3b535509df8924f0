"""A bag of words: embedding_bag with offsets and weights, means of a window, logits of a class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random
from tests.support.programs import Program

OFFSETS = torch.tensor([0, 2, 5])


def step(table, text):
    words, weights = text
    sums = F.embedding_bag(words, table, OFFSETS, mode="sum", per_sample_weights=weights)
    means = F.embedding_bag(words.view(2, 4), table, mode="mean")
    nearest = F.cosine_similarity(means[:, None], table[None], dim=-1).argmax(1)
    table = table.index_add(0, nearest, 0.1 * (means - table[nearest]))
    return table, {"sums": sums, "logits": F.log_softmax(means @ table.T, 1), "near": nearest}


def init():
    return random.normal(random.key(0), (7, 3), torch.float64)


def xs():
    words, weights = random.split(random.key(1))
    return random.randint(words, (5, 8), 0, 7), random.uniform(weights, (5, 8), torch.float64)


PROGRAM = Program(step, init, xs, vmap="performance drop")
