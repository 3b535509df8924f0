"""Numerics that the whole library shares: norms, masked values, precision of sums, the best value.

Each rule is written once, so that it holds everywhere:

- A norm has derivatives of every order at 0, and neither overflows nor underflows unless its value
  does: use `norm`, `global_norm` and `row_norms`, never `torch.linalg.vector_norm`.
- Masked values are replaced, never multiplied by 0, since 0 · NaN is NaN: use `keep`.
- Sums are computed in at least 32 bits: use `at_least_32_bits`.
- NaN and infinities are never the best: use `best_index` and `best_row`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fdl._modes import is_eager
from fdl.tree import Tree

__all__ = [
    "at_least_32_bits",
    "best_index",
    "best_row",
    "global_norm",
    "is_visible",
    "keep",
    "norm",
    "root",
    "row_norms",
]


def root(x: Tensor) -> Tensor:
    """Return the square root, with derivative 0 at 0, where that of `torch.sqrt` is infinite.

    Otherwise a leaf whose gradient has always been 0 would make the derivative of a whole training
    run NaN.

    >>> torch.func.grad(root)(torch.tensor(0.0)), torch.func.grad(root)(torch.tensor(4.0))
    (tensor(0.), tensor(0.2500))
    """
    if type(x) is not Tensor and has_torch_function_unary(x):
        return handle_torch_function(root, (x,), x)
    is_zero = x <= 0  # False for NaN, so that NaN propagates
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def at_least_32_bits(x: Tensor) -> torch.dtype:
    """Return the dtype in which to compute with `x`: its own, but at least float32.

    >>> at_least_32_bits(torch.ones(1).bfloat16()), at_least_32_bits(torch.ones(1).double())
    (torch.float32, torch.float64)
    """
    return torch.promote_types(x.dtype, torch.float32)


def norm(x: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """Return the Euclidean norm, in at least 32 bits; all its derivatives at 0 are 0.

    The second derivative of `torch.linalg.vector_norm` at 0 is NaN, and its value is up to 0.6 %
    too small for a few million numbers. Squares are added in float64, in which those of float32
    neither overflow nor underflow.

    Args:
        x: floating, any shape.
        dim: the axes to reduce; None means all, `()` none.
        keepdim: if True, keep the reduced axes with size 1.

    >>> norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=1)
    tensor([5., 0.])
    >>> norm(torch.full((4,), 1e30))
    tensor(2.0000e+30)
    """
    return _wide_norm(x, dim, keepdim).to(at_least_32_bits(x))


def global_norm(tree: Tree) -> Tensor:
    """Return the norm over all leaves of a tree together, float64 `[]`; None leaves are ignored.

    As `optax.global_norm`, in float64: of gradients, updates or parameters. All its derivatives at
    0 are 0.

    Args:
        tree: floating tensors of any shapes, or None.

    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor(4.0), "frozen": None})
    tensor(5., dtype=torch.float64)
    """
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]
    if not leaves:
        return torch.zeros((), dtype=torch.float64)
    # Outside of programs, one root for all small leaves takes less time than one for each.
    small = {i for i, leaf in enumerate(leaves) if not _is_large(leaf)} if is_eager() else set()
    sums = [_sum_of_squares(leaf) for i, leaf in enumerate(leaves) if i in small]
    roots = iter(root(torch.stack(sums)).unbind() if sums else ())
    norms = [next(roots) if i in small else _wide_norm(x) for i, x in enumerate(leaves)]
    return norm(torch.stack(norms))


def row_norms(tree: Tree) -> Tensor:
    """Return the norm of each row over all leaves `[rows, ...]` of a tree: float64 `[rows]`.

    >>> row_norms({"w": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([4.0, 0.0])})
    tensor([5., 0.], dtype=torch.float64)
    """
    leaves = pytree.tree_leaves(tree)
    return norm(torch.stack([_wide_norm(leaf, tuple(range(1, leaf.ndim))) for leaf in leaves]), 0)


def _wide_norm(
    x: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False
) -> Tensor:
    axes = (dim,) if isinstance(dim, int) else tuple(range(x.ndim)) if dim is None else dim
    last = tuple(range(x.ndim - len(axes), x.ndim))
    if _is_large(x) and axes and axes == last and is_visible(x):
        quick = _norm_in_blocks(x, len(last))
        if ((quick > 1e-12) & quick.isfinite()).all():  # otherwise squares may have underflowed
            return quick.view(*quick.shape, *[1] * len(axes)) if keepdim else quick
    return root(_sum_of_squares(x, axes, keepdim))


def _is_large(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.numel() > 4096


def _sum_of_squares(
    x: Tensor, axes: tuple[int, ...] | None = None, keepdim: bool = False
) -> Tensor:
    wide = x.double()
    axes = tuple(range(x.ndim)) if axes is None else axes
    return (wide * wide).sum(axes, keepdim=keepdim) if axes else wide * wide


def _norm_in_blocks(x: Tensor, axes: int) -> Tensor:
    """Return the norm over the last axes: blocks of 128 in float32, their sum in float64.

    This is twenty times as fast as float64 throughout, and also accurate to 1e-7.
    """
    flat = x.flatten(x.ndim - axes)
    whole = flat.shape[-1] // 128 * 128
    blocks = torch.linalg.vector_norm(flat[..., :whole].unflatten(-1, (-1, 128)), dim=-1).double()
    rest = torch.linalg.vector_norm(flat[..., whole:], dim=-1).double()
    return ((blocks**2).sum(-1) + rest**2).sqrt()


def is_visible(x: Tensor) -> bool:
    """Return whether Python may read the values of a tensor, and nothing differentiates it.

    If so, a computation that is faster but not right for all values may be chosen by the values.
    False for a tensor on a GPU, since Python would have to wait for it.

    >>> is_visible(torch.ones(1)), torch.vmap(lambda x: torch.tensor(is_visible(x)))(torch.ones(1))
    (True, tensor([False]))
    """
    differentiated = x.requires_grad and torch.is_grad_enabled()
    plain = type(x) is Tensor and x.device.type == "cpu" and not differentiated
    return plain and is_eager() and not torch._C._len_torch_dispatch_stack()


def keep(counts: Tensor, x: Tensor, other: Tensor | float = 0) -> Tensor:
    """Keep the rows of `x` `[batch, ...]` that count, and replace the others by `other`.

    The replaced rows may hold anything, even NaN: they affect neither values nor derivatives.

    Args:
        counts: `[batch]`, bool, or numbers of which 0 leaves a row out.
        x: `[batch, ...]`.
        other: a number, or a tensor that broadcasts against `x`.

    >>> keep(torch.tensor([True, False]), torch.tensor([[1.0], [torch.nan]]))
    tensor([[1.],
            [0.]])
    """
    counts = counts if counts.dtype is torch.bool else counts != 0
    return torch.where(counts.view(-1, *[1] * (x.ndim - 1)), x, other)


def best_index(values: Sequence[float], mode: Literal["min", "max"] = "min") -> int | None:
    """Return the index of the best finite number, the first of equals; None if none is finite.

    NaN, +inf and -inf never win in either mode: a diverged run may report any of them.

    Args:
        values: Python numbers.
        mode: "min" if the smallest is the best, "max" if the largest is.

    >>> best_index([0.5, float("nan"), 0.2, float("-inf")]), best_index([float("inf")], "max")
    (2, None)
    """
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    choose = min if mode == "min" else max
    return choose(finite, key=lambda i: values[i], default=None)


def best_row(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the smallest finite number, and whether there is one; see `best_index`.

    Args:
        values: floating `[n]`, with n at least 1.

    Returns:
        int64 `[]`, which is 0 if no number is finite, and bool `[]`.

    >>> best_row(torch.tensor([0.5, torch.nan, 0.2, -torch.inf]))
    (tensor(2), tensor(True))
    """
    finite = values.isfinite()
    return torch.where(finite, values, torch.inf).argmin(), finite.any()
