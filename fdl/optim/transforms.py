"""Transformations of gradients, the atoms that optimizers are chained from."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl import tree
from fdl.optim.base import (
    Hyper,
    Optimizer,
    Rate,
    check_rate,
    init_hyper,
    is_zero,
    map_grads,
    next_hyper,
    rate_of,
)
from fdl.tree import Tree, Where

__all__ = [
    "add_decayed_weights",
    "clip_by_global_norm",
    "scale",
    "scale_by_learning_rate",
    "trace",
]


class HyperState(NamedTuple):
    """The state of a transformation that has hyperparameters and nothing else.

    >>> clip_by_global_norm(0.1).init({}).hyper.count
    tensor(0)
    """

    hyper: Hyper


def scale(factor: float) -> Optimizer:
    """Multiply gradients by a constant that is part of the program.

    >>> scale(-2.0).update({"w": torch.ones(1)}, (), {"w": torch.ones(1)})
    ({'w': tensor([-2.])}, ())
    """

    def update(
        grads: Tree, state: Tree, params: Tree, *, value: Any = None, value_fn: Any = None
    ) -> tuple[Tree, Tree]:
        return map_grads(lambda g: g * factor, grads), state

    return Optimizer(lambda params: (), update)


def scale_by_learning_rate(lr: Rate) -> Optimizer:
    """Multiply by −lr: the last link of a chain, after which updates point downhill.

    Args:
        lr: a number, a 0-d tensor or a schedule.

    Raises:
        ValueError: `lr` is negative or not finite.

    >>> opt = scale_by_learning_rate(0.1)
    >>> opt.update({"w": torch.ones(1)}, opt.init({}), {"w": torch.ones(1)})[0]
    {'w': tensor([-0.1000])}
    """
    check_rate("scale_by_learning_rate", "lr", lr)
    rates = {"lr": lr}

    def init(params: Tree) -> HyperState:
        return HyperState(init_hyper(rates, params))

    def update(
        grads: Tree, state: HyperState, params: Tree, *, value: Any = None, value_fn: Any = None
    ) -> tuple[Tree, HyperState]:
        updates = map_grads(lambda g: -rate_of(state.hyper, "lr", g) * g, grads)
        return updates, HyperState(next_hyper(rates, state.hyper))

    return Optimizer(init, update)


def add_decayed_weights(rate: Rate, mask: Where | None = None) -> Optimizer:
    """Add rate · w to the gradient of w: the gradient of the penalty rate · ½ Σ w².

    Args:
        rate: a number, a 0-d tensor or a schedule; in the state as `weight_decay`.
        mask: which parameters decay, as in `tree.partition`: a glob on dotted paths, several, or a
            predicate `(path, leaf)`; all if None.

    Raises:
        ValueError: `rate` is negative or not finite; a glob matches no path (at init).

    >>> params = {"weight": torch.tensor([2.0]), "bias": torch.tensor([2.0])}
    >>> opt = add_decayed_weights(0.5, mask="weight")
    >>> opt.update(tree.map(torch.zeros_like, params), opt.init(params), params)[0]
    {'weight': tensor([1.]), 'bias': tensor([0.])}
    """
    check_rate("add_decayed_weights", "rate", rate)
    rates = {"weight_decay": rate}

    def decays(params: Tree) -> Tree:
        where = (lambda path, leaf: True) if mask is None else mask
        chosen = tree.select(params, where, "add_decayed_weights")
        return tree.unflatten_dict(chosen, like=params)

    def init(params: Tree) -> HyperState:
        decays(params)
        return HyperState(init_hyper(rates, params))

    def update(
        grads: Tree, state: HyperState, params: Tree, *, value: Any = None, value_fn: Any = None
    ) -> tuple[Tree, HyperState]:
        def decay(g: Tensor, p: Tensor, chosen: bool) -> Tensor:
            return g + rate_of(state.hyper, "weight_decay", p) * p if chosen else g

        updates = map_grads(decay, grads, params, decays(params))
        return updates, HyperState(next_hyper(rates, state.hyper))

    return Optimizer(init, update)


class TraceState(NamedTuple):
    """The state of `trace`.

    >>> trace(0.9).init({"w": torch.ones(1)}).momentum_buffer
    {'w': tensor([0.])}
    """

    hyper: Hyper
    momentum_buffer: Tree  # like params; torch.optim.SGD's slot of that name


def trace(momentum: Rate, dampening: Rate = 0.0, nesterov: bool = False) -> Optimizer:
    """Momentum as `torch.optim.SGD` has it: m ← momentum · m + (1 − dampening) · g.

    The first update sets m = g, undampened; where that gradient is `None`, later ones are dampened
    from the start (torch counts for each parameter alone). The result is m, or with `nesterov`
    g + momentum · m (Sutskever et al., 2013).

    Args:
        momentum: a number, a 0-d tensor or a schedule.
        dampening: likewise.
        nesterov: look ahead along the new m.

    Raises:
        ValueError: a number that is negative or not finite.

    >>> params = {"w": torch.ones(1)}
    >>> opt = trace(0.9)
    >>> m, state = opt.update({"w": torch.ones(1)}, opt.init(params), params)
    >>> opt.update({"w": torch.ones(1)}, state, params)[0]
    {'w': tensor([1.9000])}
    """
    check_rate("trace", "momentum", momentum)
    check_rate("trace", "dampening", dampening)
    rates = {"momentum": momentum} | ({} if is_zero(dampening) else {"dampening": dampening})

    def init(params: Tree) -> TraceState:
        return TraceState(init_hyper(rates, params), tree.map(torch.zeros_like, params))

    def update(
        grads: Tree, state: TraceState, params: Tree, *, value: Any = None, value_fn: Any = None
    ) -> tuple[Tree, TraceState]:
        hyper, old = state

        def accumulate(g: Tensor | None, m: Tensor) -> Tensor:
            if g is None:
                return m
            new = rate_of(hyper, "momentum", m) * m
            if "dampening" not in rates:
                return new + g
            keep = 1 - rate_of(hyper, "dampening", m)
            return torch.where(hyper.count == 0, g, new + keep * g)

        buffer = tree.map(accumulate, grads, old)
        if nesterov:
            updates = map_grads(lambda g, m: g + rate_of(hyper, "momentum", m) * m, grads, buffer)
        else:
            updates = map_grads(lambda g, m: m, grads, buffer)
        return updates, TraceState(next_hyper(rates, hyper), buffer)

    return Optimizer(init, update)


def clip_by_global_norm(max_norm: Rate) -> Optimizer:
    """Shrink all gradients together so that their joint norm is at most `max_norm`.

    The factor is min(1, max_norm / (norm + 1e-6)), as in `torch.nn.utils.clip_grad_norm_`.
    Source: Pascanu et al., 2013.

    Args:
        max_norm: a number, a 0-d tensor or a schedule.

    Raises:
        ValueError: `max_norm` is negative or not finite.

    >>> opt = clip_by_global_norm(1.0)
    >>> grads = {"w": torch.tensor([3.0, 4.0])}
    >>> opt.update(grads, opt.init(grads), grads)[0]
    {'w': tensor([0.6000, 0.8000])}
    """
    check_rate("clip_by_global_norm", "max_norm", max_norm)
    rates = {"max_norm": max_norm}

    def init(params: Tree) -> HyperState:
        return HyperState(init_hyper(rates, params))

    def update(
        grads: Tree, state: HyperState, params: Tree, *, value: Any = None, value_fn: Any = None
    ) -> tuple[Tree, HyperState]:
        found = [g for g in tree.leaves(grads) if g is not None]
        next_state = HyperState(next_hyper(rates, state.hyper))
        if not found:
            return grads, next_state
        norms = torch.stack([torch.linalg.vector_norm(g).double() for g in found])
        limit = rate_of(state.hyper, "max_norm", norms)
        factor = (limit / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0)
        return map_grads(lambda g: g * factor.to(g.dtype), grads), next_state

    return Optimizer(init, update)
