"""Decompositions of operations whose shape in eager torch depends on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """Count in `minlength` bins; `_indices.py` checks that no number needs another one."""
    if minlength == 0 or x.ndim != 1 or x.is_floating_point() or x.dtype == torch.bool:
        return NotImplemented
    if weights is None:
        weights = torch.ones_like(x, dtype=torch.int64)
    elif weights.dtype != torch.float32:
        weights = weights.to(torch.float64)
    bins = torch.zeros(minlength, dtype=weights.dtype, device=x.device)
    return bins.index_add(0, x.to(torch.int64), weights)


def lstsq(
    a: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve by the singular values, which equals each of torch's drivers to rounding.

    Residuals that torch leaves out since a matrix has not full rank are NaN.
    """
    driver = driver or ("gels" if a.is_cuda else "gelsy")
    m, n = a.shape[-2:]
    rcond = torch.finfo(a.dtype).eps * max(m, n) if rcond is None else rcond
    is_vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    right = b.unsqueeze(-1) if is_vector else b
    left, singular, basis = torch.linalg.svd(a, full_matrices=False)
    kept = singular > rcond * singular[..., :1]
    inverse = torch.where(kept, torch.where(kept, singular, 1.0).reciprocal(), 0.0)
    solution = basis.mH @ (inverse.unsqueeze(-1) * (left.mH @ right))
    rank = kept.sum(-1)
    residuals = (right - a @ solution).abs().square().sum(-2)
    if driver != "gels":
        residuals = torch.where((rank == n).unsqueeze(-1), residuals, torch.nan)
    return (
        solution.squeeze(-1) if is_vector else solution,
        residuals if m > n and driver != "gelsy" else residuals.new_zeros(0),
        rank.new_zeros(0) if driver == "gels" else rank,
        singular if driver in ("gelsd", "gelss") else singular.new_zeros(0),
    )


FIXED_SHAPES: dict[Any, Callable[..., Any]] = {
    aten.bincount.default: bincount,
    aten.linalg_lstsq.default: lstsq,
}
