"""Beam search with a recurrent scorer: topk over beams and words, histories regathered."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

BEAMS, WORDS, WIDTH, LENGTH = 3, 7, 8, 6


def step(state, penalty):
    hidden, scores, words, history, position, params = state
    embedded = params["embed"][words]
    hidden = torch.tanh(hidden @ params["recur"] + embedded)
    log_prob = torch.log_softmax(hidden @ params["embed"].T - penalty, -1)
    total = (scores[:, None] + log_prob).flatten()
    scores, flat = total.topk(BEAMS)
    beam = torch.div(flat, WORDS, rounding_mode="floor")
    words = flat % WORDS
    history = history[beam]
    history[:, position % LENGTH] = words
    state = hidden[beam], scores, words, history, position + 1, params
    return state, {"best": scores[0], "sentence": history[0]}


def init():
    embed, recur = random.split(random.key(0))
    params = {
        "embed": random.normal(embed, (WORDS, WIDTH)),
        "recur": random.normal(recur, (WIDTH, WIDTH)) / WIDTH**0.5,
    }
    scores = torch.tensor([0.0, *[-1e9] * (BEAMS - 1)])
    words = torch.zeros(BEAMS, dtype=torch.long)
    history = torch.zeros(BEAMS, LENGTH, dtype=torch.long)
    return torch.zeros(BEAMS, WIDTH), scores, words, history, torch.tensor(0), params


PROGRAM = Program(
    step,
    init=init,
    xs=lambda: random.uniform(random.key(1), (6, WORDS)),
)
