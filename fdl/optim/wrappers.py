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
from fdl.optim.base import (
    Optimizer,
    State,
    apply_updates,
    check_floating,
    in_32_bits,
    lift,
    map_grads,
    match_grads,
    update_of,
)
from fdl.optim.hyper import Rate, check_rate, device_of, init_hyper, next_hyper, rates_now
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


def as_value(caller: str, value: Any, like: Tensor, name: str = "value") -> Tensor:
    """Turn the value that came with an update into a float64 0-d tensor.

    Args:
        caller: opens the message.
        value: a number or a 0-d tensor.
        like: tells the device.
        name: of the argument.

    Raises:
        ValueError: a tensor with axes.

    >>> as_value("accumulate", 0.5, torch.zeros(()))
    tensor(0.5000, dtype=torch.float64)
    """
    found = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if found.ndim:
        raise ValueError(f"{caller}: {name} must be a scalar, got {list(found.shape)}")
    return found


def all_finite(grads: Tree, device: torch.device) -> Tensor:
    """Say whether all gradients are finite (bool []); `None` is.

    >>> all_finite({"w": torch.tensor([1.0, torch.inf]), "frozen": None}, torch.device("cpu"))
    tensor(False)
    """
    flags = [torch.isfinite(g).all() for g in tree.leaves(grads) if g is not None]
    return reduce(torch.logical_and, flags, torch.ones((), dtype=torch.bool, device=device))


def stays_finite(params: Tree, updates: Tree, device: torch.device) -> Tensor:
    """Say whether updates leave finite parameters finite (bool []), in the dtypes of these.

    >>> params = {"w": torch.tensor([6e4, torch.inf]).half()}
    >>> stays_finite(params, {"w": torch.tensor([1e4, 1.0])}, torch.device("cpu"))
    tensor(False)
    """
    new = apply_updates(params, updates)
    spoilt = tree.map(lambda p, n: torch.isfinite(p) & ~torch.isfinite(n), params, new)
    flags = [~leaf.any() for leaf in tree.leaves(spoilt)]
    return reduce(torch.logical_and, flags, torch.ones((), dtype=torch.bool, device=device))


NOTHING = torch.zeros((), dtype=torch.float64)  # in the place of a field that a file lacks


def times(count: Any, x: Tensor) -> Tensor:
    """Weigh a gradient or a value by how many examples it is the mean of; 1 if that is not said.

    What is the mean of no examples is 0, whatever it holds.

    >>> times(2, torch.ones(1)), times(0, torch.tensor([torch.nan]))
    (tensor([2.]), tensor([0.]))
    """
    if count is None:
        return x
    count = torch.as_tensor(count, dtype=x.dtype, device=x.device)
    return torch.where(count > 0, count * x, 0.0)


def surplus_of(caller: str, count: Any, like: Tensor) -> Tensor | float:
    """Say by how much more than 1 an update counts (float64 []).

    Args:
        caller: opens the message.
        count: a number or a 0-d tensor, None for 1.
        like: tells the device.

    Raises:
        ValueError: a tensor with axes.

    >>> surplus_of("accumulate", 4, torch.zeros(()))
    tensor(3., dtype=torch.float64)
    """
    return 0.0 if count is None else as_value(caller, count, like, "count") - 1


class FiniteState(NamedTuple):
    """The state of `apply_if_finite`."""

    inner: Tree
    skipped: Tensor  # int64 [], updates that were not made


