"""A character model: embedding, a GRU as a scan, tied output weights, truncated BPTT."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fdl
from fdl import optim, random, tree
from tests.support.programs import Program

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it "
LETTERS = sorted(set(TEXT))
WIDTH, TIME = 12, 8
optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(1e-2))


def gru(params, h, x):
    gates = F.linear(x, params["w"], params["b"])
    recurrent = F.linear(h, params["u"])
    (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), recurrent.chunk(3, -1)
    r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
    return torch.lerp(torch.tanh(n + r * hn), h, z)


def loss_fn(params, h, letters):
    def read(h, x):
        h = gru(params, h, x)
        return h, h

    h, outputs = fdl.scan(read, h, F.embedding(letters[:-1], params["embed"]))
    logits = outputs @ params["embed"].T
    return F.cross_entropy(logits.flatten(0, 1), letters[1:].flatten()), h


def step(state, letters):
    params, opt, h = state
    grads, (loss, h) = torch.func.grad_and_value(loss_fn, has_aux=True)(params, h, letters)
    updates, opt = optimizer.update(grads, opt, params)
    return (optim.apply_updates(params, updates), opt, h.detach()), loss


def init():
    keys = random.split(random.key(0), 3)
    params = {
        "embed": random.normal(keys[0], (len(LETTERS), WIDTH)) / WIDTH**0.5,
        "w": random.normal(keys[1], (3 * WIDTH, WIDTH)) / WIDTH**0.5,
        "u": random.normal(keys[2], (3 * WIDTH, WIDTH)) / WIDTH**0.5,
        "b": torch.zeros(3 * WIDTH),
    }
    params = tree.cast(params, torch.float64)
    return params, optimizer.init(params), torch.zeros(2, WIDTH, dtype=torch.float64)


def windows():
    letters = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    starts = torch.arange(4)[:, None, None] * TIME + torch.arange(TIME + 1)[:, None]
    return letters[starts + 32 * torch.arange(2)]  # [step, time + 1, batch]


PROGRAM = Program(step, init=init, xs=windows)
