"""Metrics from functions of other libraries that return one number for a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vmap

from fdl._checks import describe
from fdl._masks import fill_masked, weighted_sums
from fdl._numerics import is_visible
from fdl.metrics._checks import check_weights
from fdl.metrics._sums import Mean
from fdl.tree import Tree, flatten_dict


def per_batch(fn: Callable[[Any, Any], Tensor]) -> Callable[..., Mean]:
    """Make a metric of a function `(prediction, labels) -> scalar` that averages over the rows.

    Such are the accuracy, the mean squared error or the Kullback–Leibler divergence of
    torchmetrics.functional, and the losses of torch. The metric is exact over batches of unequal
    size and over padded ones: it calls `fn` for each row, as a batch of one, by `vmap`, and
    averages the rows that count.

    Other functions do not add up: the F1 score of two batches does not follow from those of each,
    nor does an area under a curve, a correlation or the root of a mean. Therefore `fn` is called
    for the whole batch as well, and if that is not the mean over the rows, to half the digits, it
    is an error. Where Python sees no values, in `jit`, under `vmap` and on a GPU, the metric is
    then NaN. Sums that do add up are `metrics.confusion_matrix` and `precision_recall_f1`;
    everything else needs all predictions at once.

    Args:
        fn: a pure function of a prediction `[batch, ...]` and labels `[batch, ...]`, or trees of
            them, that `vmap` can call. Of torchmetrics pass `partial(accuracy, task=...)`, with
            `validate_args=False` if its checks read values.

    Returns:
        A metric `(prediction, labels, weights=None) -> Mean`, as `supervised` takes it.

    Raises:
        TypeError: `fn` is not a function; at call, it returns no floating scalar, or a leaf is not
            a tensor with rows.
        ValueError: at call, `fn` is not a mean over the rows, leaves differ in their number of
            rows, or `weights` is not `[batch]`.

    >>> import torch.nn.functional as F
    >>> mse = per_batch(F.mse_loss)
    >>> mse(torch.tensor([1.0, 2.0, 9.0]), torch.zeros(3), torch.tensor([True, True, False])).value
    tensor(2.5000, dtype=torch.float64)
    >>> per_batch(lambda x, y: F.mse_loss(x, y).sqrt())(torch.tensor([1.0, 2.0]), torch.zeros(2))
    Traceback (most recent call last):
    ValueError: per_batch: <lambda> is not a mean over rows: 1.58114 for the batch, but 1.5 on ...
    """
    if not callable(fn) or isinstance(fn, type):
        raise TypeError(
            f"per_batch: fn must be a function (prediction, labels) -> scalar, got {describe(fn)}"
        )
    name = _name(fn)

    def metric(prediction: Tree, labels: Tree, weights: Tensor | None = None) -> Mean:
        rows = _rows({"prediction": prediction, "labels": labels})
        if weights is not None:
            check_weights("per_batch", rows, weights)
            prediction, labels = fill_masked(weights, (prediction, labels))
        if not rows.shape[0]:
            return Mean(*weighted_sums(rows.new_zeros(0, dtype=torch.float64), weights))
        whole = _scalar(name, fn(prediction, labels))
        try:
            values = vmap(lambda *row: _scalar(name, fn(*_batch_of_one(row))))(prediction, labels)
        except Exception as error:
            error.add_note(
                f"in metrics.per_batch, which calls {name} for each row, as a batch of one, by "
                "vmap: a function cannot do that if it reads values, as to validate its arguments, "
                "or needs several rows"
            )
            raise
        total, count = weighted_sums(values, weights)
        agrees = _agrees(whole, values)
        if is_visible(agrees) and not agrees:
            raise ValueError(
                f"per_batch: {name} is not a mean over rows: {whole.item():g} for the batch, but "
                f"{values.double().mean().item():g} on average for each row, so batches do not add "
                "up; call it once with all predictions, or take metrics.confusion_matrix or "
                "metrics.precision_recall_f1"
            )
        return Mean(torch.where(agrees, total, torch.nan), count)

    return metric


def _agrees(whole: Tensor, values: Tensor) -> Tensor:
    """Return whether a value is the mean of those of the rows, up to rounding."""
    each, whole, rounding = values.double(), whole.double(), torch.finfo(values.dtype).eps ** 0.5
    mean = each.mean()
    close = (whole - mean).abs() <= rounding * each.abs().mean()
    return close | (whole == mean) | (whole.isnan() & mean.isnan())  # infinite, or NaN


def _batch_of_one(row: Tree) -> Tree:
    return pytree.tree_map(lambda leaf: leaf[None], row)


def _rows(trees: Tree) -> Tensor:
    """Return one of the leaves, after checking that all are tensors with as many rows."""
    leaves = flatten_dict(trees)
    shapes = {
        path: list(leaf.shape) if isinstance(leaf, Tensor) else describe(leaf)
        for path, leaf in leaves.items()
    }
    if not leaves or any(not isinstance(x, Tensor) or not x.ndim for x in leaves.values()):
        raise TypeError(f"per_batch: expected tensors [batch, ...], got {shapes}")
    if len({x.shape[0] for x in leaves.values()}) > 1:
        raise ValueError(f"per_batch: expected the same number of rows, got {shapes}")
    return next(iter(leaves.values()))


def _scalar(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor) and not value.ndim and value.is_floating_point():
        return value
    hint = "; metrics.mean takes one value per row" if isinstance(value, Tensor) else ""
    raise TypeError(
        f"per_batch: {name} must return a floating 0-d tensor, got {describe(value)}{hint}"
    )


def _name(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)
