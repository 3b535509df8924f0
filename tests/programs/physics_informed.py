"""A physics-informed network for the heat equation: jvp of jvp inside grad, Adam by hand."""

from __future__ import annotations

import math

import torch
from torch.func import grad_and_value, jvp, vmap

from fdl import nn, random, tree
from tests.support.programs import Program

model = nn.sequential(nn.linear(2, 16), nn.tanh, nn.linear(16, 16), nn.tanh, nn.linear(16, 1))


def residual(params, t, x):
    def u(t, x):
        return model.apply(params, torch.stack([t, x])[None])[0, 0]

    def u_x(x):
        return jvp(lambda x: u(t, x), (x,), (torch.ones_like(x),))[1]

    u_t = jvp(lambda t: u(t, x), (t,), (torch.ones_like(t),))[1]
    u_xx = jvp(u_x, (x,), (torch.ones_like(x),))[1]
    return u_t - 0.1 * u_xx


def loss_fn(params, t, x):
    inside = vmap(residual, in_dims=(None, 0, 0))(params, t, x)
    initial = model.apply(params, torch.stack([torch.zeros_like(x), x], -1))[:, 0]
    return inside.square().mean() + (initial - torch.sin(math.pi * x)).square().mean()


def step(state, key):
    params, m, v, count = state
    t, x = random.uniform(key, (2, 12))
    grads, loss = grad_and_value(loss_fn)(params, t, x)
    count = count + 1
    m = tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
    rate = 1e-2 * (1 - 0.999**count).sqrt() / (1 - 0.9**count)
    params = tree.map(lambda p, m, v: p - rate * m / (v.sqrt() + 1e-8), params, m, v)
    return (params, m, v, count), loss


def init():
    params = model.init(random.key(0))
    zeros = tree.map(torch.zeros_like, params)
    return params, zeros, zeros, torch.tensor(0.0)


PROGRAM = Program(
    step,
    init=init,
    xs=lambda: random.split(random.key(1), 4),
    fullgraph="INTERNAL ASSERT FAILED",
)
