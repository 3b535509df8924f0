"""Errors of eager torch about dtypes, raised while a function is traced.

Fake implementations and Inductor accept dtypes that the kernels of eager torch refuse: products of
float32 and float64 numbers, `softmax` of integers. So an operation runs once on small tensors of
its shapes if its arguments do not all have one floating dtype.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fdl._compiler._settings import as_written

LARGEST = 2**20  # elements; operations on larger tensors are not tried
ABOUT_DTYPES = re.compile(r"dtype|data ?type|same type|(?:scalar|result) type|not implemented for")

_accepted: set[tuple[Any, ...]] = set()  # operations with the dtypes of their arguments


def check_dtypes(op: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """Raise eager torch's error if an operation on the CPU does not accept dtypes.

    Args:
        op: the operation.
        args: its arguments, which may be fake tensors.
        kwargs: its keyword arguments.
        result: its result, of which the size is read.
    """
    if getattr(op, "namespace", "") != "aten":
        return
    tensors = _tensors(args)
    dtypes = tuple([x.dtype for x in tensors])
    if not dtypes or (len(set(dtypes)) == 1 and _is_inexact(dtypes[0])):
        return
    key = (op, dtypes)
    if key in _accepted or not all(map(_is_small, [*tensors, *_tensors([result])])):
        return
    if not all(x.numel() for x in tensors):  # they have no valid index
        return
    with _disable_current_modes(), as_written(), torch.no_grad():
        real_args, real_kwargs = pytree.tree_map_only(Tensor, _example, (tuple(args), kwargs))
        try:
            op(*real_args, **real_kwargs)
        except (RuntimeError, TypeError) as error:
            if ABOUT_DTYPES.search(str(error)):
                raise
    _accepted.add(key)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for z in args:
        if isinstance(z, Tensor):
            tensors.append(z)
        elif isinstance(z, list | tuple):
            tensors += [x for x in z if isinstance(x, Tensor)]
    return tensors


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_small(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() <= LARGEST


def _example(x: Tensor) -> Tensor:
    """Return a tensor like `x`: 0 is a valid index of everything."""
    return torch.full(x.shape, int(_is_inexact(x.dtype)), dtype=x.dtype)
