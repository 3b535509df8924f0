"""Indices in a compiled program: checked as eager torch checks them, and before they are used.

Inductor checks an index where it loads from there. So labels that are out of range train silently
where only the derivative is computed and compares them (`_passes.py`); operations that eager torch
refuses negative indices for (`index_select`, `index_add`) count them from the end once they are
written in primitives; and an error in a kernel that several threads run ends the process. Here each
index of an operation passes through `in_range` while the function is traced.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["OUT_OF_RANGE", "checked", "expected", "in_range"]

OUT_OF_RANGE = "index out of range"  # how the message of the error begins


class _Index(NamedTuple):
    """Where an operation takes an index, and what may stand in it: from `low` to below `high`."""

    position: int
    low: int
    high: int
    ignored: int | None = None  # a label that is left out


_Args = Sequence[Any]


def _along(args: _Args) -> Iterator[_Index]:
    """`(x, dim, index, …)`, counted from 0."""
    x, dim = args[:2]
    yield _Index(2, 0, x.shape[dim] if x.ndim else 1)


def _along_from_the_end(args: _Args) -> Iterator[_Index]:
    for index in _along(args):
        yield index._replace(low=-index.high)


def _flat(args: _Args) -> Iterator[_Index]:
    """`(x, index, …)`, into all elements in a row; negative ones count from the end."""
    yield _Index(1, -args[0].numel(), args[0].numel())


def _rows(args: _Args) -> Iterator[_Index]:
    """`(weight, index, …)`."""
    yield _Index(1, 0, args[0].shape[0])


def _rows_of_derivative(args: _Args) -> Iterator[_Index]:
    """`(grad, index, rows, …)`."""
    yield _Index(1, 0, args[2])


def _labels(args: _Args) -> Iterator[_Index]:
    """`(log_p, labels, weight, reduction, ignored)`, with classes along axis 1, or the only one."""
    yield _Index(1, 0, args[0].shape[1 if args[0].ndim > 1 else 0], args[4])


def _labels_of_derivative(args: _Args) -> Iterator[_Index]:
    """`(grad, log_p, labels, weight, reduction, ignored, …)`."""
    for index in _labels(args[1:]):
        yield index._replace(position=2)


def _unpooled(args: _Args) -> Iterator[_Index]:
    """`(x, index, sizes, …)`, into all positions of a picture in a row."""
    yield _Index(1, 0, torch.Size(args[2]).numel())


# By the name of the operation; what changes its first argument in place is named with _ behind it.
RULES: dict[str, Callable[[_Args], Iterator[_Index]]] = {
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce"), _along),
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_reduce"), _along),
    "index_fill": _along_from_the_end,
    **dict.fromkeys(("take", "put"), _flat),
    "embedding": _rows,
    "embedding_dense_backward": _rows_of_derivative,
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _labels),
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), _labels_of_derivative),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), _unpooled),
}
LISTS = ("index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put")


def checked(op: Any, args: _Args) -> _Args:
    """Put indices that are known to be in range in the place of those of an operation."""
    if any(isinstance(z, Tensor) and z.is_cuda for z in args):
        return args  # kernels check, and there is no other way to stop
    name = getattr(op, "_opname", "").removesuffix("_")
    new = list(args)
    if name in LISTS:  # `(x, indices, …)`: one for each of the first axes, None for all of it
        sizes = zip(args[1], args[0].shape, strict=False)
        if all(_counts(index) for index in args[1] if index is not None):
            new[1] = [None if z is None else in_range(z, -size, size) for z, size in sizes]
    elif name in RULES:
        for i, low, high, ignored in RULES[name](args):
            if ignored is None or ignored in range(low, high):
                new[i] = in_range(args[i], low, high)
            else:
                left_out = args[i] == ignored
                found = in_range(torch.where(left_out, low, args[i]), low, high)
                new[i] = torch.where(left_out, ignored, found)
    return new


def _counts(index: Tensor) -> bool:
    return index.dtype in (torch.int64, torch.int32)  # a mask does not


@torch.library.custom_op("fdl::in_range", mutates_args=())
def in_range(index: Tensor, low: int, high: int) -> Tensor:
    """Return a copy of `index`; raise unless all of it is from `low` to below `high`."""
    if index.numel() and not (index.min() >= low and index.max() < high):
        raise IndexError(expected(low, high))
    return index.clone()


@in_range.register_fake
def _(index: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(index)


def expected(low: int, high: int) -> str:
    """Say what was expected."""
    return f"{OUT_OF_RANGE}: expected {low} <= index < {high}"
