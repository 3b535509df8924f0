"""HMM: the forward algorithm in log space over a scan, trained by the gradient of its evidence."""

from __future__ import annotations

import torch

import fdl
from fdl import random
from tests.support.programs import Program

STATES, SYMBOLS, TIME = 3, 5, 12


def log_likelihood(params, symbols):
    start = params["start"].log_softmax(-1)
    move = params["move"].log_softmax(-1)
    emit = params["emit"].log_softmax(-1)

    def forward(alpha, symbol):
        alpha = torch.logsumexp(alpha[:, None] + move, 0) + emit[:, symbol]
        return alpha, alpha.argmax()

    first = start + emit[:, symbols[0]]
    alpha, states = fdl.scan(forward, first, symbols[1:])
    return alpha.logsumexp(0), states


def step(params, symbols):
    grads, (value, states) = torch.func.grad_and_value(log_likelihood, has_aux=True)(
        params, symbols
    )
    return {name: p + 0.05 * grads[name] for name, p in params.items()}, (value, states)


def init():
    keys = random.split(random.key(0), 3)
    return {
        "start": random.normal(keys[0], (STATES,)),
        "move": random.normal(keys[1], (STATES, STATES)),
        "emit": random.normal(keys[2], (STATES, SYMBOLS)),
    }


PROGRAM = Program(
    step,
    init=init,
    xs=lambda: random.randint(random.key(1), (4, TIME), 0, SYMBOLS),
    fullgraph="PendingUnbackedSymbolNotFound",
)
