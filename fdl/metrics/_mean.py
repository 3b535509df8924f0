"""The mean of values."""

from __future__ import annotations

from torch import Tensor

from fdl._masks import weighted_sums
from fdl.metrics._checks import check_real, check_weights
from fdl.metrics._sums import Mean


def mean(values: Tensor, weights: Tensor | None = None) -> Mean:
    """Average over the first axis, by `weights` `[batch]`: a bool mask or numbers.

    Args:
        values: `[batch, ...]`; further axes are averaged as well.
        weights: `[batch]`, the weight of each example; if None, all are 1. A value of weight 0 may
            be anything, even NaN.

    Raises:
        ValueError: `weights` does not have the shape `[batch]`.

    >>> import torch
    >>> mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False])).value
    tensor(1.5000, dtype=torch.float64)
    """
    check_real("metrics.mean", values=values)
    if weights is not None:
        check_weights("metrics.mean", values, weights)
    return Mean(*weighted_sums(values, weights))
