"""DDPM on points of a circle: noise by key, a denoiser MLP, one training and one sampling step."""

from __future__ import annotations

import math

import torch

from fdl import nn, optim, random, tree
from tests.support.programs import Program

STEPS, BATCH = 50, 16
beta = torch.linspace(1e-4, 0.05, STEPS, dtype=torch.float64)
alpha_bar = torch.cumprod(1 - beta, 0)
denoiser = nn.sequential(
    nn.linear(2 + 8, 32), nn.silu, nn.linear(32, 32), nn.silu, nn.linear(32, 2)
)
optimizer = optim.adam(1e-3)


def predict(params, x, t):
    frequency = torch.exp(-math.log(100.0) * torch.arange(4, dtype=x.dtype) / 4)
    angle = t[:, None] * frequency
    return denoiser.apply(params, torch.cat([x, angle.sin(), angle.cos()], -1))


def step(state, key):
    params, opt, sample = state
    data_key, time_key, noise_key, sample_key = random.split(key, 4)
    angle = random.uniform(data_key, (BATCH,), torch.float64) * 2 * math.pi
    x0 = torch.stack([angle.cos(), angle.sin()], -1)
    t = random.randint(time_key, (BATCH,), 0, STEPS)
    noise = random.normal(noise_key, x0.shape, torch.float64)

    def loss_fn(params):
        level = alpha_bar[t][:, None]
        noisy = level.sqrt() * x0 + (1 - level).sqrt() * noise
        return (predict(params, noisy, t) - noise).square().mean()

    grads, loss = torch.func.grad_and_value(loss_fn)(params)
    updates, opt = optimizer.update(grads, opt, params)
    params = optim.apply_updates(params, updates)

    last = torch.full((BATCH,), STEPS - 1)
    score = predict(params, sample, last) * beta[-1] / (1 - alpha_bar[-1]).sqrt()
    fresh = random.normal(sample_key, sample.shape, torch.float64)
    sample = (sample - score) / (1 - beta[-1]).sqrt() + beta[-1].sqrt() * fresh
    return (params, opt, sample), loss


def init():
    params = tree.cast(denoiser.init(random.key(0)), torch.float64)
    sample = random.normal(random.key(1), (BATCH, 2), torch.float64)
    return params, optimizer.init(params), sample


PROGRAM = Program(step, init=init, xs=lambda: random.split(random.key(2), 5))
