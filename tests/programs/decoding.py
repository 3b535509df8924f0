"""Greedy decoding with a cache of keys and values: the position is a tensor in the state."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random
from tests.support.programs import Program

VOCABULARY, WIDTH, LONGEST = 11, 6, 8
EMBED = random.normal(random.key(0), (VOCABULARY, WIDTH))
QKV = random.normal(random.key(1), (WIDTH, 3 * WIDTH)) / 2


def step(state, forced):
    """Decode one token for each text; a forced token of the prompt is taken instead."""
    token = torch.where(forced >= 0, forced, state["token"])
    q, k, v = (EMBED[token] @ QKV).chunk(3, -1)
    here = torch.arange(LONGEST) == state["position"]
    keys = torch.where(here[:, None], k[:, None], state["keys"])
    values = torch.where(here[:, None], v[:, None], state["values"])
    seen = torch.arange(LONGEST) <= state["position"]
    scores = torch.einsum("bd,btd->bt", q, keys) / WIDTH**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    logits = torch.einsum("bt,btd->bd", weights, values) @ EMBED.T
    token = logits.argmax(-1)
    log_prob = F.log_softmax(logits, -1).gather(-1, token[:, None])[:, 0]
    position = state["position"] + 1
    return {"token": token, "position": position, "keys": keys, "values": values}, (token, log_prob)


def init():
    cache = torch.zeros(2, LONGEST, WIDTH)
    start = torch.zeros(2, dtype=torch.int64)
    return {"token": start, "position": torch.tensor(0), "keys": cache, "values": cache + 0}


def xs():
    return torch.tensor([[3, 1], [4, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]])


PROGRAM = Program(step, init, xs)
