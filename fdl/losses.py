"""Losses as pure functions of predictions and targets.

A row of weight 0 may hold anything, even NaN: it affects neither the loss nor a gradient. Losses of
16-bit numbers are computed and summed in at least float32, and rounded once, at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import tree
from fdl._masks import per_row, weighted_sums
from fdl._numerics import at_least_32_bits, keep
from fdl.metrics import check_labels, check_weights
from fdl.tree import Tree

__all__ = ["cross_entropy", "l2_penalty", "mse", "squared_loss"]

MANY = 4096  # more numbers than this are summed in float64


def squared_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return ½ (ŷ − y)² for each element; its derivative is ŷ − y.

    Args:
        prediction: any shape.
        target: the same shape; nothing is broadcast.

    Raises:
        ValueError: the shapes differ.

    >>> squared_loss(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
    tensor([0.5000, 4.5000])
    """
    _check_same_shape("squared_loss", prediction, target)
    dtype = torch.promote_types(prediction.dtype, target.dtype)
    return ((prediction.to(at_least_32_bits(prediction)) - target) ** 2 / 2).to(dtype)


def mse(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average (ŷ − y)² over all elements; equals `torch.nn.functional.mse_loss`.

    Args:
        prediction: `[batch, ...]`.
        target: the same shape; nothing is broadcast.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.

    Raises:
        ValueError: the shapes differ.

    >>> mse(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
    tensor(5.)
    """
    _check_same_shape("mse", prediction, target)

    def squares(prediction: Tensor, target: Tensor) -> Tensor:
        wide = at_least_32_bits(prediction)  # 300² overflows float16, the mean need not
        return (prediction.to(wide) - target) ** 2

    return _mean("mse", squares, (prediction, target), weights)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Average −log softmax(logits)[label]; `torch.nn.functional.cross_entropy`.

    Computed by log-sum-exp, so that large logits neither overflow nor vanish. With smoothing ε the
    target is (1 − ε) on the label plus ε spread evenly over all classes.

    Args:
        logits: `[batch, classes]`.
        labels: class indices `[batch]`, of any integer dtype; any number where the weight is 0,
            such as −100, torch's default `ignore_index`.
        weights: `[batch]`, a bool mask or numbers; the mean is Σ wᵢ lossᵢ / Σ wᵢ, or 0 if all
            weights are 0. If None, all are 1. (One per example; torch's `weight` is per class.)
        label_smoothing: ε in [0, 1].

    Raises:
        ValueError: the shapes do not fit, or ε is outside [0, 1]; when run eagerly on the CPU, a
            label with a weight is not a class.
        TypeError: the labels are not integers.

    >>> cross_entropy(torch.tensor([[0.0, 0.0], [0.0, 1000.0]]), torch.tensor([0, 1]))
    tensor(0.3466)
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"cross_entropy: labels must be integers, got {labels.dtype}")
    check_labels("cross_entropy", logits, labels)
    labels, classes = labels.long(), logits.shape[1]
    if weights is not None:
        check_weights("cross_entropy", logits, weights)
        counts = weights != 0
        if weights.is_floating_point():  # see _mean
            counts = counts | ((labels >= 0) & (labels < classes))
        labels = keep(counts, labels)

    def nll(logits: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, -1, dtype=at_least_32_bits(logits))
        try:
            losses = -log_p.gather(1, labels[:, None])[:, 0]
        except RuntimeError as error:
            raise ValueError(
                f"cross_entropy: labels must be from 0 to {classes - 1}, one of {classes} classes; "
                f"give the rows to leave out weight 0 ({error})"
            ) from None
        if label_smoothing:
            losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(1)
        return losses

    return _mean("cross_entropy", nll, (logits,), weights)


def l2_penalty(params: Tree) -> Tensor:
    """Return ½ Σ w² over all leaves; λ times it adds λ w to the gradient, as `weight_decay=λ` does.

    Raises:
        ValueError: `params` has no leaves.

    >>> l2_penalty({"w": torch.tensor([3.0, 4.0])})
    tensor(12.5000)
    """
    leaves = tree.leaves(params)
    if not leaves:
        raise ValueError("l2_penalty: params has no leaves")
    squares = torch.stack([(leaf.to(at_least_32_bits(leaf)) ** 2).sum() for leaf in leaves])
    dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
    return (squares.sum() / 2).to(dtype)


def weighted_mean(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average `[batch, ...]` by `weights` `[batch]`, in the dtype of `losses`; 0 if all are 0.

    A loss of weight 0 may be anything, but its inputs get 0 times its derivative, which may be NaN:
    replace those inputs first, as `mse`, `cross_entropy` and `supervised` do.

    >>> weighted_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor(1.5000)
    """
    wide = at_least_32_bits(losses)
    # A compiled sum in float32 has a single accumulator, too coarse for many numbers.
    dtype = wide if losses.numel() <= MANY else torch.float64
    if weights is None:
        mean = losses.sum(dtype=dtype) / max(losses.numel(), 1)
    else:
        check_weights("losses", losses, weights)
        total, count = weighted_sums(losses, weights, dtype)
        mean = total / torch.where(count == 0, 1, count)
    return mean.to(losses.dtype if losses.is_floating_point() else wide)


def _mean(
    caller: str, f: Callable[..., Tensor], rows: tuple[Tensor, ...], weights: Tensor | None
) -> Tensor:
    """Average `f(*rows)` `[batch, ...]`, in the dtype of `rows`, without rows of weight 0."""
    dtype = torch.promote_types(rows[0].dtype, rows[-1].dtype)
    if weights is not None:
        check_weights(caller, rows[0], weights)
        counts = weights != 0
        if weights.is_floating_point():
            # The derivative with respect to a weight of 0 is its row's loss, if that is finite.
            counts = counts | per_row(f(*rows).detach()).isfinite()
        rows = tuple(keep(counts, row) for row in rows)
    return weighted_mean(f(*rows), weights).to(dtype if dtype.is_floating_point else torch.float32)


def _check_same_shape(caller: str, prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"{caller}: prediction {list(prediction.shape)} and target {list(target.shape)} must "
            "have the same shape; nothing is broadcast"
        )
