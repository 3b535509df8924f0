"""Losses of real predictions, and the penalty on parameters."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fdl import tree
from fdl._checks import check_number
from fdl._numerics import at_least_32_bits
from fdl.losses._mean import check_same_shape, mean_of, wide
from fdl.tree import Tree
from fdl.tree._checks import check_tensors


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
    check_same_shape("squared_loss", prediction=prediction, target=target)
    dtype = torch.promote_types(prediction.dtype, target.dtype)
    return (_error(prediction, target) ** 2 / 2).to(dtype)


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
    check_same_shape("mse", prediction=prediction, target=target)
    return mean_of("mse", lambda x, y: _error(x, y) ** 2, (prediction, target), weights)


def l1(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average |ŷ − y| over all elements; equals `torch.nn.functional.l1_loss`.

    Args:
        prediction: `[batch, ...]`.
        target: the same shape; nothing is broadcast.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.

    Raises:
        ValueError: the shapes differ.

    >>> l1(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
    tensor(2.)
    """
    check_same_shape("l1", prediction=prediction, target=target)
    return mean_of("l1", lambda x, y: _error(x, y).abs(), (prediction, target), weights)


def huber(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, *, delta: float = 1.0
) -> Tensor:
    """Average ½ e² where |e| ≤ δ and δ (|e| − ½ δ) elsewhere, with e = ŷ − y.

    Equals `torch.nn.functional.huber_loss`. The derivative is e, clipped to [−δ, δ].

    Args:
        prediction: `[batch, ...]`.
        target: the same shape; nothing is broadcast.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        delta: δ, positive.

    Raises:
        ValueError: the shapes differ, or δ is not positive.

    Source: Huber, Robust Estimation of a Location Parameter, 1964

    >>> huber(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
    tensor(1.5000)
    """
    check_same_shape("huber", prediction=prediction, target=target)
    check_number("huber", "delta", delta, "positive", lambda x: x > 0)
    return mean_of("huber", lambda x, y: _huber(_error(x, y), delta), (prediction, target), weights)


def smooth_l1(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, *, beta: float = 1.0
) -> Tensor:
    """Average ½ e² / β where |e| ≤ β and |e| − ½ β elsewhere, with e = ŷ − y.

    Equals `torch.nn.functional.smooth_l1_loss`; with β = 0 it is `l1`.

    Args:
        prediction: `[batch, ...]`.
        target: the same shape; nothing is broadcast.
        weights: `[batch]`, a bool mask or numbers; if None, all are 1.
        beta: β, at least 0.

    Raises:
        ValueError: the shapes differ, or β is negative.

    Source: Girshick, Fast R-CNN, 2015, https://arxiv.org/abs/1504.08083

    >>> smooth_l1(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]), beta=2.0)
    tensor(1.1250)
    """
    check_same_shape("smooth_l1", prediction=prediction, target=target)
    check_number("smooth_l1", "beta", beta, "at least 0", lambda x: x >= 0)

    def losses(prediction: Tensor, target: Tensor) -> Tensor:
        error = _error(prediction, target)
        return _huber(error, beta) / beta if beta else error.abs()

    return mean_of("smooth_l1", losses, (prediction, target), weights)


def l2_penalty(params: Tree) -> Tensor:
    """Return ½ Σ w² over all leaves; λ times it adds λ w to the gradient, as `weight_decay=λ` does.

    Raises:
        ValueError: `params` has no leaves.

    >>> l2_penalty({"w": torch.tensor([3.0, 4.0])})
    tensor(12.5000)
    """
    leaves = tree.leaves(params)
    check_tensors(leaves, params, "l2_penalty: every leaf of params")
    if not leaves:
        raise ValueError("l2_penalty: params has no leaves")
    squares = torch.stack([(leaf.to(at_least_32_bits(leaf)) ** 2).sum() for leaf in leaves])
    dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
    return (squares.sum() / 2).to(dtype)


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    """Subtract in at least 32 bits: 300² overflows float16, the mean need not."""
    return wide(prediction) - target


def _huber(error: Tensor, delta: float) -> Tensor:
    """Return Huber's loss of each error, without |e|, whose second derivative at 0 is wrong."""
    clipped = error.clamp(-delta, delta)
    return clipped * (error - clipped / 2)
