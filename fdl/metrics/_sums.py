"""What metrics return: sums over rows, which merge whatever the batches were."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl._kinds import register


@register
class Mean(NamedTuple):
    """A mean stored as a sum and a count: `+` merges two means, `.value` divides.

    Merge means that `scan` has stacked with `.sum()`.

    >>> from fdl.metrics import mean
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


@register
class ConfusionMatrix(NamedTuple):
    """How often each class is predicted for each label: `+` and `.sum()` merge, as for `Mean`.

    >>> from fdl.metrics import confusion_matrix
    >>> one = confusion_matrix(torch.tensor([[2.0, 1.0]]), torch.tensor([1]))
    >>> (one + one).value
    tensor([[0., 0.],
            [2., 0.]], dtype=torch.float64)
    """

    counts: (
        Tensor  # float64 [classes, classes], sums of weights; rows: labels, columns: predictions
    )

    @property
    def value(self) -> Tensor:
        """The counts, `[classes, classes]`."""
        return self.counts

    def __add__(self, other: Any) -> ConfusionMatrix:
        return ConfusionMatrix(self.counts + other.counts)

    def __radd__(self, other: Any) -> ConfusionMatrix:
        return self if other == 0 else NotImplemented

    def sum(self) -> ConfusionMatrix:
        """Merge matrices along the first axis, along which `scan` stacks them."""
        return ConfusionMatrix(self.counts.sum(0))


@register
class PrecisionRecallF1(NamedTuple):
    """Counts of each class, from which scores follow: `+` and `.sum()` merge, as for `Mean`.

    Scores are triples (precision, recall, F1). A ratio 0/0 of a class is 0.

    >>> from fdl.metrics import precision_recall_f1
    >>> logits, labels = torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 1, 1, 1])
    >>> counts = precision_recall_f1(logits, labels)
    >>> counts.value[0]                       # precision of each class; the third does not occur
    tensor([0.5000, 1.0000, 0.0000], dtype=torch.float64)
    >>> [round(score.item(), 3) for score in counts.macro]
    [0.75, 0.833, 0.733]
    """

    correct: Tensor  # float64 [classes]: rows of the class that are predicted as such
    predicted: Tensor  # float64 [classes]: rows that are predicted to be of the class
    actual: Tensor  # float64 [classes]: rows of the class

    @property
    def value(self) -> tuple[Tensor, Tensor, Tensor]:
        """Precision, recall and F1 of each class."""
        return _scores(*self)

    @property
    def macro(self) -> tuple[Tensor, Tensor, Tensor]:
        """The scores averaged over the classes that occur in labels or predictions; NaN if none."""
        occurs = (self.predicted != 0) | (self.actual != 0)
        precision, recall, f1 = (score.sum(-1) / occurs.sum(-1) for score in self.value)
        return precision, recall, f1

    @property
    def micro(self) -> tuple[Tensor, Tensor, Tensor]:
        """The scores of all classes together; each is the accuracy unless a logit is NaN."""
        correct, predicted, actual = (counts.sum(-1) for counts in self)
        return correct / predicted, correct / actual, 2 * correct / (predicted + actual)

    def __add__(self, other: Any) -> PrecisionRecallF1:
        return PrecisionRecallF1(
            self.correct + other.correct,
            self.predicted + other.predicted,
            self.actual + other.actual,
        )

    def __radd__(self, other: Any) -> PrecisionRecallF1:
        return self if other == 0 else NotImplemented

    def sum(self) -> PrecisionRecallF1:
        """Merge counts along the first axis, along which `scan` stacks them."""
        return PrecisionRecallF1(self.correct.sum(0), self.predicted.sum(0), self.actual.sum(0))


@register
class CalibrationError(NamedTuple):
    """Sums of each bin of confidence: `+` and `.sum()` merge, as for `Mean`.

    `correct / count` against `confidence / count` is the reliability diagram.

    >>> from fdl.metrics import calibration_error
    >>> sums = calibration_error(torch.tensor([[5.0, 0.0]]), torch.tensor([0]), bins=3)
    >>> (sums + sums).count
    tensor([0., 0., 2.], dtype=torch.float64)
    """

    confidence: Tensor  # float64 [bins], the sum of the largest probabilities
    correct: Tensor  # float64 [bins], how many predictions are right
    count: Tensor  # type: ignore[assignment]  # float64 [bins], how many there are

    @property
    def value(self) -> Tensor:
        """The expected calibration error; NaN if the count is 0."""
        return (self.confidence - self.correct).abs().sum(-1) / self.count.sum(-1)

    def __add__(self, other: Any) -> CalibrationError:
        return CalibrationError(
            self.confidence + other.confidence,
            self.correct + other.correct,
            self.count + other.count,
        )

    def __radd__(self, other: Any) -> CalibrationError:
        return self if other == 0 else NotImplemented

    def sum(self) -> CalibrationError:
        """Merge sums along the first axis, along which `scan` stacks them."""
        return CalibrationError(self.confidence.sum(0), self.correct.sum(0), self.count.sum(0))


Sums = Mean | ConfusionMatrix | PrecisionRecallF1 | CalibrationError


def _scores(correct: Tensor, predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pairs = ((correct, predicted), (correct, actual), (2 * correct, predicted + actual))
    precision, recall, f1 = (x / torch.where(n == 0, 1, n) for x, n in pairs)
    return precision, recall, f1