def apply_if_finite(opt: Optimizer) -> Optimizer:
    """Skip an update where a number that goes in, or one that comes out, is infinite or NaN.

    In go the gradients and the value that comes with them; out come the parameters, in their own
    dtype, where they were finite before. The updates are then 0, the state of `opt` stays as it
    was, and `skipped` in the state counts one more.

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
    step = update_of("apply_if_finite", opt)

    def init(params: Tree) -> FiniteState:
        return FiniteState(opt.init(params), scalar(params, 0, torch.int64))

    def update(
        grads: Tree, state: FiniteState, params: Tree, *, value: Any = None, **extra: Any
    ) -> tuple[Tree, FiniteState]:
        device = state.skipped.device
        finite = all_finite(grads, device)
        if value is not None:
            finite = finite & torch.isfinite(as_value("apply_if_finite", value, finite))
        updates, inner = step(zero_unless(finite, grads), state.inner, params, value=value, **extra)
        finite = finite & stays_finite(params, updates, device)
        return zero_unless(finite, updates), FiniteState(
            keep(finite, inner, state.inner), state.skipped + ~finite
        )

    return Optimizer(init, update)


class AccumulateState(NamedTuple):
    """The state of `accumulate`."""

    inner: Tree
    mean: Tree  # like params, in float32 at least: Σ count · g / k so far
    value: Tensor  # float64 []: Σ count · value / k so far
    gathered: Tensor  # int64 [], gradients so far, below k
    # float64 [], Σ (count − 1) so far; files of earlier versions, where each counted 1, lack it
    surplus: Tensor = NOTHING


def accumulate(opt: Optimizer, k: int) -> Optimizer:
    """Gather the gradients of k updates, then apply `opt` once, to their mean.

    The updates before that are 0. With losses that are means, k micro-batches make the step of the
    whole batch: each gradient weighs as many examples as `count` says, which `train_step` passes,
    so that a padded batch weighs less; without a count all weigh alike. `value` becomes the mean of
    the k values with these weights; `value_fn`, which knows one micro-batch only, is not passed on.
    A leaf whose gradient is `None` now stays, with what was gathered for it: give it all k
    gradients, or none.

    What has been gathered when training ends is not applied. Make the number of micro-batches a
    multiple of k, or fill the last window with updates of `count=0`, to which `train_step` turns
    batches whose mask is all False.

    Args:
        opt: what to apply to the mean.
        k: how many gradients make one update.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: `k` is not an int of at least 1; a value or count with axes (at update).

    >>> from fdl import optim
    >>> opt, params = accumulate(optim.sgd(1.0), k=2), {"w": torch.zeros(1)}
    >>> first, state = opt.update({"w": torch.tensor([1.0])}, opt.init(params), params, count=3)
    >>> second, state = opt.update({"w": torch.tensor([5.0])}, state, params, count=1)
    >>> first, second
    ({'w': tensor([0.])}, {'w': tensor([-2.])})
    """
    step = update_of("accumulate", opt)
    check_whole("accumulate", "k", k, least=1)

    def init(params: Tree) -> AccumulateState:
        check_floating(params, "accumulate")
        zero = scalar(params, 0, torch.float64)
        gathered = scalar(params, 0, torch.int64)
        mean = tree.map(torch.zeros_like, params)
        return AccumulateState(opt.init(params), mean, zero, gathered, zero.clone())

    def update(
        grads: Tree,
        state: AccumulateState,
        params: Tree,
        *,
        value: Any = None,
        count: Any = None,
        **extra: Any,
    ) -> tuple[Tree, AccumulateState]:
        match_grads(grads, params, "accumulate")
        gathered, total = state.gathered + 1, state.value
        surplus = state.surplus + surplus_of("accumulate", count, total)
        mean = tree.map(
            lambda m, g: m if g is None else m + times(count, g.to(m.dtype)) / k, state.mean, grads
        )
        if value is not None:
            total = total + times(count, as_value("accumulate", value, total)) / k
        # Σ count examples weigh 1 together; 1 exactly where each count is.
        weight = gathered + surplus
        share = torch.where(weight > 0, k / torch.where(weight > 0, weight, 1.0), 0.0)
        handed = tree.map(lambda m, g: None if g is None else m * share.to(m.dtype), mean, grads)
        updates, inner = step(
            handed,
            state.inner,
            params,
            value=None if value is None else total * share,
            count=None if count is None else weight,
        )
        full = gathered >= k
        return zero_unless(full, updates), AccumulateState(
            keep(full, inner, state.inner),
            tree.map(lambda m, g: m if g is None else torch.where(full, 0.0, m), mean, grads),
            torch.where(full, 0.0, total),
            torch.where(full, 0, gathered),
            torch.where(full, 0.0, surplus),
        )

    return in_32_bits(init, update)


class LookaheadState(NamedTuple):
    """The state of `lookahead`."""

    own: State  # slow_step and the count of updates; the slot `slow`
    inner: Tree


def lookahead(opt: Optimizer, sync_period: int = 6, slow_step: Rate = 0.5) -> Optimizer:
    """Let slow weights follow at intervals the fast ones that `opt` moves (Zhang et al., 2019).

    At each `sync_period`-th update, with w where `opt` would take the parameters,
    s ← s + slow_step · (w − s), and the parameters become s. The slow weights are the slot
    `slow`: `optim.slots(state)["slow"]`. What `opt` remembers stays as it is. Running statistics
    of batch normalization belong to the fast weights: right after a synchronization recompute them,
    by `fdl.training.update_bn`.

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
    step = update_of("lookahead", opt)
    check_whole("lookahead", "sync_period", sync_period, least=1)
    check_rate("lookahead", "slow_step", slow_step)
    rates = {"slow_step": slow_step}

    def init(params: Tree) -> LookaheadState:
        check_floating(params, "lookahead")
        own = State(init_hyper(rates, params), {"slow": tree.map(torch.clone, params)})
        return LookaheadState(own, opt.init(params))

    def update(
        grads: Tree, state: LookaheadState, params: Tree, **extra: Any
    ) -> tuple[Tree, LookaheadState]:
        updates, inner = step(grads, state.inner, params, **extra)
        hyper, slow = state.own.hyper, tree.map(lift, state.own.slots["slow"])
        rate = rates_now(rates, hyper)["slow_step"]
        sync = (hyper.count + 1) % sync_period == 0

        def move(u: Tensor, p: Tensor, s: Tensor) -> Tensor:
            u = u.to(p.dtype)
            return torch.where(sync, (s + rate * (p + u - s)).to(p.dtype) - p, u)

        updates = map_grads(move, updates, params, slow)
        # Not what `move` aimed at, but what the parameters become, to the last bit of float32.
        slow = tree.map(
            lambda s, u, p: s if u is None else torch.where(sync, p + u, s), slow, updates, params
        )
        return updates, LookaheadState(State(next_hyper(rates, hyper), {"slow": slow}), inner)

    return in_32_bits(init, update)
