"""Optimizers around an optimizer: they decide when, or with which gradients, it runs.

What depends on numbers is chosen with `torch.where`, so that one program serves: the inner
optimizer is computed in every update, and where it should not have run its result is dropped.
"""

from __future__ import annotations  # Dynamo would run those of nested functions

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl import tree
from fdl._numerics import at_least_32_bits
from fdl.optim.base import (
    Optimizer,
    State,
    check_floating,
    map_grads,
    match_grads,
)
from fdl.optim.hyper import Rate, check_rate, device_of, init_hyper, next_hyper, rates_of
from fdl.tree import Tree

__all__ = ["accumulate", "apply_if_finite", "lookahead"]


def keep(flag: Tensor, new: Tree, old: Tree) -> Tree:
    """Take the new tree where a flag (bool []) holds, and the old one where not.

    >>> keep(torch.tensor(False), {"n": torch.tensor(1)}, {"n": torch.tensor(0)})
    {'n': tensor(0)}
    """
    return tree.map(lambda n, o: torch.where(flag, n, o), new, old)


def zero_unless(flag: Tensor, grads: Tree) -> Tree:
    """Take gradients where a flag (bool []) holds, and 0 where not; `None` stays.

    >>> zero_unless(torch.tensor(False), {"w": torch.ones(1), "frozen": None})
    {'w': tensor([0.]), 'frozen': None}
    """
    return map_grads(lambda g: torch.where(flag, g, 0.0), grads)


def check_inner(caller: str, opt: Optimizer) -> None:
    """Raise unless what a wrapper was given is an optimizer.

    >>> from fdl import optim
    >>> check_inner("accumulate", optim.sgd(0.1))
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(f"{caller}: opt must be an Optimizer, got {opt!r}")


def check_whole(caller: str, name: str, value: int, least: int) -> None:
    """Raise unless a number that is part of the program is a whole one, and large enough.

    Args:
        caller: opens the message.
        name: of the argument.
        value: what came.
        least: the smallest number allowed.

    >>> check_whole("accumulate", "k", 4, least=1)
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{caller}: {name} must be an int of at least {least}, got {value!r}")


def scalar(params: Tree, number: float, dtype: torch.dtype) -> Tensor:
    """Make a 0-d tensor on the device of the parameters.

    Args:
        params: what the state will belong to.
        number: its value.
        dtype: its dtype.

    >>> scalar({"w": torch.ones(1)}, 0, torch.int64)
    tensor(0)
    """
    return torch.full((), number, dtype=dtype, device=device_of(params))


def as_value(caller: str, value: Any, like: Tensor) -> Tensor:
    """Turn the value that came with an update into a float64 0-d tensor.

    Args:
        caller: opens the message.
        value: a number or a 0-d tensor.
        like: tells the device.

    Raises:
        ValueError: a tensor with axes.

    >>> as_value("accumulate", 0.5, torch.zeros(()))
    tensor(0.5000, dtype=torch.float64)
    """
    found = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if found.ndim:
        raise ValueError(f"{caller}: value must be a scalar, got {list(found.shape)}")
    return found


def all_finite(grads: Tree, device: torch.device) -> Tensor:
    """Say whether all gradients are finite (bool []); `None` is.

    >>> all_finite({"w": torch.tensor([1.0, torch.inf]), "frozen": None}, torch.device("cpu"))
    tensor(False)
    """
    flags = [torch.isfinite(g).all() for g in tree.leaves(grads) if g is not None]
    return reduce(torch.logical_and, flags, torch.ones((), dtype=torch.bool, device=device))


class FiniteState(NamedTuple):
    """The state of `apply_if_finite`."""

    inner: Tree
    skipped: Tensor  # int64 [], updates that were not made


def apply_if_finite(opt: Optimizer) -> Optimizer:
    """Skip an update if a gradient, or the value that comes with it, is infinite or NaN.

    The updates are then 0, the state of `opt` stays as it was, and `skipped` in the state counts
    one more.

    Args:
        opt: what to apply else.

    Raises:
        TypeError: `opt` is not an optimizer.

    >>> from fdl import optim
    >>> opt, params = apply_if_finite(optim.sgd(1.0)), {"w": torch.ones(1)}
    >>> updates, state = opt.update({"w": torch.tensor([torch.nan])}, opt.init(params), params)
    >>> updates, state.skipped
    ({'w': tensor([0.])}, tensor(1))
    """
    check_inner("apply_if_finite", opt)

    def init(params: Tree) -> FiniteState:
        return FiniteState(opt.init(params), scalar(params, 0, torch.int64))

    def update(
        grads: Tree, state: FiniteState, params: Tree, *, value: Any = None, value_fn: Any = None
    ) -> tuple[Tree, FiniteState]:
        finite = all_finite(grads, state.skipped.device)
        if value is not None:
            finite = finite & torch.isfinite(as_value("apply_if_finite", value, finite))
        updates, inner = opt.update(
            zero_unless(finite, grads), state.inner, params, value=value, value_fn=value_fn
        )
        return zero_unless(finite, updates), FiniteState(
            keep(finite, inner, state.inner), state.skipped + ~finite
        )

    return Optimizer(init, update)


class AccumulateState(NamedTuple):
    """The state of `accumulate`."""

    inner: Tree
    mean: Tree  # like params, in float32 at least: Σ g / k so far
    value: Tensor  # float64 []: Σ value / k so far
    gathered: Tensor  # int64 [], gradients so far, below k


