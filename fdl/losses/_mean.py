"""Weighted means of losses, and what all losses check."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl._masks import per_row, weighted_sums
from fdl._numerics import at_least_32_bits, keep
from fdl.metrics._checks import check_real, check_weights

MANY = 4096  # more numbers than this are summed in float64


def weighted_mean(
    losses: Tensor, weights: Tensor | None = None, shares: Tensor | None = None
) -> Tensor:
    """Average `[batch, ...]` by `weights` `[batch]`, in the dtype of `losses`; 0 if all are 0.

    A loss of weight 0 may be anything, but its inputs get 0 times its derivative, which may be NaN:
    replace those inputs first, as `mean_of` and `supervised` do.

    Args:
        losses: `[batch, ...]`.
        weights: `[batch]`; if None, all are 1.
        shares: `[batch]`, how much each row adds to the count that the sum is divided by; if None,
            all are 1.

    >>> weighted_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor(1.5000)
    """
    wide = at_least_32_bits(losses)
    # A compiled sum in float32 has a single accumulator, too coarse for many numbers.
    dtype = wide if losses.numel() <= MANY else torch.float64
    if weights is None and shares is None:
        mean = losses.sum(dtype=dtype) / max(losses.numel(), 1)
    else:
        if weights is not None:
            check_weights("losses", losses, weights)
        total, count = weighted_sums(losses, weights, dtype)
        if shares is not None:
            count, _ = weighted_sums(shares, weights, dtype)
        mean = total / torch.where(count == 0, 1, count)
    return mean.to(losses.dtype if losses.is_floating_point() else wide)


def mean_of(
    caller: str,
    f: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    weights: Tensor | None,
    shares: Tensor | None = None,
) -> Tensor:
    """Average `f(*rows)` `[batch, ...]`, in the dtype of `rows`, without rows of weight 0.

    >>> mean_of("loss", torch.log, (torch.tensor([1.0, -1.0]),), torch.tensor([True, False]))
    tensor(0.)
    """
    dtype = _common(rows[0].dtype, *rows[1:])
    if weights is not None:
        check_weights(caller, rows[0], weights)
        counts = weights != 0
        if weights.is_floating_point():
            # The derivative with respect to a weight of 0 is its row's loss, if that is finite.
            counts = counts | per_row(f(*rows).detach()).isfinite()
        rows = tuple(keep(counts, row) for row in rows)
    mean = weighted_mean(f(*rows), weights, shares)
    return mean.to(dtype if dtype.is_floating_point else torch.float32)


def check_same_shape(caller: str, **tensors: Tensor) -> None:
    """Raise unless all arguments are tensors of real numbers of one shape.

    >>> check_same_shape("loss", prediction=torch.zeros(3, 2), target=torch.ones(3, 2))
    """
    check_real(caller, **tensors)
    first, *others = tensors.values()
    for x in others:
        if x.shape != first.shape:
            shapes = [f"{name} {list(each.shape)}" for name, each in tensors.items()]
            raise ValueError(
                f"{caller}: {', '.join(shapes[:-1])} and {shapes[-1]} must have the same shape; "
                "nothing is broadcast"
            )


def wide(x: Tensor, *others: Tensor) -> Tensor:
    """Convert to the dtype in which to compute with `x` and `others`: at least 32 bits.

    >>> wide(torch.ones(1).bfloat16()).dtype, wide(torch.ones(1), torch.ones(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return x.to(_common(at_least_32_bits(x), *others))


def _common(dtype: torch.dtype, *others: Tensor) -> torch.dtype:
    for x in others:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def product(weight: Tensor, value: Tensor) -> Tensor:
    """Multiply, where 0 times an infinity is 0.

    The derivative with respect to a weight of 0 is the value if that is finite, else 0. A NaN stays
    one, so that `mean_of` notices a row whose derivatives are NaN.

    >>> product(torch.tensor([0.0, 0.5]), torch.tensor([-torch.inf, 4.0]))
    tensor([0., 2.])
    """
    return weight * torch.where((weight != 0) | ~value.isinf(), value, 0)
