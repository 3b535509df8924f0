"""Checks of the arguments of `fdl.random`.

They read structure, shape, dtype and Python numbers, never values of tensors, since they are
traced.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fdl import _checks as checks
from fdl._threefry import MASK
from fdl.random._arithmetic import FLOATS, INT64, INTEGERS

check_key, describe = checks.check_key, checks.describe_value


def check_count(caller: str, name: str, n: int) -> None:
    """Raise unless `n` is a non-negative int."""
    if not isinstance(n, int) or isinstance(n, bool):
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
    caller: str, dtype: torch.dtype, allowed: Collection[torch.dtype], name: str = "dtype"
) -> None:
    """Raise unless `dtype` is one of `allowed`."""
    if not isinstance(dtype, torch.dtype) or dtype not in allowed:
        *others, last = (str(each).removeprefix("torch.") for each in allowed)
        raise TypeError(f"{caller}: `{name}` expected {', '.join(others)} or {last}, got {dtype!r}")


def check_draw(
    caller: str, key: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> tuple[int, ...]:
    """Check the arguments of a draw of floating numbers without parameters; return its shape."""
    check_key(caller, key)
    check_dtype(caller, dtype, FLOATS)
    return check_shape(caller, shape)


def check_broadcast(
    caller: str, shape: tuple[int, ...], sizes: Mapping[str, Sequence[int]]
) -> None:
    """Raise if one of the shapes in `sizes`, by name, does not broadcast to exactly `shape`."""
    for name, own in sizes.items():
        padded = (1,) * (len(shape) - len(own)) + tuple(own)
        if len(padded) != len(shape) or any(
            mine not in (1, theirs) for mine, theirs in zip(padded, shape, strict=True)
        ):
            raise ValueError(
                f"{caller}: `{name}` of shape {tuple(own)} does not broadcast to shape={shape}; "
                "pass a shape that ends in the parameter's"
            )


def common_shape(
    caller: str, shape: Sequence[int] | None, sizes: Mapping[str, Sequence[int]]
) -> tuple[int, ...]:
    """Check that the shapes in `sizes`, by name, broadcast to `shape`; return it.

    For None it is the shape to which they broadcast together.
    """
    if shape is None:
        try:
            return tuple(torch.broadcast_shapes(*sizes.values()))
        except RuntimeError:
            got = " and ".join(f"`{name}` of shape {tuple(own)}" for name, own in sizes.items())
            raise ValueError(f"{caller}: {got} do not broadcast together") from None
    shape = check_shape(caller, shape)
    check_broadcast(caller, shape, sizes)
    return shape


def check_number(caller: str, name: str, value: object) -> None:
    """Raise unless `value` is a real number or tensor."""
    if not isinstance(value, int | float | Tensor):
        raise TypeError(f"{caller}: `{name}` expected a number or a tensor, got {describe(value)}")
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{caller}: `{name}` expected a real dtype, got {describe(value)}")


def check_parameters(
    caller: str, shape: Sequence[int] | None, **parameters: float | Tensor
) -> tuple[int, ...]:
    """Raise unless parameters are numbers or tensors that broadcast to `shape`; return it.

    For None it is the shape to which they broadcast together.
    """
    for name, value in parameters.items():
        check_number(caller, name, value)
    tensors = {name: x.shape for name, x in parameters.items() if isinstance(x, Tensor)}
    return common_shape(caller, shape, tensors)


def check_bounds(
    caller: str, shape: Sequence[int] | None, **bounds: float | Tensor
) -> tuple[int, ...]:
    """Check a lower and an upper bound as `check_parameters` does, and raise if out of order."""
    shape = check_parameters(caller, shape, **bounds)
    (low_name, low), (high_name, high) = bounds.items()
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ValueError(
            f"{caller}: `{low_name}` must be below `{high_name}`, got {low!r} and {high!r}"
        )
    return shape


def check_positive(caller: str, **parameters: float | Tensor) -> None:
    """Raise if a parameter is a number that is not positive and finite."""
    for name, value in parameters.items():
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(f"{caller}: `{name}` must be positive and finite, got {value}")


def check_not_negative(caller: str, name: str, value: float | Tensor) -> None:
    """Raise if `value` is a number that is negative, infinite or NaN."""
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        raise ValueError(f"{caller}: `{name}` must be finite and at least 0, got {value}")


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


def check_probability(caller: str, p: float | Tensor) -> None:
    """Raise if `p` is not a number in [0, 1] or a floating tensor."""
    if isinstance(p, Tensor):
        check_dtype(caller, p.dtype, FLOATS, "p")
    elif not isinstance(p, int | float):
        raise TypeError(f"{caller}: `p` expected a number or a tensor, got {describe(p)}")
    elif not 0 <= p <= 1:
        raise ValueError(f"{caller}: `p` is a probability and must be in [0, 1], got {p}")


def check_axis(caller: str, axis: int, ndim: int) -> int:
    """Raise unless `axis` is an axis of a tensor with `ndim` axes; return it counted from 0."""
    if not isinstance(axis, int):
        raise TypeError(f"{caller}: `axis` expected an int, got {describe(axis)}")
    if not -ndim <= axis < ndim:
        raise ValueError(f"{caller}: `axis` must be in [{-ndim}, {ndim - 1}], got {axis}")
    return axis % ndim


def check_axes(caller: str, name: str, value: Tensor, axes: int) -> None:
    """Raise unless `value` is a floating tensor with at least `axes` axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{caller}: `{name}` expected a tensor, got {describe(value)}")
    check_dtype(caller, value.dtype, FLOATS, name)
    if value.ndim < axes:
        plural = "axis" if axes == 1 else "axes"
        raise ValueError(
            f"{caller}: `{name}` expected at least {axes} {plural}, got {describe(value)}"
        )


def check_population(
    caller: str, a: int | Tensor, axis: int, shape: tuple[int, ...], replace: bool
) -> tuple[int, int]:
    """Raise unless draws of `shape` can be made from `a`; return how many it has and the axis."""
    if isinstance(a, Tensor):
        if a.ndim == 0:
            raise ValueError(
                f"{caller}: `a` expected at least one axis, got a 0-d tensor; "
                "to draw from range(n) pass n as an int"
            )
        axis = check_axis(caller, axis, a.ndim)
        n = a.shape[axis]
    else:
        check_count(caller, "a", a)
        axis, n = check_axis(caller, axis, 1), a
    draws = math.prod(shape)
    if draws and n == 0:
        raise ValueError(f"{caller}: `a` has nothing to draw from, got {describe(a)}")
    if not replace and draws > n:
        raise ValueError(
            f"{caller}: `shape` asks for {draws} draws of {n} without replacement; "
            "draw fewer, or pass replace=True"
        )
    return n, axis


def check_probabilities(caller: str, p: Tensor, n: int) -> None:
    """Raise unless `p` is a floating vector of size `n`."""
    check_axes(caller, "p", p, 1)
    if p.shape != (n,):
        raise ValueError(
            f"{caller}: `p` expected shape ({n},), a probability for each element, "
            f"got {describe(p)}"
        )


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
