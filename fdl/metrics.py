"""Metrics as running means, exact for batches of unequal size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl._kinds import register
from fdl._masks import weighted_sums

__all__ = ["Mean", "accuracy", "mean"]


@register
class Mean(NamedTuple):
    """A mean stored as a sum and a count: `+` merges two means, `.value` divides.

    Merge means that `scan` has stacked with `.sum()`.

    >>> a, b = mean(torch.tensor([1.0, 2.0, 3.0])), mean(torch.tensor([10.0]))
    >>> (a + b).value, sum([a, b]).value
    (tensor(4., dtype=torch.float64), tensor(4., dtype=torch.float64))
    """

    total: Tensor  # float64 []
    count: Tensor  # type: ignore[assignment]  # float64 [], the sum of the weights

    @property
    def value(self) -> Tensor:
        """The mean; NaN if the count is 0."""
        return self.total / self.count

    def __add__(self, other: Any) -> Mean:  # merges, where a tuple would concatenate
        return Mean(self.total + other.total, self.count + other.count)

    def __radd__(self, other: Any) -> Mean:  # the built-in `sum` starts with 0
        return self if other == 0 else NotImplemented

    def sum(self) -> Mean:
        """Merge means along the first axis, along which `scan` stacks them."""
        return Mean(self.total.sum(0), self.count.sum(0))


def mean(values: Tensor, weights: Tensor | None = None) -> Mean:
    """Average over the first axis, by `weights` `[batch]`: a bool mask or numbers.

    Args:
        values: `[batch, ...]`; further axes are averaged as well.
        weights: `[batch]`, the weight of each example; if None, all are 1. A value of weight 0 may
            be anything, even NaN.

    Raises:
        ValueError: `weights` does not have the shape `[batch]`.

    >>> mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False])).value
    tensor(1.5000, dtype=torch.float64)
    """
    if weights is not None:
        check_weights("metrics.mean", values, weights)
    return Mean(*weighted_sums(values, weights))


def check_weights(caller: str, values: Tensor, weights: Tensor) -> None:
    """Raise unless `weights` is `[batch]` for values `[batch, ...]`.

    >>> check_weights("loss", torch.zeros(3, 2), torch.ones(3))
    """
    if weights.shape != values.shape[:1]:
        raise ValueError(
            f"{caller}: weights must have the shape {list(values.shape[:1])}, one number per "
            f"example, got {list(weights.shape)}"
        )


def check_labels(caller: str, logits: Tensor, labels: Tensor) -> None:
    """Raise unless `labels` is `[batch]` for logits `[batch, classes]`: nothing is broadcast.

    >>> check_labels("accuracy", torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{caller}: expected logits [batch, classes] and labels [batch], got "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )


def accuracy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Mean:
    """Return the fraction of rows whose largest logit is the label's; a row with a NaN is wrong.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`, of any integer dtype.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.

    Raises:
        ValueError: the shapes do not fit.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).value
    tensor(0.5000, dtype=torch.float64)
    """
    check_labels("accuracy", logits, labels)
    has_nan = torch.amax(logits, -1).isnan()  # amax returns NaN if there is one
    return mean((logits.argmax(-1) == labels) & ~has_nan, weights)
