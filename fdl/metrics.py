"""Metrics as running means that are exact for batches of unequal size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl._kinds import register
from fdl._masks import sums

__all__ = ["Mean", "accuracy", "mean"]


@register
class Mean(NamedTuple):
    """A mean that is still a sum and a count: adding two merges them, `.value` divides.

    Means stacked by `scan` are merged by `.sum()`.

    >>> a, b = mean(torch.tensor([1.0, 2.0, 3.0])), mean(torch.tensor([10.0]))
    >>> (a + b).value, sum([a, b]).value
    (tensor(4., dtype=torch.float64), tensor(4., dtype=torch.float64))
    """

    total: Tensor  # float64 []
    count: Tensor  # type: ignore[assignment]  # float64 [], the weights added up

    @property
    def value(self) -> Tensor:
        """The mean, NaN where nothing was counted."""
        return self.total / self.count

    def __add__(self, other: Any) -> Mean:  # merges, where a tuple would concatenate
        return Mean(self.total + other.total, self.count + other.count)

    def __radd__(self, other: Any) -> Mean:  # what `sum` begins with
        return self if other == 0 else NotImplemented

    def sum(self) -> Mean:
        """Merge the means along the first axis, as `scan` stacks them."""
        return Mean(self.total.sum(0), self.count.sum(0))


def mean(values: Tensor, weights: Tensor | None = None) -> Mean:
    """Average over the first axis, by `weights` `[batch]`: a bool mask or numbers.

    Args:
        values: `[batch, ...]`; further axes are averaged as well.
        weights: `[batch]`, the weight of each example, 1 if None; a value of weight 0 may be
            anything, NaN as well.

    Raises:
        ValueError: `weights` does not have the shape `[batch]`.

    >>> mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False])).value
    tensor(1.5000, dtype=torch.float64)
    """
    if weights is not None:
        check_weights("metrics.mean", values, weights)
    return Mean(*sums(values, weights))


def check_weights(caller: str, values: Tensor, weights: Tensor) -> None:
    """Raise unless `weights` is `[batch]` for values `[batch, ...]`.

    >>> check_weights("loss", torch.zeros(3, 2), torch.ones(3))
    """
    if weights.shape != values.shape[:1]:
        raise ValueError(
            f"{caller}: weights must have the shape {list(values.shape[:1])} of one number per "
            f"example, got {list(weights.shape)}"
        )


def check_labels(caller: str, logits: Tensor, labels: Tensor) -> None:
    """Raise unless `labels` are `[batch]` for logits `[batch, classes]`: nothing is broadcast.

    >>> check_labels("accuracy", torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{caller}: expected logits [batch, classes] and labels [batch], got "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )


def accuracy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Mean:
    """Count how often the largest logit is that of the label; a row with a NaN counts as wrong.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`, of any integer dtype.
        weights: `[batch]`, a bool mask or numbers; 1 if None.

    Raises:
        ValueError: shapes that do not fit.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).value
    tensor(0.5000, dtype=torch.float64)
    """
    check_labels("accuracy", logits, labels)
    unknown = torch.amax(logits, -1).isnan()  # a NaN counts as the largest, for argmax as well
    return mean((logits.argmax(-1) == labels) & ~unknown, weights)