def accumulate(opt: Optimizer, k: int) -> Optimizer:
    """Gather the gradients of k updates, then apply `opt` once, to their mean.

    The updates before that are 0. With losses that are means, k micro-batches of one size make the
    step of the whole batch. `value` becomes the mean of the k values; `value_fn`, which knows one
    micro-batch only, is not passed on. A leaf whose gradient is `None` now stays, with what was
    gathered for it: give it all k gradients, or none.

    Args:
        opt: what to apply to the mean.
        k: how many gradients make one update.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: `k` is not an int of at least 1.

    >>> from fdl import optim
    >>> opt, params = accumulate(optim.sgd(1.0), k=2), {"w": torch.zeros(1)}
    >>> first, state = opt.update({"w": torch.tensor([1.0])}, opt.init(params), params)
    >>> second, state = opt.update({"w": torch.tensor([3.0])}, state, params)
    >>> first, second
    ({'w': tensor([0.])}, {'w': tensor([-2.])})
    """
    check_inner("accumulate", opt)
    check_whole("accumulate", "k", k, least=1)

    def init(params: Tree) -> AccumulateState:
        check_floating(params, "accumulate")
        mean = tree.map(lambda p: torch.zeros_like(p, dtype=at_least_32_bits(p)), params)
        value, gathered = scalar(params, 0, torch.float64), scalar(params, 0, torch.int64)
        return AccumulateState(opt.init(params), mean, value, gathered)

    def update(
        grads: Tree,
        state: AccumulateState,
        params: Tree,
        *,
        value: Any = None,
        value_fn: Any = None,
    ) -> tuple[Tree, AccumulateState]:
        match_grads(grads, params, "accumulate")
        mean = tree.map(lambda m, g: m if g is None else m + g.to(m.dtype) / k, state.mean, grads)
        total = state.value
        if value is not None:
            total = total + as_value("accumulate", value, total) / k
        handed = tree.map(lambda p, m, g: None if g is None else m.to(p.dtype), params, mean, grads)
        updates, inner = opt.update(
            handed, state.inner, params, value=None if value is None else total
        )
        full = state.gathered + 1 == k
        return zero_unless(full, updates), AccumulateState(
            keep(full, inner, state.inner),
            tree.map(lambda m, g: m if g is None else torch.where(full, 0.0, m), mean, grads),
            torch.where(full, 0.0, total),
            torch.where(full, 0, state.gathered + 1),
        )

    return Optimizer(init, update)


class LookaheadState(NamedTuple):
    """The state of `lookahead`."""

    own: State  # slow_step and the count of updates; the slot `slow`
    inner: Tree


def lookahead(opt: Optimizer, sync_period: int = 6, slow_step: Rate = 0.5) -> Optimizer:
    """Let slow weights follow at intervals the fast ones that `opt` moves (Zhang et al., 2019).

    At each `sync_period`-th update, with w where `opt` would take the parameters,
    s ← s + slow_step · (w − s), and the parameters become s. The slow weights are the slot
    `slow`: `optim.slots(state)["slow"]`. What `opt` remembers stays as it is.

    Args:
        opt: moves the fast weights.
        sync_period: how many updates of `opt` make one of the slow weights.
        slow_step: a number, a 0-d tensor or a schedule of the count of updates.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: `sync_period` is not an int of at least 1; `slow_step` is not in [0, 1].

    >>> from fdl import optim
    >>> opt, params = lookahead(optim.sgd(1.0), sync_period=2), {"w": torch.zeros(1)}
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     updates, state = opt.update({"w": -torch.ones(1)}, state, params)
    ...     params = optim.apply_updates(params, updates)
    >>> params, optim.slots(state)["slow"]
    ({'w': tensor([1.])}, {'w': tensor([1.])})
    """
    check_inner("lookahead", opt)
    check_whole("lookahead", "sync_period", sync_period, least=1)
    check_rate("lookahead", "slow_step", slow_step)
    rates = {"slow_step": slow_step}

    def init(params: Tree) -> LookaheadState:
        check_floating(params, "lookahead")
        own = State(init_hyper(rates, params), {"slow": tree.map(torch.clone, params)})
        return LookaheadState(own, opt.init(params))

    def update(
        grads: Tree, state: LookaheadState, params: Tree, *, value: Any = None, value_fn: Any = None
    ) -> tuple[Tree, LookaheadState]:
        updates, inner = opt.update(grads, state.inner, params, value=value, value_fn=value_fn)
        hyper, slow = state.own.hyper, state.own.slots["slow"]
        rate = rates_of(hyper)["slow_step"]
        sync = (hyper.count + 1) % sync_period == 0

        def move(u: Tensor, p: Tensor, s: Tensor) -> Tensor:
            u = u.to(p.dtype)
            return torch.where(sync, (s + rate * (p + u - s)).to(p.dtype) - p, u)

        updates = map_grads(move, updates, params, slow)
        # Not what `move` aimed at, but what the parameters become, to the last bit.
        slow = tree.map(
            lambda s, u, p: s if u is None else torch.where(sync, p + u, s), slow, updates, params
        )
        return updates, LookaheadState(State(next_hyper(rates, hyper), {"slow": slow}), inner)

    return Optimizer(init, update)
