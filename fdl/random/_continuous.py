"""Draws that invert a distribution function: exponential, Gumbel, Laplace, logistic, Cauchy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdl.random import _arithmetic, _checks
from fdl.random._samplers import Key, Shape


def exponential(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the exponential distribution with mean 1, density exp(-x) for x ≥ 0.

    Within 4 units in the last place of JAX 0.5.0 and later (in float64 of XLA's log1p).

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: float32, float64, float16 or bfloat16; the largest draw is 15.9 in float32, 36.0 in
            float64, 6.9 in float16 and 4.9 in bfloat16.

    Returns:
        `dtype` of `shape`, values from 0 on.

    >>> from fdl import random
    >>> random.exponential(random.key(0), (3,))
    tensor([2.9501, 3.8434, 0.4039])
    """
    shape = _checks.check_draw("exponential", key, shape, dtype)
    return -torch.log1p(-_arithmetic.unit(key, shape, dtype)).to(dtype)


def gumbel(
    key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32, mode: str | None = None
) -> Tensor:
    """Draw from the Gumbel distribution, with distribution function exp(-exp(-x)).

    Within 4 units in the last place of the cause, -log(u) or -log1p(-u), of JAX 0.5.0 and later.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: float32, float64, float16 or bfloat16.
        mode: "low", which None means, for one random number per draw, so that the largest draw is
            16 in float32; "high" for two, so that it is 32.

    Returns:
        `dtype` of `shape`.

    >>> from fdl import random
    >>> random.gumbel(random.key(0), (3,))
    tensor([ 2.9234,  3.8326, -0.0969])
    """
    shape = _checks.check_draw("gumbel", key, shape, dtype)
    if mode not in (None, "low", "high"):
        raise ValueError(f"gumbel: `mode` expected 'low', 'high' or None, got {mode!r}")
    if mode != "high":
        return -torch.log(-torch.log(_arithmetic.positive(key, shape, dtype))).to(dtype)
    first, second = _arithmetic.unit(key, (2, *shape), dtype).unbind()
    # Digits beyond those of the first number, where it is small enough to have room for them.
    fine = first + (2.0 ** -_arithmetic.FLOATS[dtype][1] * second + torch.finfo(dtype).tiny)
    u = torch.where(first < 0.5, fine, first)
    return -torch.log(-torch.log1p(-u)).to(dtype)


def laplace(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the Laplace distribution, with density exp(-|x|) / 2.

    Within 4 units in the last place of JAX 0.5.0 and later (in float64 of XLA's log1p).

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        `dtype` of `shape`.

    >>> from fdl import random
    >>> random.laplace(random.key(0), (3,))
    tensor([-2.2570, -3.1503,  0.4086])
    """
    shape = _checks.check_draw("laplace", key, shape, dtype)
    u = _arithmetic.symmetric(key, shape, dtype)
    return (u.sign() * torch.log1p(-u.abs())).to(dtype)


def logistic(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the logistic distribution, with distribution function sigmoid(x).

    Within 2 units in the last place of log(u) of JAX 0.10.2; JAX up to 0.6.2 had no draws below
    -15.9 in float32, and rounded all draws more.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        `dtype` of `shape`.

    >>> from fdl import random
    >>> random.logistic(random.key(0), (3,))
    tensor([ 2.8964,  3.8218, -0.6978])
    """
    shape = _checks.check_draw("logistic", key, shape, dtype)
    u = _arithmetic.positive(key, shape, dtype)
    return (torch.log(u) - torch.log1p(-u)).to(dtype)


def cauchy(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the Cauchy distribution, with density 1 / (π (1 + x²)).

    The angle, atan(x), is within 2 units in the last place of π / 2 of JAX 0.5.0 and later.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        `dtype` of `shape`.

    >>> from fdl import random
    >>> random.cauchy(random.key(0), (3,))
    tensor([ 6.0275, 14.8379, -0.5817])
    """
    shape = _checks.check_draw("cauchy", key, shape, dtype)
    u = _arithmetic.uniform(key, shape, torch.finfo(dtype).eps, 1.0, dtype)
    return torch.tan(math.pi * (u - 0.5)).to(dtype)
