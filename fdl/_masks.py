"""Masked rows: how the whole library leaves rows of a batch out.

Masked rows are replaced, never multiplied by 0, since 0 · NaN is NaN. They are replaced before
anything is computed from them, since 0 times the derivative at a masked row may be NaN too.
"""

from __future__ import annotations

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._numerics import keep
from fdl.tree import Tree

__all__ = ["fill_masked", "per_row", "weighted_sums"]


def fill_masked(mask: Tensor, x: Tree) -> Tree:
    """Replace masked rows by rows on which any model is as safe as on data.

    They become copies of the first row if it is not masked, as in each batch that `data.batch`
    pads: a model that takes logarithms or divides by norms is as safe on the copy as on the row. If
    the first row is masked, floating leaves are filled with numbers from 1 to 2, whose norm,
    variance and logarithm are not degenerate, and other leaves with 0. (Searching for a row that is
    not masked would take a fifth of a step of softmax regression.)

    Args:
        mask: `[batch]`, bool, or numbers of which 0 leaves a row out.
        x: leaves `[batch, ...]` of any dtype; leaves of another shape are returned unchanged.

    >>> fill_masked(torch.tensor([True, False]), torch.tensor([[3.0], [torch.nan]]))
    tensor([[3.],
            [3.]])
    """
    if not mask.shape[0]:
        return x
    counts = mask != 0

    def fill(leaf: Tensor) -> Tensor:
        if not isinstance(leaf, Tensor) or leaf.shape[:1] != mask.shape:
            return leaf
        return keep(counts, leaf, keep(counts[:1], leaf[:1], _harmless(leaf)))

    return pytree.tree_map(fill, x)


def _harmless(like: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros((), dtype=like.dtype, device=like.device)
    size = like.shape[-1] if like.ndim > 1 else 1
    return torch.linspace(1, 2, size, dtype=like.dtype, device=like.device)


def per_row(values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Average `[batch, ...]` over all axes but the first; the result is `[batch]`, of `dtype`.

    >>> per_row(torch.tensor([[1.0, 3.0], [4.0, 4.0]]))
    tensor([2., 4.], dtype=torch.float64)
    """
    return values.flatten(1).mean(1, dtype=dtype) if values.ndim > 1 else values.to(dtype)


def weighted_sums(
    values: Tensor, weights: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return Σ wᵢ valueᵢ and Σ wᵢ, both `[]`; axes of `values` after the first are averaged.

    A value of weight 0 may be anything, even NaN. The derivative with respect to a floating weight
    is the value if that is finite, also at weight 0.

    Args:
        values: `[batch, ...]`, of any real dtype.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        dtype: dtype of the sums.

    >>> weighted_sums(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    (tensor(1., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    each = per_row(values, dtype)
    if weights is None:
        total = each.sum()
        return total, torch.full_like(total, values.shape[0])
    counts = weights != 0
    if weights.is_floating_point():
        counts = counts | each.isfinite()
    each = keep(counts, each)
    if weights.dtype != torch.bool:
        each = each * weights.to(dtype)
    return each.sum(), weights.sum(dtype=dtype)
