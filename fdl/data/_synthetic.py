"""Synthetic data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdl import random
from fdl._checks import check_at_least_0, check_key, check_positive, describe
from fdl.data._types import Dataset


def synthetic_linear(
    key: random.Key, w: Tensor | Sequence[float], b: Tensor | float, n: int, noise: float
) -> Dataset:
    """Draw examples of a linear model with Gaussian features: y = x·w + b + noise·ε.

    The entries of x and ε are independent N(0, 1).

    Args:
        key: a key; the examples are on its device.
        w: the weights, [in]. A floating tensor determines the dtype, anything else gives float32.
        b: the offset, one number.
        n: number of examples, at least 1.
        noise: standard deviation of the noise in units of y, at least 0.

    Returns:
        `x` [n, in] and `y` [n, 1], the shape of the output of a linear layer.

    Raises:
        TypeError: `n` is not an int.
        ValueError: `w` is not a vector, `b` is not one number, `n` < 1, or `noise` is negative.

    >>> x, y = synthetic_linear(random.key(0), [2.0, -3.4], 4.2, n=1000, noise=0.0)
    >>> x.shape, y.shape
    (torch.Size([1000, 2]), torch.Size([1000, 1]))
    >>> torch.allclose(y, x @ torch.tensor([[2.0], [-3.4]]) + 4.2, atol=1e-5)
    True
    """
    check_positive("synthetic_linear", "n", n)
    check_key("synthetic_linear", key)
    check_at_least_0("synthetic_linear", noise=noise)
    dtype = w.dtype if isinstance(w, Tensor) and w.is_floating_point() else torch.float32
    weight = _as_tensor("w", w, dtype, key.device)
    if weight.ndim != 1:
        raise ValueError(
            f"synthetic_linear: w must have shape [in], got {list(weight.shape)}; "
            "flatten it (there is one output)"
        )
    offset = _as_tensor("b", b, dtype, key.device)
    if offset.numel() != 1:
        raise ValueError(f"synthetic_linear: b must be one number, got {list(offset.shape)}")
    key_x, key_noise = random.split(key)
    x = random.normal(key_x, (n, weight.shape[0]), dtype)
    error = random.normal(key_noise, (n,), dtype)
    return Dataset(x, (x @ weight + offset + noise * error).unsqueeze(-1))


def _as_tensor(name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"synthetic_linear: {name} must be a tensor or numbers, got {describe(value)}"
        ) from None
