"""SimCLR: two noisy views of a batch, a projection head and the NT-Xent loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import nn, random, tree
from tests.support.programs import Program

BATCH, TEMPERATURE = 6, 0.2
encoder = nn.sequential(nn.linear(10, 32), nn.relu, nn.linear(32, 8))


def nt_xent(z1, z2):
    z = F.normalize(torch.cat([z1, z2]), dim=-1)
    similarity = z @ z.T / TEMPERATURE
    similarity.fill_diagonal_(float("-inf"))
    positive = torch.arange(2 * BATCH).roll(BATCH)
    return F.cross_entropy(similarity, positive), similarity.argmax(1) == positive


def step(state, x):
    params, momentum, key = state
    key, first, second = random.split(key, 3)
    views = [x + 0.3 * random.normal(k, x.shape, x.dtype) for k in (first, second)]

    def loss_fn(params):
        return nt_xent(*(encoder.apply(params, view) for view in views))

    grads, (loss, correct) = torch.func.grad_and_value(loss_fn, has_aux=True)(params)
    momentum = tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
    params = tree.map(lambda p, m: p - 0.05 * m, params, momentum)
    return (params, momentum, key), {"loss": loss, "accuracy": correct.double().mean()}


def init():
    params = tree.cast(encoder.init(random.key(0)), torch.float64)
    return params, tree.map(torch.zeros_like, params), random.key(1)


PROGRAM = Program(
    step, init=init, xs=lambda: random.normal(random.key(2), (4, BATCH, 10), torch.float64)
)
