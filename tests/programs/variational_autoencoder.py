"""A variational autoencoder: reparametrised samples by key, KL to the prior, Adam."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from fdl import nn, optim, random, tree
from tests.support.programs import Program

PIXELS, LATENT = 16, 3
encoder = nn.sequential(nn.linear(PIXELS, 24), nn.relu, nn.linear(24, 2 * LATENT))
decoder = nn.sequential(nn.linear(LATENT, 24), nn.relu, nn.linear(24, PIXELS))
optimizer = optim.adam(1e-2)


def negative_elbo(params, x, key):
    mean, raw = encoder.apply(params["encoder"], x).chunk(2, -1)
    scale = F.softplus(raw) + 1e-4
    z = mean + scale * random.normal(key, mean.shape, mean.dtype)
    logits = decoder.apply(params["decoder"], z)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean), validate_args=False)
    kl = kl_divergence(Normal(mean, scale, validate_args=False), prior).sum(-1)
    return (reconstruction + kl).mean(), {"reconstruction": reconstruction.mean(), "kl": kl.mean()}


def step(state, x):
    params, opt, key = state
    key, draw = random.split(key)
    grads, (loss, parts) = torch.func.grad_and_value(negative_elbo, has_aux=True)(params, x, draw)
    updates, opt = optimizer.update(grads, opt, params)
    return (optim.apply_updates(params, updates), opt, key), {"loss": loss, **parts}


def init():
    encode, decode = random.split(random.key(0))
    params = {"encoder": encoder.init(encode), "decoder": decoder.init(decode)}
    params = tree.cast(params, torch.float64)
    return params, optimizer.init(params), random.key(1)


PROGRAM = Program(
    step,
    init=init,
    xs=lambda: random.bernoulli(random.key(2), 0.3, (5, 8, PIXELS)).double(),
    fullgraph="",
)
