"""Lower the learning rate when the loss no longer falls."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._kinds import register
from fdl.optim._base import Optimizer, update_of
from fdl.optim._helpers import NOTHING, as_value, check_whole, keep, scalar, surplus_of, times
from fdl.optim._hyperparams import Hyper, flatten_to_hyper
from fdl.tree import Tree


@register
class PlateauState(NamedTuple):
    """The state of `reduce_on_plateau`."""

    inner: Tree
    best: Tensor  # float64 [], the best value so far
    bad: Tensor  # int64 [], looks without a better one
    cooldown: Tensor  # int64 [], looks that are still to be ignored
    total: Tensor  # float64 [], Σ count · value since the last look
    seen: Tensor  # int64 [], how many values they are, below `every`
    # float64 [], Σ (count − 1) of them; files of earlier versions, where each counted 1, lack it
    surplus: Tensor = NOTHING


def reduce_on_plateau(
    opt: Optimizer,
    mode: Literal["min", "max"] = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
    every: int = 1,
) -> Optimizer:
    """Multiply lr by `factor` when the value has not improved for more than `patience` looks.

    It looks at the `value` that comes with each update, after the update: a lower lr is that of the
    next one. All hyperparameters named `lr` in the state of `opt` fall alike. Equals
    `torch.optim.lr_scheduler.ReduceLROnPlateau`, whose `step` is one look.

    Args:
        opt: an optimizer whose lr follows no schedule.
        mode: whether less is better ("min") or more ("max").
        factor: in [0, 1).
        patience: how many looks in a row may bring nothing better.
        threshold: by how much a value must be better than the best one to count.
        threshold_mode: as a fraction of the size of the best one ("rel"), which also serves values
            below 0, or as a difference ("abs").
        cooldown: after a reduction, so many looks without improvement do not count.
        min_lr: lr falls no further.
        eps: lr stays where it would fall by no more than this.
        every: look after so many updates, at the mean of their values, each of which weighs as
            many examples as `count` says; for one look an epoch, the number of its batches.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: an argument out of its range; (at init) no `lr`, or one that follows a schedule;
            (at update) no `value`, or one with axes.

    >>> from fdl import optim
    >>> opt, params = reduce_on_plateau(optim.sgd(1.0), patience=1), {"w": torch.ones(1)}
    >>> state = opt.init(params)
    >>> for loss in (5.0, 4.0, 4.0, 4.0):
    ...     _, state = opt.update(params, state, params, value=loss)
    >>> optim.hyperparams(state)
    {'lr': tensor(0.1000, dtype=torch.float64)}
    """
    step = update_of("reduce_on_plateau", opt)
    for name, word, words in (
        ("mode", mode, ("min", "max")),
        ("threshold_mode", threshold_mode, ("rel", "abs")),
    ):
        if word not in words:
            raise ValueError(f"reduce_on_plateau: {name} must be one of {words}, got {word!r}")
    for name, number, end in (
        ("factor", factor, 1.0),
        ("threshold", threshold, math.inf),
        ("min_lr", min_lr, math.inf),
        ("eps", eps, math.inf),
    ):
        if not (isinstance(number, (int, float)) and 0 <= number < end):
            raise ValueError(
                f"reduce_on_plateau: {name} must be a number in [0, {end:g}), got {number!r}"
            )
    check_whole("reduce_on_plateau", "patience", patience, least=0)
    check_whole("reduce_on_plateau", "cooldown", cooldown, least=0)
    check_whole("reduce_on_plateau", "every", every, least=1)
    sign = 1 if mode == "max" else -1

    def init(params: Tree) -> PlateauState:
        inner = opt.init(params)
        nodes = [(path, node) for path, node in flatten_to_hyper(inner)[0] if _has_lr(node)]
        scheduled = [path for path, node in nodes if "lr" in node.scheduled]
        if scheduled or not nodes:
            why = f"one that follows a schedule, at {scheduled}" if scheduled else "none"
            raise ValueError(
                f"reduce_on_plateau: the optimizer must have an lr of its own, got {why}"
            )
        return PlateauState(
            inner,
            best=scalar(params, -sign * math.inf, torch.float64),
            bad=scalar(params, 0, torch.int64),
            cooldown=scalar(params, 0, torch.int64),
            total=scalar(params, 0, torch.float64),
            seen=scalar(params, 0, torch.int64),
            surplus=scalar(params, 0, torch.float64),
        )

    def update(
        grads: Tree,
        state: PlateauState,
        params: Tree,
        *,
        value: Any = None,
        count: Any = None,
        **extra: Any,
    ) -> tuple[Tree, PlateauState]:
        if value is None:
            raise ValueError(
                "reduce_on_plateau: update needs the loss, update(grads, state, params, "
                "value=loss), as train_step passes it"
            )
        updates, inner = step(grads, state.inner, params, value=value, count=count, **extra)
        found = as_value("reduce_on_plateau", value, state.total)
        total, seen = state.total + times(count, found), state.seen + 1
        surplus = state.surplus + surplus_of("reduce_on_plateau", count, total)
        weight = seen + surplus
        looks = (seen >= every) & (weight > 0)  # at the mean of no examples there is nothing to see

        current = total / torch.where(weight > 0, weight, 1.0)
        bound = _bound(state.best, sign * threshold, threshold_mode)
        better = current > bound if mode == "max" else current < bound
        cooling = state.cooldown > 0
        bad = torch.where(better | cooling, 0, state.bad + 1)
        reduces = bad > patience
        after_a_look = (
            torch.where(better, current, state.best),
            torch.where(reduces, 0, bad),
            torch.where(reduces, cooldown, state.cooldown - cooling.long()),
            torch.zeros_like(total),
            torch.zeros_like(seen),
            torch.zeros_like(total),
        )
        before_one = (state.best, state.bad, state.cooldown, total, seen, surplus)

        def reduced(lr: Tensor) -> Tensor:
            lower = (lr * factor).clamp(min=min_lr)
            return torch.where(looks & reduces & (lr - lower > eps), lower, lr)

        return updates, PlateauState(
            _map_lr(reduced, inner), *keep(looks, after_a_look, before_one)
        )

    return Optimizer(init, update)


def _bound(best: Tensor, margin: float, mode: str) -> Tensor:
    """Say what a value must pass to be better than the best one, which at first is infinite.

    Relative, the margin is a fraction of |best|: of a best value below 0, best · (1 + margin) would
    lie on the wrong side.
    """
    if mode == "abs":
        return best + margin
    relative = best * torch.where(best < 0, 1 - margin, 1 + margin)
    return torch.where(best.isinf(), best, relative)


def _has_lr(node: Any) -> bool:
    return isinstance(node, Hyper) and "lr" in {**node.free, **node.scheduled}


def _map_lr(f: Any, state: Tree) -> Tree:
    """Change each free hyperparameter called lr."""
    nodes, spec = flatten_to_hyper(state)

    def changed(node: Any) -> Any:
        if not _has_lr(node):
            return node
        # Made anew: what _replace makes, Dynamo of torch 2.11 cannot return from a program.
        return Hyper({**node.free, "lr": f(node.free["lr"])}, node.scheduled, node.count)

    return pytree.tree_unflatten([changed(node) for _, node in nodes], spec)
