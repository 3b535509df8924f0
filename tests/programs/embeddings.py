"""Word vectors with negative samples, trained with SGD: embedding with padding, rows by index."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import optim, random
from fdl.optim import apply_updates
from tests.support.programs import Program

WORDS, WIDTH = 9, 4
OPT = optim.sgd(0.2, momentum=0.9)


def loss(params, batch):
    centre = F.embedding(batch["centre"], params["in"], padding_idx=0)
    context = F.embedding(batch["context"], params["out"], padding_idx=0).sum(-2)
    wrong = params["out"][batch["wrong"]]
    right = F.logsigmoid((centre * context).sum(-1))
    return -(right + F.logsigmoid(-(wrong @ centre[..., None])[..., 0]).sum(-1)).mean()


def step(state, batch):
    params, opt_state = state
    grads, value = torch.func.grad_and_value(loss)(params, batch)
    updates, opt_state = OPT.update(grads, opt_state, params)
    return (apply_updates(params, updates), opt_state), {"loss": value, "zero": grads["in"][0]}


def init():
    inside, outside = random.split(random.key(0))
    params = {
        "in": random.normal(inside, (WORDS, WIDTH), torch.float64),
        "out": random.normal(outside, (WORDS, WIDTH), torch.float64),
    }
    return params, OPT.init(params)


def xs():
    centre, context, wrong = random.split(random.key(1), 3)
    return {
        "centre": random.randint(centre, (4, 5), 0, WORDS),
        "context": random.randint(context, (4, 5, 3), 0, WORDS),
        "wrong": random.randint(wrong, (4, 5, 2), 0, WORDS),
    }


PROGRAM = Program(step, init, xs)
