"""Divisors of integers in a compiled program: 0 is an error, as in eager torch.

A kernel that divides by 0 would stop the process. Therefore each divisor passes through `nonzero`
while the function is traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DIVISIONS = ("floor_divide", "remainder", "fmod", "div")
BY_ZERO = "ZeroDivisionError: a divisor of integers is 0"  # the type is that of eager torch


@torch.library.custom_op("fdl::nonzero", mutates_args=())
def nonzero(divisor: Tensor) -> Tensor:
    """Return a copy of `divisor`; raise if an element is 0."""
    if not is_nonzero(divisor):
        raise RuntimeError(BY_ZERO)
    return divisor.clone()


@nonzero.register_fake
def _(divisor: Tensor) -> Tensor:
    return torch.empty_like(divisor)


NONZERO = nonzero._opoverload


def is_nonzero(divisor: Tensor) -> bool:
    """Check all elements of a divisor."""
    return bool(divisor.all())


def check_divisor(op: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Replace the divisor among the arguments of a division of integers by a checked one."""
    name = getattr(op, "_opname", "").removesuffix("_")
    if name not in DIVISIONS or (name == "div" and "mode" not in op._overloadname):
        return args
    x, divisor, *rest = args
    dtype = torch.result_type(x, divisor)
    if dtype.is_floating_point or dtype.is_complex:
        return args
    if any(isinstance(z, Tensor) and z.is_cuda for z in args):
        return args  # there a division by 0 has some result
    if isinstance(divisor, Tensor):
        return x, nonzero(divisor), *rest
    if divisor == 0:
        raise RuntimeError(BY_ZERO)
    return args
