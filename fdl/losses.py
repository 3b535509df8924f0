"""Losses as pure functions of predictions and targets."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import tree
from fdl.metrics import check_labels, check_weights
from fdl.tree import Tree

__all__ = ["cross_entropy", "l2_penalty", "mse", "squared_loss"]


def squared_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """½ (ŷ − y)² for each element, so that its derivative is ŷ − y.

    Args:
        prediction: any shape.
        target: the same shape; nothing is broadcast.

    Raises:
        ValueError: the shapes differ.

    >>> squared_loss(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
    tensor([0.5000, 4.5000])
    """
    _check_same_shape("squared_loss", prediction, target)
    return (prediction - target) ** 2 / 2


def mse(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of (ŷ − y)² over all elements; equals `torch.nn.functional.mse_loss`.

    Args:
        prediction: `[batch, ...]`.
        target: the same shape; nothing is broadcast.
        weights: `[batch]`, a bool mask or numbers; 1 if None.

    Raises:
        ValueError: the shapes differ.

    >>> mse(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
    tensor(5.)
    """
    _check_same_shape("mse", prediction, target)
    return weighted_mean((prediction - target) ** 2, weights)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of −log softmax(logits)[label]; `torch.nn.functional.cross_entropy`.

    Computed from logits by log-sum-exp, so that large ones neither overflow nor vanish. With
    smoothing ε the target is (1 − ε) on the label plus ε spread evenly over all classes.

    Args:
        logits: `[batch, classes]`.
        labels: int64 `[batch]`, class indices.
        weights: `[batch]`, a bool mask or numbers; the mean is Σ wᵢ lossᵢ / Σ wᵢ, and 0 if all
            weights are 0. 1 if None. (Per example, where torch's `weight` is per class.)
        label_smoothing: ε in [0, 1].

    Raises:
        ValueError: shapes that do not fit, ε outside [0, 1].
        TypeError: labels that are not int64.

    >>> cross_entropy(torch.tensor([[0.0, 0.0], [0.0, 1000.0]]), torch.tensor([0, 1]))
    tensor(0.3466)
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")
    if labels.dtype != torch.int64:
        raise TypeError(f"cross_entropy: labels must be int64 class indices, got {labels.dtype}")
    check_labels("cross_entropy", logits, labels)
    log_p = F.log_softmax(logits, -1)
    losses = -log_p.gather(1, labels[:, None])[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(1)
    return weighted_mean(losses, weights)


def l2_penalty(params: Tree) -> Tensor:
    """½ Σ w² over all leaves; λ times this adds λ w to the gradient, as `weight_decay=λ` does.

    Raises:
        ValueError: `params` has no leaves.

    >>> l2_penalty({"w": torch.tensor([3.0, 4.0])})
    tensor(12.5000)
    """
    squares = [(leaf**2).sum() for leaf in tree.leaves(params)]
    if not squares:
        raise ValueError("l2_penalty: params has no leaves")
    return torch.stack(squares).sum() / 2


def weighted_mean(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average `[batch, ...]` in its own dtype by `weights` `[batch]`; 0 if all weights are 0.

    >>> weighted_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor(1.5000)
    """
    if weights is None:
        return losses.mean()
    check_weights("losses", losses, weights)
    per_example = losses.flatten(1).mean(1) if losses.ndim > 1 else losses
    weights = weights.to(losses.dtype)
    total = weights.sum()
    return (weights * per_example).sum() / torch.where(total == 0, 1, total)


def _check_same_shape(caller: str, prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"{caller}: prediction {list(prediction.shape)} and target {list(target.shape)} must "
            "have one shape; nothing is broadcast"
        )
