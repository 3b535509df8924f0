"""Initializers: pure functions `(key, shape, dtype) -> tensor`, the schemes of `torch.nn.init`.

A weight has shape `[out, in, *kernel]`; its fan-in is `in · prod(kernel)` and its fan-out
`out · prod(kernel)`. For a grouped convolution, whose weight is `[out, in / groups, *kernel]`, the
fan-out counts all groups, as in torch. Any function with that signature is an initializer:

>>> def sparse_uniform(key, shape, dtype=torch.float32):
...     w = random.uniform(key, shape, dtype, minval=-10, maxval=10)
...     return torch.where(w.abs() < 5, 0.0, w)
>>> sparse_uniform(random.key(0), (2, 3)).shape
torch.Size([2, 3])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fdl import random
from fdl._checks import as_tuple, check_key, check_number

Initializer = Callable[[Tensor, Sequence[int], torch.dtype], Tensor]
Mode = Literal["fan_in", "fan_out"]

__all__ = [
    "Initializer",
    "constant",
    "kaiming_normal",
    "kaiming_uniform",
    "normal",
    "ones",
    "truncated_normal",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]


def constant(value: float) -> Initializer:
    """Fill with `value`; equals `torch.nn.init.constant_`.

    >>> constant(3)(random.key(0), (2,), torch.float32)
    tensor([3., 3.])
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        check_key("init.constant", key)
        sizes = as_tuple("init.constant", "shape", shape, "a tuple of ints")
        return torch.full(sizes, value, dtype=dtype, device=key.device)

    return init


def zeros(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fill with 0.

    Args:
        key: not used, except that the result is on its device.
        shape: shape of the result.
        dtype: dtype of the result.

    >>> zeros(random.key(0), (2,))
    tensor([0., 0.])
    """
    return constant(0)(key, shape, dtype)


def ones(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fill with 1.

    Args:
        key: not used, except that the result is on its device.
        shape: shape of the result.
        dtype: dtype of the result.

    >>> ones(random.key(0), (2,))
    tensor([1., 1.])
    """
    return constant(1)(key, shape, dtype)


def uniform(low: float = 0.0, high: float = 1.0) -> Initializer:
    """Draw from U[low, high); equals `torch.nn.init.uniform_` in distribution.

    Raises:
        ValueError: `low` is not below `high`.

    >>> w = uniform(-1, 1)(random.key(0), (1000,), torch.float32)
    >>> bool((w.abs() <= 1).all())
    True
    """
    _check_bounds("init.uniform", low, high)
    if not low < high:
        raise ValueError(f"init.uniform: low must be below high, got low={low}, high={high}")

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return random.uniform(key, shape, dtype, minval=low, maxval=high)

    return init


def normal(std: float = 1.0, mean: float = 0.0) -> Initializer:
    """Draw from N(mean, std²); equals `torch.nn.init.normal_` in distribution.

    Raises:
        ValueError: `std` is negative.

    >>> w = normal(0.01)(random.key(0), (1000,), torch.float32)
    >>> bool((w.std() - 0.01).abs() < 0.001)
    True
    """
    _check_std("init.normal", std)

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return mean + std * random.normal(key, shape, dtype)

    return init


def truncated_normal(
    std: float = 1.0, mean: float = 0.0, low: float = -2.0, high: float = 2.0
) -> Initializer:
    """Draw from N(mean, std²) within [low, high]; `torch.nn.init.trunc_normal_` in distribution.

    Args:
        std: the standard deviation before truncation, positive.
        mean: the mean before truncation.
        low: smallest value, not scaled by `std`.
        high: largest value.

    Raises:
        ValueError: `std` is not positive, or `low` is not below `high`.

    >>> w = truncated_normal(std=5.0)(random.key(0), (1000,), torch.float32)
    >>> bool((w.abs() <= 2).all())
    True
    """
    _check_std("init.truncated_normal", std)
    _check_bounds("init.truncated_normal", low, high)
    if not (low < high and std > 0):
        raise ValueError(
            f"init.truncated_normal: needs std > 0 and low < high, got {std=}, {low=}, {high=}"
        )

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        lower, upper = (low - mean) / std, (high - mean) / std
        return mean + std * random.truncated_normal(key, lower, upper, shape, dtype)

    return init


def _check_bounds(caller: str, low: float, high: float) -> None:
    for name, bound in (("low", low), ("high", high)):
        check_number(caller, name, bound, "a number", lambda bound: bound == bound)


def _check_std(caller: str, std: float) -> None:
    check_number(caller, "std", std, "at least 0", lambda std: std >= 0)


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2:
        raise ValueError(
            f"init: fans need a shape [out, in, *kernel], got {list(shape)}; for a bias use "
            "init.uniform, init.normal or init.zeros"
        )
    receptive = math.prod(shape[2:])
    return shape[1] * receptive, shape[0] * receptive


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """Draw from U(−a, a), a = gain·√(6 / (fan_in + fan_out)); `torch.nn.init.xavier_uniform_`.

    Source: Glorot and Bengio, Understanding the difficulty of training deep feedforward neural
    networks, 2010, equation 16.

    >>> w = xavier_uniform()(random.key(0), (30, 20), torch.float32)
    >>> bool(w.abs().max() <= (6 / 50) ** 0.5)
    True
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        bound = gain * math.sqrt(6 / sum(_fans(shape)))
        return random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init


def xavier_normal(gain: float = 1.0) -> Initializer:
    """Draw from N(0, gain²·2 / (fan_in + fan_out)); `torch.nn.init.xavier_normal_`.

    Source: Glorot and Bengio, Understanding the difficulty of training deep feedforward neural
    networks, 2010.

    >>> xavier_normal()(random.key(0), (3, 2), torch.float64).dtype
    torch.float64
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return gain * math.sqrt(2 / sum(_fans(shape))) * random.normal(key, shape, dtype)

    return init


def _kaiming(
    caller: str, a: float, mode: Mode, nonlinearity: str
) -> Callable[[Sequence[int]], float]:
    """Check the arguments; return a function from a shape to a standard deviation."""
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"{caller}: mode must be 'fan_in' or 'fan_out', got {mode!r}")
    gain = torch.nn.init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    return lambda shape: gain / math.sqrt(_fans(shape)[0 if mode == "fan_in" else 1])


