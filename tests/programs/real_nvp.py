"""RealNVP: affine couplings with alternating masks, exact likelihood, and samples by inversion."""

from __future__ import annotations

import math

import torch

from fdl import nn, optim, random, tree
from tests.support.programs import Program

LAYERS = 4
masks = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(LAYERS // 2, 1).double()
conditioner = nn.sequential(nn.linear(2, 16), nn.relu, nn.linear(16, 4))
optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(5e-3))


def coupling(params, x, mask):
    log_scale, shift = conditioner.apply(params, x * mask).chunk(2, -1)
    return torch.tanh(log_scale) * (1 - mask), shift * (1 - mask)


def negative_log_likelihood(layers, x):
    logdet = x.new_zeros(len(x))
    for params, mask in zip(layers, masks, strict=True):
        log_scale, shift = coupling(params, x, mask)
        x = x * log_scale.exp() + shift
        logdet = logdet + log_scale.sum(-1)
    return (x.square().sum(-1) / 2 + math.log(2 * math.pi) - logdet).mean()


def sample(layers, z):
    for params, mask in reversed(list(zip(layers, masks, strict=True))):
        log_scale, shift = coupling(params, z, mask)
        z = (z - shift) * torch.exp(-log_scale)
    return z


def step(state, x):
    layers, opt, key = state
    grads, loss = torch.func.grad_and_value(negative_log_likelihood)(layers, x)
    updates, opt = optimizer.update(grads, opt, layers)
    layers = optim.apply_updates(layers, updates)
    key, draw = random.split(key)
    return (layers, opt, key), (loss, sample(layers, random.normal(draw, (3, 2), torch.float64)))


def init():
    layers = [conditioner.init(key) for key in random.split(random.key(0), LAYERS)]
    layers = tree.cast(layers, torch.float64)
    return layers, optimizer.init(layers), random.key(1)


def data():
    x = random.normal(random.key(2), (4, 32, 2), torch.float64)
    return torch.stack([x[..., 0], x[..., 1] * 0.3 + x[..., 0] ** 2], -1)


PROGRAM = Program(step, init=init, xs=data)
