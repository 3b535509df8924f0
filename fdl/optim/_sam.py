"""Sharpness-aware minimization: `sam`, in place of `torch.func.grad_and_value`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from fdl import tree
from fdl._numerics import global_norm
from fdl.optim._base import upcast
from fdl.optim._foreach import map_leaves
from fdl.optim._hyperparams import known_values
from fdl.tree import Tree


def sam(rho: float | Tensor = 0.05, *, adaptive: bool = False) -> Callable[..., Any]:
    """Make a `grad_fn` that takes gradients where the loss nearby is largest.

    It is not an `Optimizer`: it takes the place of `torch.func.grad_and_value`, with any optimizer:
    `train_step(loss, opt, grad_fn=optim.sam(0.05))`. With g the gradient at w and ‖g‖ its norm over
    all leaves, the new gradient is that at w + ρg/‖g‖, or if adaptive at w + ρw²g/‖|w|g‖; if the
    norm is 0, at w. Value and aux, and so metrics and buffers, are those at w. Both evaluations use
    the same batch and key. Source: Foret et al., Sharpness-Aware Minimization for Efficiently
    Improving Generalization, 2021, https://arxiv.org/abs/2010.01412; adaptive, with η = 0: Kwon et
    al., ASAM, 2021, https://arxiv.org/abs/2102.11600

    Args:
        rho: ρ, the radius: a number, or a 0-d tensor to differentiate with respect to it.
        adaptive: measure the radius relative to the size of each weight; choose ρ about ten times
            as large.

    Returns:
        A function `(f, *, has_aux=False)`, which returns a function of the arguments of f. That one
        returns `(grads, value)`, or `(grads, (value, aux))`, with gradients with respect to the
        first argument.

    Raises:
        ValueError: `rho` is negative, not finite, or a tensor with axes.
        TypeError: `rho` is neither a number nor a tensor.

    >>> grads, value = sam(rho=0.5)(lambda w: (w**2).sum())(torch.tensor([3.0, 4.0]))
    >>> grads, value
    (tensor([6.6000, 8.8000]), tensor(25.))
    """
    if isinstance(rho, Tensor):
        if rho.ndim:
            raise ValueError(
                f"sam: rho must be a number or a 0-d tensor, got {list(rho.shape)}; for a "
                "population, vmap"
            )
    elif not isinstance(rho, (int, float)):
        raise TypeError(
            f"sam: rho must be a number or a 0-d tensor, got {rho!r}; sam has no state to count "
            "steps in, so compute the value of a schedule yourself"
        )
    for value in known_values(rho) if isinstance(rho, Tensor) else [rho]:
        if not 0 <= value < math.inf:
            raise ValueError(f"sam: rho must be finite and at least 0, got {value}")

    def grad_fn(f: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
        differentiate = grad_and_value(f, has_aux=has_aux)

        def twice(params: Tree, *args: Any, **kwargs: Any) -> tuple[Tree, Any]:
            grads, value = differentiate(params, *args, **kwargs)
            perturbed = _ascend(params, grads, rho, adaptive)
            return differentiate(perturbed, *args, **kwargs)[0], value

        return twice

    return grad_fn


def _ascend(params: Tree, grads: Tree, rho: float | Tensor, adaptive: bool) -> Tree:
    """Move by ρ along the gradient, relative to the size of each weight if adaptive."""
    wide, scaled = tree.map(upcast, params), tree.map(upcast, grads)
    if adaptive:
        scaled = map_leaves(lambda p, g: p.abs() * g, wide, scaled)
    length = global_norm(scaled)
    factor = torch.where(length > 0, rho / torch.where(length > 0, length, 1.0), 0.0)

    def move(p: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return (w + (factor * (w.abs() * s if adaptive else s)).to(w.dtype)).to(p.dtype)

    return map_leaves(move, params, wide, scaled)
