"""Viterbi decoding: a scan forwards that keeps the argmax, a reversed scan that gathers it back."""

from __future__ import annotations

import torch

import fdl
from fdl import random
from tests.support.programs import Program

STATES, TIME, BATCH = 4, 9, 3


def decode(transition, emission):
    def forward(score, emitted):
        candidates = score[:, :, None] + transition
        best, came_from = candidates.max(1)
        return best + emitted, came_from

    score, back = fdl.scan(forward, emission[0], emission[1:])
    last = score.argmax(-1)

    def backward(tag, came_from):
        tag = came_from.gather(1, tag[:, None]).squeeze(1)
        return tag, tag

    _, tags = fdl.scan(backward, last, back.flip(0))
    return score.amax(-1), torch.cat([tags.flip(0), last[None]])


def path_score(transition, emission, tags):
    emitted = emission.gather(2, tags[:, :, None]).sum((0, 2))
    return emitted + transition[tags[:-1], tags[1:]].sum(0)


def step(transition, batch):
    """One step of the structured perceptron."""
    emission, gold = batch
    score, tags = decode(transition, emission)

    def loss_fn(transition):
        wrong, right = (path_score(transition, emission, t) for t in (tags, gold))
        return (wrong - right).mean()

    grad, loss = torch.func.grad_and_value(loss_fn)(transition)
    return transition - 0.5 * grad, {"loss": loss, "score": score, "tags": tags}


def batches():
    emission = random.normal(random.key(1), (4, TIME, BATCH, STATES))
    return emission, random.randint(random.key(2), (4, TIME, BATCH), 0, STATES)


PROGRAM = Program(
    step,
    init=lambda: random.normal(random.key(0), (STATES, STATES)),
    xs=batches,
)
