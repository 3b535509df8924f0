"""The methods of Poisson and binomial draws. All draws of a call share the keys of its steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl.random._arithmetic import unit
from fdl.random._loops import until_done
from fdl.random._samplers import split

Propose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (u, v) -> count, is it accepted


def poisson(key: Tensor, lam: Tensor) -> Tensor:
    """Draw from Poisson distributions with means `lam`, float32; NaN counts as small."""
    small = ~(lam >= 10)
    few = _by_products(key, torch.where(small, lam, 0.0))
    many = _by_rejection_of_poisson(key, torch.where(small, 1e5, lam))
    return torch.where(lam == 0, 0.0, torch.where(small, few, many))


def _by_products(key: Tensor, lam: Tensor) -> Tensor:
    """Count uniform numbers until their product is below exp(-lam): Knuth's method."""
    shape = tuple(lam.shape)

    def step(carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        key, count, log_product = carry
        key, uniform_key = split(key).unbind()
        count = torch.where(log_product > -lam, count + 1, count)
        return key, count, log_product + torch.log(unit(uniform_key, shape, lam.dtype))

    init: tuple[Tensor, ...] = (key, torch.zeros_like(lam), torch.zeros_like(lam))
    return until_done(step, lambda carry: ~(carry[2] > -lam), init)[1] - 1


def _by_rejection_of_poisson(key: Tensor, lam: Tensor) -> Tensor:
    """Draw by transformed rejection, for means from 10 on."""
    b = 0.931 + 2.53 * torch.sqrt(lam)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    squeeze = 0.9277 - 3.6224 / (b - 2)
    mean = lam.double()
    log_mean = torch.log(mean)

    def propose(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        inside = 0.5 - u.abs()
        k = torch.floor((2 * a / inside + b) * u + lam + 0.43)
        log_v = torch.log((v * inverse_alpha / (a / (inside * inside) + b)).double())
        log_probability = k * log_mean - mean - torch.lgamma(k.double() + 1)
        outside = (k < 0) | ((inside < 0.013) & (v > inside))
        at_once = (inside >= 0.07) & (v <= squeeze)
        return k, at_once | (~outside & (log_v <= log_probability))

    return _until_accepted(key, propose, lam)


def _until_accepted(key: Tensor, propose: Propose, like: Tensor) -> Tensor:
    """Repeat proposals of two uniform numbers, the first of them in [-0.5, 0.5).

    They are made for all elements until each has accepted one, of which, as in JAX, the last
    counts: when one is accepted tells nothing about its value.
    """
    shape, dtype = tuple(like.shape), like.dtype

    def step(carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        key, accepted, count = carry
        key, *keys = split(key, 3).unbind()
        u, v = (unit(each, shape, dtype) for each in keys)
        k, is_accepted = propose(u - 0.5, v)
        return key, accepted | is_accepted, torch.where(is_accepted, k, count)

    init: tuple[Tensor, ...] = (
        key,
        torch.zeros_like(like, dtype=torch.bool),
        torch.full_like(like, -1.0),
    )
    return until_done(step, lambda carry: carry[1], init)[2]


def binomial(key: Tensor, n: Tensor, p: Tensor) -> Tensor:
    """Draw from binomial distributions; `n` and `p` have the same shape and dtype."""
    below_half = p < 0.5
    q = torch.where(below_half, p, 1 - p)  # of the rarer outcome
    no_count, no_probability = ~(n >= 0), ~(q >= 0)
    q = torch.where(no_probability, 0.01, q)
    small = no_count | (n * q <= 10)
    unbounded = n.isinf()
    n = torch.floor(n)
    few = _by_gaps(key, torch.where(small, n, -1.0), q)
    large, half = torch.where(small | unbounded, 1e4, n), torch.where(small | unbounded, 0.5, q)
    many = _by_rejection_of_binomial(key, large, half)
    count = torch.where(small, few, many)
    count = torch.where(below_half, count, n - count)
    count = torch.where(unbounded, torch.inf, count)
    return torch.where(no_count | no_probability, torch.nan, count)


def _by_gaps(key: Tensor, n: Tensor, p: Tensor) -> Tensor:
    """Count successes, whose distances are geometric numbers, until the sum is above `n`."""
    shape, log_failure = tuple(n.shape), torch.log1p(-p)

    def step(carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        key, count, total = carry
        uniform_key, key = split(key).unbind()
        count = torch.where(total <= n, count + 1, count)
        u = unit(uniform_key, shape, p.dtype)
        return key, count, total + torch.ceil(torch.log(u) / log_failure)

    init: tuple[Tensor, ...] = (key, torch.zeros_like(p), torch.zeros_like(p))
    return until_done(step, lambda carry: ~(carry[2] <= n), init)[1] - 1


def _by_rejection_of_binomial(key: Tensor, n: Tensor, p: Tensor) -> Tensor:
    """Draw by transformed rejection, for means from 10 on and p up to a half."""
    deviation = torch.sqrt(n * p * (1 - p))
    b = 1.15 + 2.53 * deviation
    a = -0.0873 + 0.0248 * b + 0.01 * p
    alpha = (2.83 + 5.1 / b) * deviation
    squeeze = 0.92 - 4.2 / b
    mode = torch.floor((n + 1) * p)
    log_odds = torch.log(p.double()) - torch.log1p(-p.double())

    def log_coefficient(k: Tensor) -> Tensor:
        return -torch.lgamma(k.double() + 1) - torch.lgamma((n - k).double() + 1)

    def propose(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        inside = 0.5 - u.abs()
        k = torch.floor((2 * a / inside + b) * u + (n * p + 0.5))
        log_v = torch.log((v * alpha / (a / (inside * inside) + b)).double())
        log_ratio = log_coefficient(k) - log_coefficient(mode) + (k - mode) * log_odds
        outside = (k < 0) | (k > n)
        at_once = (inside >= 0.07) & (v <= squeeze)
        return k, at_once | (~outside & (log_v <= log_ratio))

    return _until_accepted(key, propose, n)
