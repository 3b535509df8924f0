"""Lower the learning rate when the loss stops falling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._kinds import register
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.optim._base import Optimizer
from fdl.optim._helpers import (
    NO_SURPLUS,
    as_value,
    check_whole,
    scalar,
    surplus_of,
    tree_where,
    weigh,
)
from fdl.optim._hyperparams import Hyper, flatten_to_hyper
from fdl.tree import Tree


@register
class PlateauState(NamedTuple):
    """The state of `reduce_on_plateau`."""

    inner: Tree
    best: Tensor  # float64 [], the best value so far
    bad: Tensor  # int64 [], looks in a row without a better one
    cooldown: Tensor  # int64 [], looks for which the cooldown still lasts
    total: Tensor  # float64 [], Σ count · value since the last look
    seen: Tensor  # int64 [], number of values since the last look, below `every`
    # float64 [], Σ (count − 1) since the last look. Files of earlier versions, in which each value
    # counted 1, lack it.
    surplus: Tensor = NO_SURPLUS


def reduce_on_plateau(
    opt: OptimizerLike,
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

    It looks at the `value` passed with each update, after the update, so that a lower lr takes
    effect in the next one. All hyperparameters named `lr` in the state of `opt` are multiplied.
    Equals `torch.optim.lr_scheduler.ReduceLROnPlateau`, whose `step` is one look.

    Args:
        opt: an optimizer whose lr follows no schedule.
        mode: "min" if smaller values are better, "max" if larger ones are.
        factor: factor of a reduction, in [0, 1).
        patience: number of looks in a row without improvement after which the next one reduces.
        threshold: smallest improvement on the best value that counts.
        threshold_mode: "rel" if `threshold` is a fraction of the absolute best value, "abs" if it
            is a difference.
        cooldown: number of looks after a reduction for which lack of improvement does not count.
        min_lr: lower bound of lr.
        eps: a reduction by no more than this is not made.
        every: number of updates per look, which takes the mean of their values weighted by `count`;
            for one look per epoch, the number of its batches.

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
    begin, step = as_optimizer("reduce_on_plateau", opt)
    _check_choice("mode", mode, ("min", "max"))
    _check_choice("threshold_mode", threshold_mode, ("rel", "abs"))
    _check_number("factor", factor, below=1.0)
    _check_number("threshold", threshold)
    _check_number("min_lr", min_lr)
    _check_number("eps", eps)
    check_whole("reduce_on_plateau", "patience", patience, least=0)
    check_whole("reduce_on_plateau", "cooldown", cooldown, least=0)
    check_whole("reduce_on_plateau", "every", every, least=1)
    sign = 1 if mode == "max" else -1

    def init(params: Tree) -> PlateauState:
        inner = begin(params)
        _check_lr(inner)
        return PlateauState(
            inner,
            best=scalar(params, -sign * math.inf, torch.float64),
            bad=scalar(params, 0, torch.int64),
            cooldown=scalar(params, 0, torch.int64),
            total=scalar(params, 0, torch.float64),
            seen=scalar(params, 0, torch.int64),
            surplus=scalar(params, 0, torch.float64),
        )

    def look(state: PlateauState, current: Tensor) -> tuple[PlateauState, Tensor]:
        """Compare a value with the best one; return the next state, and if lr is to be reduced."""
        bound = _bound(state.best, sign * threshold, threshold_mode)
        better = current > bound if mode == "max" else current < bound
        cooling = state.cooldown > 0
        bad = torch.where(better | cooling, 0, state.bad + 1)
        reduces = bad > patience
        next_state = PlateauState(
            state.inner,
            best=torch.where(better, current, state.best),
            bad=torch.where(reduces, 0, bad),
            cooldown=torch.where(reduces, cooldown, state.cooldown - cooling.long()),
            total=torch.zeros_like(state.total),
            seen=torch.zeros_like(state.seen),
            surplus=torch.zeros_like(state.total),
        )
        return next_state, reduces

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
        state = _with_value(state, value, count)
        weight = state.seen + state.surplus
        looks = (state.seen >= every) & (weight > 0)  # a mean over 0 examples is not a value
        current = state.total / torch.where(weight > 0, weight, 1.0)
        after_look, reduces = look(state, current)

        def reduce(lr: Tensor) -> Tensor:
            lower = (lr * factor).clamp(min=min_lr)
            return torch.where(looks & reduces & (lr - lower > eps), lower, lr)

        _, *progress = tree_where(looks, after_look, state)
        return updates, PlateauState(_map_lr(reduce, inner), *progress)

    return Optimizer(init, update)


def _check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"reduce_on_plateau: {name} must be one of {choices}, got {choice!r}")


def _check_number(name: str, number: float, below: float = math.inf) -> None:
    if not (isinstance(number, (int, float)) and 0 <= number < below):
        raise ValueError(
            f"reduce_on_plateau: {name} must be a number in [0, {below:g}), got {number!r}"
        )


def _check_lr(inner: Tree) -> None:
    """Raise unless the state of the optimizer has an lr that can be set."""
    nodes = [(path, node) for path, node in flatten_to_hyper(inner)[0] if _has_lr(node)]
    scheduled = [path for path, node in nodes if "lr" in node.scheduled]
    if scheduled or not nodes:
        why = f"one that follows a schedule, at {scheduled}" if scheduled else "none"
        raise ValueError(f"reduce_on_plateau: the optimizer must have an lr of its own, got {why}")


def _with_value(state: PlateauState, value: Any, count: Any) -> PlateauState:
    """Add the value of an update to those since the last look."""
    value = as_value("reduce_on_plateau", value, state.total)
    return state._replace(
        total=state.total + weigh(count, value),
        seen=state.seen + 1,
        surplus=state.surplus + surplus_of("reduce_on_plateau", count, state.total),
    )


def _bound(best: Tensor, margin: float, mode: str) -> Tensor:
    """Return the value that is better than the best one, infinite at first, by the threshold.

    Relative, the margin is a fraction of |best|: for a best value below 0, best · (1 + margin)
    would be on the wrong side of it.
    """
    if mode == "abs":
        return best + margin
    relative = best * torch.where(best < 0, 1 - margin, 1 + margin)
    return torch.where(best.isinf(), best, relative)


def _has_lr(node: Any) -> bool:
    return isinstance(node, Hyper) and "lr" in {**node.free, **node.scheduled}


def _map_lr(f: Callable[[Tensor], Tensor], state: Tree) -> Tree:
    """Change each free hyperparameter called lr."""
    nodes, spec = flatten_to_hyper(state)

    def changed(node: Any) -> Any:
        if not _has_lr(node):
            return node
        # A new tuple, since Dynamo of torch 2.11 cannot return the result of _replace.
        return Hyper({**node.free, "lr": f(node.free["lr"])}, node.scheduled, node.count)

    return pytree.tree_unflatten([changed(node) for _, node in nodes], spec)
