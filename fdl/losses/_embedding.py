"""Losses of embeddings: of distances and angles between vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdl._checks import check_number
from fdl._numerics import norm
from fdl.losses._mean import check_same_shape, mean_of
from fdl.metrics._checks import check_real, check_values


def cosine_embedding(
    first: Tensor,
    second: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    margin: float = 0.0,
) -> Tensor:
    """Average 1 − cos where the target is 1 and max(0, cos − margin) where it is −1.

    Equals `torch.nn.functional.cosine_embedding_loss`. Computed in float64; 1e-12 is added to the
    squared norms, so that a vector of zeros has the cosine 0.

    Args:
        first: `[batch, features]`.
        second: the same shape; nothing is broadcast.
        target: `[batch]`, 1 for pairs that are alike and −1 for others, of any real dtype.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        margin: from −1 to 1.

    Raises:
        ValueError: the shapes do not fit, or `margin` is outside [−1, 1]; when run eagerly on the
            CPU without weights, a target is neither 1 nor −1.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> cosine_embedding(x, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([1, -1]))
    tensor(0.6464)
    """
    check_same_shape("cosine_embedding", first=first, second=second)
    check_real("cosine_embedding", target=target)
    if first.ndim != 2 or target.shape != first.shape[:1]:
        raise ValueError(
            "cosine_embedding: expected first and second [batch, features] and target [batch], got "
            f"{list(first.shape)} and {list(target.shape)}"
        )
    check_number("cosine_embedding", "margin", margin, "in [-1, 1]", lambda x: -1 <= x <= 1)
    if weights is None:
        check_values("cosine_embedding", "1 or -1", target, lambda t: (t != 1) & (t != -1))
    target = target.double()
    alike, apart = (target == 1).double(), (target == -1).double()

    def losses(first: Tensor, second: Tensor) -> Tensor:
        cosine = _cosine(first.double(), second.double())
        return alike * (1 - cosine) + apart * (cosine - margin).clamp(min=0)

    return mean_of("cosine_embedding", losses, (first, second), weights)


def triplet_margin(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    weights: Tensor | None = None,
    *,
    margin: float = 1.0,
    p: float = 2.0,
    swap: bool = False,
) -> Tensor:
    """Average max(0, margin + d(anchor, positive) − d(anchor, negative)).

    Equals `torch.nn.functional.triplet_margin_loss`: d(x, y) is the p-norm of x − y + 1e-6.
    Computed in float64.

    Args:
        anchor: `[batch, ..., features]`.
        positive: the same shape, alike to the anchor; nothing is broadcast.
        negative: the same shape, not alike.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        margin: positive.
        p: degree of the norm, at least 1; `math.inf` is the largest difference.
        swap: if True, take d(positive, negative) instead of d(anchor, negative) where it is
            smaller.

    Raises:
        ValueError: the shapes differ or have fewer than two axes, `margin` is not positive, or `p`
            is less than 1.

    Source: Balntas et al., Learning Shallow Convolutional Feature Descriptors with Triplet Losses,
    2016

    >>> anchor, positive, negative = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.5]]])
    >>> triplet_margin(anchor, positive, negative)
    tensor(1.5000)
    """
    check_same_shape("triplet_margin", anchor=anchor, positive=positive, negative=negative)
    if anchor.ndim < 2:
        raise ValueError(
            f"triplet_margin: anchor must be [batch, ..., features], got {list(anchor.shape)}"
        )
    check_number("triplet_margin", "margin", margin, "positive", lambda x: x > 0)
    check_number("triplet_margin", "p", p, "at least 1", lambda x: x >= 1)

    def losses(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        anchor, positive, negative = anchor.double(), positive.double(), negative.double()
        near, far = _distance(anchor, positive, p), _distance(anchor, negative, p)
        if swap:
            far = torch.minimum(far, _distance(positive, negative, p))
        gap = margin + near - far
        return gap * (gap >= 0)  # NaN if a distance is infinite, since its derivatives are

    return mean_of("triplet_margin", losses, (anchor, positive, negative), weights)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each pair of rows, smooth at 0."""
    lengths = [((z * z).sum(1) + 1e-12).sqrt() for z in (x, y)]
    return (x * y).sum(1) / (lengths[0] * lengths[1])


def _distance(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Return the p-norm of x − y + 1e-6 along the last axis, as torch's `pairwise_distance`."""
    if p == 2:
        return norm(x - y + 1e-6, -1)
    size = (x - y + 1e-6).abs()
    if p == 1:
        return size.sum(-1)
    largest = size.amax(-1)
    if p == math.inf:
        return largest
    # Relative to the largest, no power overflows, and the scale needs no derivative.
    is_zero = largest == 0
    scale = torch.where(is_zero, 1, largest).detach()
    powers = ((size / scale.unsqueeze(-1)) ** p).sum(-1)
    return torch.where(is_zero, 0, scale * torch.where(is_zero, 1, powers) ** (1 / p))
