"""Checks of the arguments of `fdl.random`.

They read structure, shape, dtype and Python numbers, never values of tensors, since they are
traced.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from fdl.random._threefry import FLOATS, INT64, INTEGERS, MASK


def describe(x: object) -> str:
    """Describe an argument, for an error message."""
    if isinstance(x, Tensor):
        return f"a tensor, {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
    return f"{x!r} ({type(x).__name__})"


def check_key(caller: str, key: Tensor) -> None:
    """Raise unless `key` is a key, and name the likely mistake."""
    expected = f"{caller}: `key` expected a key, an int64 tensor of shape (2,), got {describe(key)}"
    if isinstance(key, int):
        raise TypeError(f"{expected}; make a key from a seed with random.key({key})")
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        raise TypeError(f"{expected}; make one with random.key(seed)")
    if key.shape != (2,):
        hint = "use torch.vmap to draw with a batch of keys" if key.ndim > 1 else "see random.key"
        raise ValueError(f"{expected}; {hint}")


def check_count(caller: str, name: str, n: int) -> None:
    """Raise unless `n` is a non-negative int."""
    if not isinstance(n, int):
        raise TypeError(f"{caller}: `{name}` expected a non-negative int, got {describe(n)}")
    if n < 0:
        raise ValueError(f"{caller}: `{name}` must not be negative, got {n}")


def check_shape(caller: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Raise unless `shape` is a shape; return it as a tuple."""
    if not isinstance(shape, tuple | list):
        raise TypeError(
            f"{caller}: `shape` expected a tuple of ints, got {describe(shape)}; "
            "a vector of n is shape=(n,)"
        )
    if any(size < 0 for size in shape):
        raise ValueError(f"{caller}: `shape` must not have negative sizes, got {tuple(shape)}")
    return tuple(shape)


def check_dtype(
    caller: str, dtype: torch.dtype, allowed: Container[torch.dtype], name: str = "dtype"
) -> None:
    """Raise unless `dtype` is one of `allowed`."""
    if dtype not in allowed:
        kinds = "int64, int32, int16, int8 or uint8"
        if allowed is FLOATS:
            kinds = "float32, float64, float16 or bfloat16"
        raise TypeError(f"{caller}: `{name}` expected {kinds}, got {dtype!r}")


def check_broadcast(caller: str, name: str, value: object, shape: tuple[int, ...]) -> None:
    """Raise if `value` is a tensor that does not broadcast to exactly `shape`."""
    if not isinstance(value, Tensor):
        return
    sizes = tuple(value.shape)
    padded = (1,) * (len(shape) - len(sizes)) + sizes
    if len(padded) != len(shape) or any(
        mine not in (1, theirs) for mine, theirs in zip(padded, shape, strict=True)
    ):
        raise ValueError(
            f"{caller}: `{name}` of shape {sizes} does not broadcast to shape={shape}; "
            "pass a shape that ends in the parameter's"
        )


def check_bounds(caller: str, shape: tuple[int, ...], **bounds: float | Tensor) -> None:
    """Raise unless a lower and an upper bound are numbers or tensors, in order, and broadcast."""
    for name, bound in bounds.items():
        if not isinstance(bound, int | float | Tensor):
            raise TypeError(
                f"{caller}: `{name}` expected a number or a tensor, got {describe(bound)}"
            )
        check_broadcast(caller, name, bound, shape)
    (low_name, low), (high_name, high) = bounds.items()
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ValueError(
            f"{caller}: `{low_name}` must be below `{high_name}`, got {low!r} and {high!r}"
        )


def inclusive_bound(
    name: str, value: int | Tensor, excess: int, dtype: torch.dtype
) -> int | Tensor:
    """Check a bound of `randint`, subtract `excess` from it, and return the result.

    An int outside the range of `dtype` raises, a tensor is clipped.
    """
    least, most = torch.iinfo(dtype).min + excess, torch.iinfo(dtype).max + excess
    if isinstance(value, Tensor):
        if value.dtype not in INTEGERS:
            raise TypeError(f"randint: `{name}` expected an integer dtype, got {describe(value)}")
        return value.to(torch.int64).clamp(least, min(most, INT64.max)) - excess
    if not isinstance(value, int):
        raise TypeError(f"randint: `{name}` expected an int, got {describe(value)}")
    if not least <= value <= most:
        raise ValueError(
            f"randint: `{name}` must be in [{least}, {most}] for {dtype}, got {value}; "
            "choose a wider dtype"
        )
    return value - excess


def folded_word(data: int | Tensor) -> int | Tensor:
    """Check the `data` of `fold_in`, and return it as a 32-bit word."""
    if isinstance(data, Tensor):
        if data.dtype not in INTEGERS:
            raise TypeError(f"fold_in: `data` expected an integer dtype, got {describe(data)}")
        if data.ndim:
            raise ValueError(
                f"fold_in: `data` expected a 0-d tensor, got {describe(data)}; "
                "use torch.vmap to fold in many numbers"
            )
        return data.to(torch.int64) & MASK
    if not isinstance(data, int):
        raise TypeError(f"fold_in: `data` expected an int or a tensor, got {describe(data)}")
    if not 0 <= data <= MASK:
        raise ValueError(f"fold_in: `data` must be in [0, 2**32), got {data}")
    return data


def check_probability(p: float | Tensor) -> None:
    """Raise unless `p` is a probability."""
    if isinstance(p, Tensor):
        check_dtype("bernoulli", p.dtype, FLOATS, "p")
    elif not isinstance(p, int | float):
        raise TypeError(f"bernoulli: `p` expected a number or a tensor, got {describe(p)}")
    elif not 0 <= p <= 1:
        raise ValueError(f"bernoulli: `p` is a probability and must be in [0, 1], got {p}")


def check_axis(caller: str, axis: int, ndim: int) -> int:
    """Raise unless `axis` is an axis of a tensor with `ndim` axes; return it counted from 0."""
    if not isinstance(axis, int):
        raise TypeError(f"{caller}: `axis` expected an int, got {describe(axis)}")
    if not -ndim <= axis < ndim:
        raise ValueError(f"{caller}: `axis` must be in [{-ndim}, {ndim - 1}], got {axis}")
    return axis % ndim


def check_logits(logits: Tensor, axis: int) -> int:
    """Raise unless `logits` has classes along `axis`; return the axis counted from the end."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"categorical: `logits` expected a tensor, got {describe(logits)}")
    check_dtype("categorical", logits.dtype, FLOATS, "logits")
    if logits.ndim:
        axis = check_axis("categorical", axis, logits.ndim) - logits.ndim
    if logits.ndim == 0 or logits.shape[axis] == 0:
        raise ValueError(
            "categorical: `logits` expected one or more classes along `axis`, "
            f"got {describe(logits)}"
        )
    return axis
