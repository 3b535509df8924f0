"""Quantisation-aware training: 8-bit weights and activations with straight-through rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random
from tests.support.programs import Program


def round_through(x):
    return x + (x.round() - x).detach()


def quantise(w, bits=8):
    limit = 2 ** (bits - 1) - 1
    scale = w.detach().abs().amax(-1, keepdim=True).clamp(min=1e-6) / limit
    return round_through(w / scale).clamp(-limit - 1, limit) * scale


def net(params, x):
    for i, (w, b) in enumerate(params):
        x = F.linear(quantise(x, 4), quantise(w), b)
        x = F.relu(x) if i < len(params) - 1 else x
    return x


def loss_fn(params, x, y):
    return F.smooth_l1_loss(net(params, x), y)


def step(params, batch):
    x, y = batch
    grads, loss = torch.func.grad_and_value(loss_fn)(params, x, y)
    params = [(w - 0.1 * dw, b - 0.1 * db) for (w, b), (dw, db) in zip(params, grads, strict=True)]
    stored = (params[0][0] / params[0][0].abs().max() * 127).round().to(torch.int8)
    return params, {"loss": loss, "stored": stored}


def init():
    keys = random.split(random.key(0), 2)
    sizes = [(16, 6), (2, 16)]
    weights = [random.normal(k, s) / s[1] ** 0.5 for k, s in zip(keys, sizes, strict=True)]
    return [(w, torch.zeros(len(w))) for w in weights]


def batches():
    x = random.normal(random.key(1), (4, 10, 6))
    return x, torch.stack([x.sum(-1), x[..., 0] * x[..., 1]], -1)


PROGRAM = Program(step, init=init, xs=batches, differentiable=False)
