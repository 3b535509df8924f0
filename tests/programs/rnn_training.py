"""An RNN whose time steps are an inner scan, trained by gradient descent: one batch each step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fdl
from fdl import random
from tests.support.programs import Program

HIDDEN, RATE = 5, 0.1


def loss(params, batch):
    tokens, targets = batch  # [time, batch], [batch]
    hidden = tokens.new_zeros(tokens.shape[1], HIDDEN, dtype=params["recur"].dtype)

    def cell(hidden, token):
        hidden = torch.tanh(params["embed"][token] + hidden @ params["recur"])
        return hidden, hidden.square().mean()

    hidden, activity = fdl.scan(cell, hidden, tokens)
    return F.cross_entropy(hidden @ params["read"], targets) + 0.01 * activity.mean()


def step(params, batch):
    grads, value = torch.func.grad_and_value(loss)(params, batch)
    return {name: params[name] - RATE * grads[name] for name in params}, value


def init():
    embed, recur, read = random.split(random.key(1), 3)
    return {
        "embed": random.normal(embed, (7, HIDDEN), torch.float64),
        "recur": random.normal(recur, (HIDDEN, HIDDEN), torch.float64),
        "read": random.normal(read, (HIDDEN, 3), torch.float64),
    }


def xs():
    tokens, targets = random.split(random.key(2))
    return random.randint(tokens, (4, 12, 3), 0, 7), random.randint(targets, (4, 3), 0, 3)


PROGRAM = Program(step, init, xs)
