"""Optimizers: chains of transformations that give the numbers of `torch.optim`."""

from fdl.optim.base import Optimizer, Rate, chain, check_rate, is_zero
from fdl.optim.transforms import add_decayed_weights, scale, scale_by_learning_rate, trace

__all__ = ["sgd"]


def sgd(
    lr: Rate = 1e-3,
    momentum: Rate = 0.0,
    dampening: Rate = 0.0,
    weight_decay: Rate = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Stochastic gradient descent; equals `torch.optim.SGD` in every combination.

    g ← ±g + weight_decay · w; m ← momentum · m + (1 − dampening) · g; w ← w − lr · m. A rate may
    be a number, a 0-d tensor or a schedule, and is a float64 0-d tensor in the state; one given as
    the number 0 leaves out what it would scale.

    Args:
        lr: the learning rate.
        momentum: how much of the last step is kept.
        dampening: how much less of the new gradient enters the momentum.
        weight_decay: λ of the penalty λ · ½ Σ w²; for some parameters only, chain
            `add_decayed_weights` with a mask.
        nesterov: look ahead along the momentum; needs momentum and no dampening.
        maximize: climb instead.

    Raises:
        ValueError: a number that is negative or not finite, or `nesterov` without momentum or with
            dampening.

    >>> import torch
    >>> opt, params = sgd(lr=0.1, momentum=0.9), {"w": torch.tensor([1.0])}
    >>> updates, state = opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)
    >>> updates
    {'w': tensor([-0.2000])}
    """
    for name, rate in [("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)]:
        check_rate("sgd", name, rate)
    check_rate("sgd", "dampening", dampening)
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise ValueError(
            "sgd: nesterov needs a momentum and zero dampening, got "
            f"momentum={momentum}, dampening={dampening}"
        )
    parts = []
    if maximize:
        parts.append(scale(-1.0))
    if not is_zero(weight_decay):
        parts.append(add_decayed_weights(weight_decay))
    if not is_zero(momentum):
        parts.append(trace(momentum, dampening, nesterov))
    return chain(*parts, scale_by_learning_rate(lr))
