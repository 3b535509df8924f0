"""Losses of classifiers and of probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl._checks import check_number, describe
from fdl._numerics import at_least_32_bits, keep
from fdl.losses._mean import check_same_shape, mean_of, product, wide
from fdl.metrics._checks import (
    check_integers,
    check_labels,
    check_real,
    check_values,
    check_weights,
    is_integer,
    pick,
)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Average −log softmax(logits)[label]; equals `torch.nn.functional.cross_entropy`.

    Computed by log-sum-exp, so that large logits neither overflow nor vanish. With smoothing ε the
    target is (1 − ε) on the label plus ε spread evenly over all classes.

    Soft labels are probabilities p: the loss of a row is −Σ p log softmax(logits). A class of
    probability 0 adds 0 to it, even if its logit is −∞.

    Class weights multiply the terms of their classes. As in torch, the mean then divides by
    Σ wᵢ class_weights[labelᵢ], but for soft labels by Σ wᵢ.

    Args:
        logits: `[batch, classes]`.
        labels: class indices `[batch]`, of any integer dtype; any number where the weight is 0,
            such as −100, torch's default `ignore_index`. Or probabilities `[batch, classes]`,
            floating; nothing checks that they add up to 1.
        weights: `[batch]`, a bool mask or numbers; the mean is Σ wᵢ lossᵢ / Σ wᵢ, or 0 if all
            weights are 0. If None, all are 1. (One per example; torch's `weight` is per class.)
        label_smoothing: ε in [0, 1].
        class_weights: `[classes]`; if None, all are 1.
        ignore_index: rows with this label get the weight 0; for class indices.

    Raises:
        ValueError: the shapes do not fit, ε is outside [0, 1], or there is an `ignore_index` for
            soft labels; when run eagerly on the CPU, a label with a weight is not a class.
        TypeError: the labels are neither integers nor probabilities of the shape of the logits.

    >>> cross_entropy(torch.tensor([[0.0, 0.0], [0.0, 1000.0]]), torch.tensor([0, 1]))
    tensor(0.3466)
    >>> cross_entropy(torch.zeros(2, 2), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor(0.6931)
    """
    check_number("cross_entropy", "label_smoothing", label_smoothing, "in [0, 1]", _is_fraction)
    if isinstance(labels, Tensor) and is_integer(labels):
        return _of_labels(
            "cross_entropy",
            lambda logits: F.log_softmax(logits, -1, dtype=at_least_32_bits(logits)),
            *(logits, labels, weights, label_smoothing, class_weights, ignore_index),
        )
    check_real("cross_entropy", logits=logits)
    if not _are_probabilities(labels, logits):
        raise TypeError(
            "cross_entropy: labels must be integers [batch], or probabilities [batch, classes] "
            f"for logits {list(logits.shape)}, got {describe(labels)}"
        )
    if ignore_index is not None:
        raise ValueError(
            "cross_entropy: ignore_index is for labels that are class indices; give the rows of "
            "soft labels to leave out weight 0"
        )
    _check_class_weights("cross_entropy", logits, class_weights)

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        log_p, p = wide(logits, labels).log_softmax(-1), wide(labels, logits)
        if label_smoothing:
            p = (1 - label_smoothing) * p + label_smoothing / logits.shape[1]
        each = -product(p, log_p)
        return (each if class_weights is None else product(class_weights, each)).sum(1)

    return mean_of("cross_entropy", losses, (logits, labels), weights)


