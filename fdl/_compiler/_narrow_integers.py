"""Decompositions of operations that Inductor computes wrongly for integers of 8 bits on the CPU.

The lanes that its vectorized minimum and maximum leave unused hold 0, also where 0 is beyond every
element: the minimum of an image of bytes would be 0. The absolute value of −128 would be 128 if it
is reduced or converted in the same kernel. And `any` of `uint8` would have dtype `bool`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
NARROW = (torch.uint8, torch.int8)


def _abs(x: Tensor) -> Tensor:
    """Leave −128 as it is, as eager torch does."""
    return torch.where(x < 0, -x, x) if x.dtype == torch.int8 else NotImplemented


def _reduce(
    op: Any, of_bool: Any, x: Tensor, dim: Sequence[int] = (), keepdim: bool = False
) -> Tensor:
    """Reduce 8 bits as `int32`, and `bool`, as Inductor's own decomposition does, by `of_bool`."""
    if x.dtype == torch.bool:
        return of_bool(x, dim or None, keepdim)
    if x.dtype not in NARROW:
        return NotImplemented
    return op(x.to(torch.int32), dim, keepdim).to(x.dtype)


def _reduce_along(op: Any, x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    if x.dtype not in NARROW:
        return NotImplemented
    values, indices = op(x.to(torch.int32), dim, keepdim)
    return values.to(x.dtype), indices


def _any(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Return `uint8` for `uint8`, as eager torch does."""
    if x.dtype != torch.uint8:
        return NotImplemented
    return torch.any(x != 0, dim, keepdim).to(torch.uint8)


NARROW_INTEGERS: dict[Any, Callable[..., Any]] = {
    aten.abs.default: _abs,
    aten.amin.default: partial(_reduce, aten.amin.default, torch.all),
    aten.min.default: partial(_reduce, aten.amin.default, torch.all),
    aten.amax.default: partial(_reduce, aten.amax.default, torch.any),
    aten.max.default: partial(_reduce, aten.amax.default, torch.any),
    aten.min.dim: partial(_reduce_along, aten.min.dim),
    aten.max.dim: partial(_reduce_along, aten.max.dim),
    aten.any.default: _any,
    aten.any.dim: _any,
    aten.any.dims: _any,
}
