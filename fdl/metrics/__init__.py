"""Metrics as sums that merge, exact for batches of unequal size.

Each metric is a function `(logits, labels, weights)` that returns sums over the rows that count:
`+` merges those of two batches, `.sum()` those that `scan` has stacked, and `.value` is the metric.
A row of weight 0 may hold anything, even NaN. `per_batch` makes such a metric of a function of
another library.
"""

from __future__ import annotations

from fdl.metrics._classification import (
    accuracy,
    calibration_error,
    confusion_matrix,
    precision_recall_f1,
    top_k_accuracy,
)
from fdl.metrics._mean import mean
from fdl.metrics._per_batch import per_batch
from fdl.metrics._sums import CalibrationError, ConfusionMatrix, Mean, PrecisionRecallF1

__all__ = [
    "CalibrationError",
    "ConfusionMatrix",
    "Mean",
    "PrecisionRecallF1",
    "accuracy",
    "calibration_error",
    "confusion_matrix",
    "mean",
    "per_batch",
    "precision_recall_f1",
    "top_k_accuracy",
]