def kaiming_uniform(
    a: float = 0.0, mode: Mode = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initializer:
    """Draw from U(−b, b), b = gain·√(3 / fan); equals `torch.nn.init.kaiming_uniform_`.

    The gain is `torch.nn.init.calculate_gain(nonlinearity, a)`; with `a=√5` this is the default of
    `torch.nn.Linear` and `Conv2d`, U(±1/√fan_in).

    Args:
        a: slope of a leaky ReLU below 0.
        mode: `fan_in` preserves the variance of activations, `fan_out` that of gradients.
        nonlinearity: torch's name of the function that follows the layer.

    Raises:
        ValueError: `mode` is neither `fan_in` nor `fan_out`, or torch does not know `nonlinearity`.

    Source: He et al., Delving Deep into Rectifiers, 2015, https://arxiv.org/abs/1502.01852

    >>> w = kaiming_uniform(a=5**0.5)(random.key(0), (30, 25), torch.float32)
    >>> bool(w.abs().max() <= 1 / 5)
    True
    """
    std = _kaiming("init.kaiming_uniform", a, mode, nonlinearity)

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        bound = math.sqrt(3) * std(shape)
        return random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init


def kaiming_normal(
    a: float = 0.0, mode: Mode = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initializer:
    """Draw from N(0, gain² / fan); equals `torch.nn.init.kaiming_normal_` in distribution.

    Args:
        a: slope of a leaky ReLU below 0.
        mode: `fan_in` preserves the variance of activations, `fan_out` that of gradients.
        nonlinearity: torch's name of the function that follows the layer.

    Raises:
        ValueError: `mode` is neither `fan_in` nor `fan_out`, or torch does not know `nonlinearity`.

    Source: He et al., Delving Deep into Rectifiers, 2015, https://arxiv.org/abs/1502.01852

    >>> kaiming_normal(nonlinearity="relu")(random.key(0), (3, 2), torch.float32).shape
    torch.Size([3, 2])
    """
    std = _kaiming("init.kaiming_normal", a, mode, nonlinearity)

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return std(shape) * random.normal(key, shape, dtype)

    return init
