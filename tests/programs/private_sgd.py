"""DP-SGD: gradients per example by vmap of grad, clipped to a norm, noise by key."""

from __future__ import annotations

import torch
from torch.func import grad_and_value, vmap

from fdl import losses, nn, random, tree
from tests.support.programs import Program

CLIP, SIGMA, BATCH = 1.0, 0.8, 8
model = nn.sequential(nn.linear(12, 16), nn.relu, nn.linear(16, 4))


def loss_fn(params, x, y):
    return losses.cross_entropy(model.apply(params, x[None]), y[None])


def step(state, batch):
    params, key = state
    x, y = batch
    grads, loss = vmap(grad_and_value(loss_fn), in_dims=(None, 0, 0))(params, x, y)
    squares = [g.flatten(1).square().sum(1) for g in tree.leaves(grads)]
    norms = torch.stack(squares).sum(0).sqrt()
    factor = (CLIP / norms).clamp(max=1.0)
    keys = iter(random.split(key, len(squares) + 1))
    key = next(keys)

    def private(g):
        total = torch.einsum("b,b...->...", factor, g)
        return (total + SIGMA * CLIP * random.normal(next(keys), total.shape)) / BATCH

    params = tree.map(lambda p, g: p - 0.2 * private(g), params, grads)
    return (params, key), {"loss": loss.mean(), "clipped": (norms > CLIP).float().mean()}


def batches():
    x = random.normal(random.key(1), (4, BATCH, 12))
    return x, x[..., :4].argmax(-1)


PROGRAM = Program(
    step,
    init=lambda: (model.init(random.key(0)), random.key(2)),
    xs=batches,
)
