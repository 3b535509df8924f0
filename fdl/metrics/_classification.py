"""Metrics of classifiers."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl._checks import check_positive
from fdl._numerics import keep
from fdl.metrics._checks import check_integers, check_labels, check_weights, not_a_class, pick
from fdl.metrics._mean import mean
from fdl.metrics._sums import CalibrationError, ConfusionMatrix, Mean, PrecisionRecallF1


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
    return mean((logits.argmax(-1) == labels) & ~_has_nan(logits), weights)


def top_k_accuracy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, k: int = 5
) -> Mean:
    """Return the fraction of rows whose label is among the `k` largest logits.

    Of equal logits, those of lower classes are larger, so that `k=1` is `accuracy` and a constant
    prediction is not always right. A row with a NaN is wrong.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`, of any integer dtype; any number where the weight is 0.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        k: from 1 to the number of classes.

    Raises:
        ValueError: the shapes do not fit, or `k` is larger than the number of classes; when run
            eagerly on the CPU, a label with a weight is not a class.
        TypeError: the labels are not integers, or `k` is not an int.

    >>> logits = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    >>> top_k_accuracy(logits, torch.tensor([1, 2]), k=2).value
    tensor(0.5000, dtype=torch.float64)
    """
    check_positive("top_k_accuracy", "k", k)
    labels, _ = _rows("top_k_accuracy", logits, labels, weights)
    classes = logits.shape[1]
    if k > classes:
        raise ValueError(f"top_k_accuracy: k must be at most the {classes} classes, got {k}")
    own = pick("top_k_accuracy", logits, labels)[:, None]
    lower = torch.arange(classes, device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & lower)).sum(1)
    return mean((rank < k) & ~_has_nan(logits), weights)


def confusion_matrix(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None
) -> ConfusionMatrix:
    """Count the rows of each label (row of the matrix) for which each class is predicted (column).

    The predicted class is that of the largest logit, the first of equals. If a row that counts has
    a NaN among its logits, one count in the row of its label is NaN.

    Args:
        logits: `[batch, classes]`. For one logit per row, pass `torch.stack([0 * z, z], 1)`.
        labels: `[batch]`, of any integer dtype; any number where the weight is 0.
        weights: `[batch]`, a bool mask or numbers, which are added; if None, all are 1.

    Raises:
        ValueError: the shapes do not fit; when run eagerly on the CPU, a label with a weight is not
            a class.
        TypeError: the labels are not integers.

    >>> logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    >>> confusion_matrix(logits, torch.tensor([1, 1, 1])).value
    tensor([[0., 0.],
            [1., 2.]], dtype=torch.float64)
    """
    labels, counts = _rows("confusion_matrix", logits, labels, weights)
    classes = logits.shape[1]
    counts = torch.where(_has_nan(logits) & (counts != 0), torch.nan, counts)
    cells = labels * classes + logits.argmax(-1)  # outside unless the label is a class
    flat = _count("confusion_matrix", classes, classes**2, cells, counts)
    return ConfusionMatrix(flat.view(classes, classes))


def precision_recall_f1(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None
) -> PrecisionRecallF1:
    """Count what precision, recall and F1 need: `.value` per class, `.macro` and `.micro` averages.

    The predicted class is that of the largest logit, the first of equals; a row with a NaN has none
    and is wrong.

    Args:
        logits: `[batch, classes]`. For one logit per row, pass `torch.stack([0 * z, z], 1)`.
        labels: `[batch]`, of any integer dtype; any number where the weight is 0.
        weights: `[batch]`, a bool mask or numbers, which are added; if None, all are 1.

    Raises:
        ValueError: the shapes do not fit; when run eagerly on the CPU, a label with a weight is not
            a class.
        TypeError: the labels are not integers.

    Source: van Rijsbergen, Information Retrieval, 1979

    >>> logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    >>> precision, recall, f1 = precision_recall_f1(logits, torch.tensor([1, 1, 0])).value
    >>> precision, recall
    (tensor([0.0000, 0.5000], dtype=torch.float64), tensor([0.0000, 0.5000], dtype=torch.float64))
    """
    labels, counts = _rows("precision_recall_f1", logits, labels, weights)
    classes, chosen = logits.shape[1], logits.argmax(-1)
    counted = keep(~_has_nan(logits), counts)
    pairs = ((labels, keep(chosen == labels, counted)), (chosen, counted), (labels, counts))
    return PrecisionRecallF1(
        *(_count("precision_recall_f1", classes, classes, *pair) for pair in pairs)
    )


def calibration_error(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, bins: int = 15
) -> CalibrationError:
    """Sum confidence and accuracy in equal bins; `.value` is the expected calibration error.

    It is Σ |accuracy − confidence| over the bins, each weighted by its share of the rows. The
    confidence of a row is its largest probability, and bin i is (i / bins, (i + 1) / bins].
    A NaN in a row that counts makes the error NaN.

    Args:
        logits: `[batch, classes]`. For one logit per row, pass `torch.stack([0 * z, z], 1)`.
        labels: `[batch]`, of any integer dtype; any number where the weight is 0.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        bins: number of bins.

    Raises:
        ValueError: the shapes do not fit, or `bins` is less than 1.
        TypeError: the labels are not integers, or `bins` is not an int.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017,
    https://arxiv.org/abs/1706.04599

    >>> logits = torch.tensor([[0.7, 0.3], [0.7, 0.3]]).log()
    >>> calibration_error(logits, torch.tensor([0, 1])).value
    tensor(0.2000, dtype=torch.float64)
    """
    check_positive("calibration_error", "bins", bins)
    labels, counts = _rows("calibration_error", logits, labels, weights)
    logits = keep((counts != 0) | logits.isfinite().all(-1), logits)
    confidence = logits.softmax(-1, dtype=torch.float64).amax(-1)
    edges = torch.arange(1, bins, device=logits.device, dtype=torch.float64) / bins
    index = (confidence[:, None] > edges).sum(1)
    is_right = (logits.argmax(-1) == labels) & ~_has_nan(logits)
    sums = (confidence * counts, keep(is_right, counts), counts)
    return CalibrationError(*(_add_up(bins, index, each) for each in sums))


def _rows(
    caller: str, logits: Tensor, labels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return int64 labels, 0 where a row of weight 0 has no class, and float64 weights."""
    check_labels(caller, logits, labels)
    check_integers(caller, labels)
    labels = labels.long()
    if weights is None:
        return labels, torch.ones_like(labels, dtype=torch.float64)
    check_weights(caller, logits, weights)
    is_class = (labels >= 0) & (labels < logits.shape[1])
    return keep((weights != 0) | is_class, labels), weights.double()


def _has_nan(logits: Tensor) -> Tensor:
    return torch.amax(logits, -1).isnan()  # amax returns NaN if there is one


def _add_up(size: int, index: Tensor, values: Tensor) -> Tensor:
    """Add each value to the place of its index, out of `size`."""
    return values.new_zeros(size).scatter_add(0, index, values)


def _count(caller: str, classes: int, size: int, index: Tensor, counts: Tensor) -> Tensor:
    try:
        return _add_up(size, index, counts)
    except RuntimeError as error:
        raise not_a_class(caller, classes, error) from None