def nll(
    log_probs: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Average −log_probs[label]; equals `torch.nn.functional.nll_loss`.

    Args:
        log_probs: `[batch, classes]`, such as `log_softmax(logits, -1)`.
        labels: class indices `[batch]`, of any integer dtype; any number where the weight is 0.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        class_weights: `[classes]`; the mean is Σ wᵢ cᵢ lossᵢ / Σ wᵢ cᵢ, where cᵢ is the weight of
            the label's class. If None, all are 1.
        ignore_index: rows with this label get the weight 0.

    Raises:
        ValueError: the shapes do not fit; when run eagerly on the CPU, a label with a weight is not
            a class.
        TypeError: the labels are not integers.

    >>> nll(torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log(), torch.tensor([0, 1]))
    tensor(0.4581)
    """
    return _of_labels("nll", wide, log_probs, labels, weights, 0.0, class_weights, ignore_index)


def binary_cross_entropy_with_logits(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    pos_weight: Tensor | float | None = None,
) -> Tensor:
    """Average −y log σ(z) − (1 − y) log σ(−z) over all elements.

    Equals `torch.nn.functional.binary_cross_entropy_with_logits`. The logarithms are computed from
    the logits, so that large ones neither overflow nor vanish.

    Args:
        logits: `[batch, ...]`.
        target: the same shape, in [0, 1], of any real dtype or bool; nothing is broadcast.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        pos_weight: factor of the first term, a number or a tensor that broadcasts against the
            logits of one example; if None, 1.

    Raises:
        ValueError: the shapes do not fit; when run eagerly on the CPU without weights, a target
            is outside [0, 1].

    >>> binary_cross_entropy_with_logits(torch.tensor([0.0, 1000.0]), torch.tensor([0, 1]))
    tensor(0.3466)
    """
    caller = "binary_cross_entropy_with_logits"
    check_same_shape(caller, logits=logits, target=target)
    if not isinstance(pos_weight, Tensor | float | int | None):
        raise TypeError(
            f"{caller}: pos_weight must be a number or a tensor, got {describe(pos_weight)}"
        )
    if isinstance(pos_weight, Tensor) and not _fits_example(pos_weight, logits):
        raise ValueError(
            f"{caller}: pos_weight {list(pos_weight.shape)} must broadcast against the logits of "
            f"one example, {list(logits.shape[1:])}; weights are per example"
        )
    if weights is None:  # Rounding may lead a mean of targets slightly out of [0, 1].
        check_values(caller, "in [0, 1]", target, lambda y: (y < -1e-3) | (y > 1 + 1e-3))

    def losses(logits: Tensor, target: Tensor) -> Tensor:
        z, y = wide(logits, target), wide(target, logits)
        positive = y if pos_weight is None else y * pos_weight
        return product(positive, _softplus(-z)) + product(1 - y, _softplus(z))

    return mean_of(caller, losses, (logits, target), weights)


def kl_div(
    log_probs: Tensor, target: Tensor, weights: Tensor | None = None, *, log_target: bool = False
) -> Tensor:
    """Average the Kullback–Leibler divergence Σ p (log p − log q) over the examples.

    Equals `torch.nn.functional.kl_div(..., reduction="batchmean")`. A class of probability p = 0
    adds 0, even if log q is −∞.

    Args:
        log_probs: log q, `[batch, classes, ...]`; all axes but the first are summed.
        target: p, the same shape; nothing is broadcast.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        log_target: True if `target` is log p.

    Raises:
        ValueError: the shapes do not fit; when run eagerly on the CPU without weights, a
            probability is negative.

    >>> q, p = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    >>> kl_div(q.log(), p)
    tensor(0.6931)
    """
    check_same_shape("kl_div", log_probs=log_probs, target=target)
    if log_probs.ndim < 2:
        raise ValueError(
            f"kl_div: log_probs must be [batch, classes, ...], got {list(log_probs.shape)}"
        )
    if weights is None and not log_target:
        check_values("kl_div", "probabilities, at least 0", target, lambda p: p < 0)

    def losses(log_q: Tensor, target: Tensor) -> Tensor:
        log_q, target = wide(log_q, target), wide(target, log_q)
        p = target.exp() if log_target else target
        # With 0 in place of log 0, p log p has no NaN among its derivatives at 0.
        log_p = torch.where(p == 0, 0, target) if log_target else torch.where(p == 0, 1, p).log()
        return product(p, log_p - log_q).flatten(1).sum(1)

    return mean_of("kl_div", losses, (log_probs, target), weights)


def _of_labels(
    caller: str,
    log_probs_of: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    smoothing: float,
    class_weights: Tensor | None,
    ignore_index: int | None,
) -> Tensor:
    """Average −log_probs_of(x)[label], smoothed, with a weight for each class."""
    check_labels(caller, x, labels, "log_probs" if caller == "nll" else "logits")
    check_integers(caller, labels)
    _check_class_weights(caller, x, class_weights)
    if weights is not None:
        check_weights(caller, x, weights)
    labels = labels.long()
    weights = _without_ignored(caller, labels, weights, ignore_index)
    if weights is not None:
        counts = weights != 0
        if weights.is_floating_point():  # see mean_of
            counts = counts | ((labels >= 0) & (labels < x.shape[1]))
        labels = keep(counts, labels)
    shares = None
    if class_weights is not None:
        shares = pick(caller, class_weights.expand(x.shape), labels)

    def losses(x: Tensor) -> Tensor:
        log_p = log_probs_of(x)
        each = -pick(caller, log_p, labels)
        each = each if shares is None else product(shares, each)
        if smoothing:
            spread = log_p if class_weights is None else product(class_weights, log_p)
            each = (1 - smoothing) * each - smoothing * spread.mean(1)
        return each

    return mean_of(caller, losses, (x,), weights, shares)


def _without_ignored(
    caller: str, labels: Tensor, weights: Tensor | None, ignore_index: int | None
) -> Tensor | None:
    """Return the weights, 0 where the label is `ignore_index`."""
    if ignore_index is None:
        return weights
    if not isinstance(ignore_index, int):
        raise TypeError(f"{caller}: ignore_index must be an int, got {describe(ignore_index)}")
    counts = labels != ignore_index
    return counts if weights is None else keep(counts, weights)


def _are_probabilities(labels: Any, logits: Tensor) -> bool:
    """Return whether labels may be probabilities for logits `[batch, classes]`."""
    floating = isinstance(labels, Tensor) and labels.is_floating_point()
    return floating and labels.shape == logits.shape and logits.ndim == 2


def _is_fraction(x: float) -> bool:
    return 0 <= x <= 1


def _check_class_weights(caller: str, logits: Tensor, class_weights: Tensor | None) -> None:
    """Raise unless class weights are None or `[classes]` for logits `[batch, classes]`."""
    if class_weights is None:
        return
    check_real(caller, class_weights=class_weights)
    if class_weights.shape != logits.shape[1:]:
        raise ValueError(
            f"{caller}: class_weights must have the shape {list(logits.shape[1:])}, one number per "
            f"class, got {list(class_weights.shape)}"
        )


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + eˣ), exact in float64; from torch's threshold of 20 on, it would be x."""
    return F.softplus(x, threshold=40)


def _fits_example(x: Tensor, batch: Tensor) -> bool:
    """Return whether `x` broadcasts against each example of a batch, by the sizes of its axes."""
    if x.ndim > batch.ndim or (x.ndim == batch.ndim and batch.ndim and x.shape[0] != 1):
        return False
    sizes = zip(reversed(x.shape), reversed(batch.shape), strict=False)
    return all(size in (1, full) for size, full in sizes)
