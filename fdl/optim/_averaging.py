"""Averages of parameters: `lookahead` and `params_ema`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._checks import describe
from fdl._kinds import register
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.optim._base import (
    Optimizer,
    State,
    check_floating,
    in_32_bits,
    map_grads,
    match_grads,
    upcast,
)
from fdl.optim._foreach import map_leaves
from fdl.optim._helpers import check_whole
from fdl.optim._hyperparams import (
    RANGES,
    ScalarOrSchedule,
    check_rate,
    init_hyper,
    next_hyper,
    rates_now,
    rates_of,
)
from fdl.tree import Tree
from fdl.tree._map import match


@register
class LookaheadState(NamedTuple):
    """The state of `lookahead`."""

    own: State  # slow_step and the count of updates; the slot `slow`
    inner: Tree


def lookahead(
    opt: OptimizerLike, sync_period: int = 6, slow_step: ScalarOrSchedule = 0.5
) -> Optimizer:
    """Keep slow weights that follow the fast weights of `opt` at intervals.

    At every `sync_period`-th update s ← s + slow_step · (w − s), where w are the parameters after
    the update of `opt`, and the parameters become s. The slow weights are the slot `slow`:
    `optim.slots(state)["slow"]`. The state of `opt` is not changed by this. Running statistics of
    batch normalization belong to the fast weights: recompute them right after a synchronization,
    with `fdl.update_bn`. Source: Zhang et al., Lookahead Optimizer: k steps forward, 1 step back,
    2019, https://arxiv.org/abs/1907.08610

    Args:
        opt: optimizer of the fast weights.
        sync_period: number of updates of `opt` per update of the slow weights.
        slow_step: a number, a 0-d tensor or a schedule of the count of updates, in [0, 1].

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
    begin, step = as_optimizer("lookahead", opt)
    check_whole("lookahead", "sync_period", sync_period, least=1)
    check_rate("lookahead", "slow_step", slow_step, RANGES["slow_step"])
    rates = {"slow_step": slow_step}

    def init(params: Tree) -> LookaheadState:
        check_floating(params, "lookahead")
        own = State(init_hyper(rates, params), {"slow": tree.map(torch.clone, params)})
        return LookaheadState(own, begin(params))

    def update(
        grads: Tree, state: LookaheadState, params: Tree, **extra: Any
    ) -> tuple[Tree, LookaheadState]:
        updates, inner = step(grads, state.inner, params, **extra)
        hyper, slow = state.own.hyper, tree.map(upcast, state.own.slots["slow"])
        rate = rates_now(rates, hyper)["slow_step"]
        sync = (hyper.count + 1) % sync_period == 0

        def move(u: Tensor, p: Tensor, s: Tensor) -> Tensor:
            u = u.to(p.dtype)
            return torch.where(sync, (s + rate * (p + u - s)).to(p.dtype) - p, u)

        updates = map_grads(move, updates, params, slow)
        # Computed from the updates, to equal the new parameters to the last bit of float32.
        slow = map_leaves(
            lambda s, u, p: s if u is None else torch.where(sync, p + u, s), slow, updates, params
        )
        return updates, LookaheadState(State(next_hyper(rates, hyper), {"slow": slow}), inner)

    return in_32_bits(init, update)


@register
class EMAState(NamedTuple):
    """The state of `params_ema(buffers=True)`."""

    own: State  # decay and the count of updates; the slot `ema`
    kept: Tensor  # float64 [], decay of the last update; 0 for the first, which sets the average
    buffers: Tree  # averages of the buffers; () until `TrainState.create` sets them


def params_ema(decay: ScalarOrSchedule, buffers: bool = False) -> Optimizer:
    """Keep an exponential moving average of the parameters; updates pass unchanged.

    (`optax.ema` averages updates instead.) With w the updated parameters, a ← w after the first
    update and a ← decay · a + (1 − decay) · w after each later one, as in
    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`. Put it last in a chain, and
    inside wrappers that skip updates: `accumulate(chain(sgd, params_ema), k)`. The average is the
    slot `ema`: `optim.slots(state)["ema"]`; `fdl.averaged` puts it in the place of the parameters.
    It also follows parameters whose gradient is `None`. The average of 16-bit parameters is kept in
    float32.

    Running statistics of batch normalization belong to the parameters of training. Average them as
    well, with `buffers`, or recompute them for the average with `fdl.update_bn`.

    Args:
        decay: a number, a 0-d tensor or a schedule, in [0, 1).
        buffers: average the buffers of a `TrainState` in the same way, as torch does with
            `use_buffers`: `TrainState.create` starts these averages, and `train_step` updates them.
            Integers, such as counts of batches, are not averaged but the newest.

    Raises:
        TypeError: `buffers` is not a bool.
        ValueError: `decay` is not in [0, 1).

    >>> from fdl import optim
    >>> opt, params = optim.chain(optim.sgd(1.0), params_ema(0.75)), {"w": torch.zeros(1)}
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     updates, state = opt.update({"w": -torch.ones(1)}, state, params)
    ...     params = optim.apply_updates(params, updates)
    >>> params, optim.slots(state)["ema"]
    ({'w': tensor([2.])}, {'w': tensor([1.2500])})
    """
    check_rate("params_ema", "decay", decay, RANGES["decay"])
    if not isinstance(buffers, bool):
        raise TypeError(
            f"params_ema: buffers must be True or False, got {describe(buffers)}; the values of "
            "buffers come from the TrainState"
        )
    rates = {"decay": decay}

    def init(params: Tree) -> State:
        check_floating(params, "params_ema")
        return State(init_hyper(rates, params), {"ema": tree.map(torch.clone, params)})

    def kept_by(state: State) -> Tensor:
        return torch.where(state.hyper.count == 0, 0.0, rates_now(rates, state.hyper)["decay"])

    def update(grads: Tree, state: State, params: Tree, **extra: Any) -> tuple[Tree, State]:
        match_grads(grads, params, "params_ema")
        kept = kept_by(state)

        def average(a: Tensor, p: Tensor, u: Tensor | None) -> Tensor:
            return _average(a, p if u is None else p + u.to(p.dtype), kept)

        averages = map_leaves(average, tree.map(upcast, state.slots["ema"]), params, grads)
        return grads, State(next_hyper(rates, state.hyper), {"ema": averages})

    def init_both(params: Tree) -> EMAState:
        own = init(params)
        return EMAState(own, torch.zeros_like(own.hyper.count, dtype=torch.float64), ())

    def update_both(
        grads: Tree, state: EMAState, params: Tree, **extra: Any
    ) -> tuple[Tree, EMAState]:
        grads, own = update(grads, state.own, params)
        return grads, EMAState(own, kept_by(state.own), state.buffers)

    return in_32_bits(init_both, update_both) if buffers else in_32_bits(init, update)


def _average(a: Tensor, w: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept == 0, w, (a + (1 - kept) * (w - a)).to(a.dtype))


def _nodes(state: Tree) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(state, is_leaf=lambda node: isinstance(node, (State, EMAState)))


def start_buffers(state: Tree, buffers: Tree) -> Tree:
    """Start the averages of buffers in every `params_ema(buffers=True)` of a state.

    >>> start_buffers(params_ema(0.9, buffers=True).init({}), {"mean": torch.ones(1)}).buffers
    {'mean': tensor([1.])}
    """

    def start(node: Any) -> Any:
        if not isinstance(node, EMAState):
            return node
        return node._replace(buffers=tree.map(lambda b: upcast(b).clone(), buffers))

    nodes, spec = _nodes(state)
    return pytree.tree_unflatten([start(node) for node in nodes], spec)


def average_buffers(before: Tree, after: Tree, buffers: Tree) -> Tree:
    """Update the averages of buffers in a state, where its update was not skipped.

    Args:
        before: the state before the update.
        after: the state after it.
        buffers: the new buffers.

    Raises:
        ValueError: the averages have other paths than `buffers`.

    >>> opt, params = params_ema(0.9, buffers=True), {"w": torch.ones(1)}
    >>> before = start_buffers(opt.init(params), {"mean": torch.zeros(1)})
    >>> after = opt.update(params, before, params)[1]
    >>> average_buffers(before, after, {"mean": torch.ones(1)}).buffers
    {'mean': tensor([1.])}
    """
    nodes, spec = _nodes(after)
    if not any(isinstance(node, EMAState) for node in nodes):
        return after

    def move(old: Any, new: Any) -> Any:
        if not isinstance(new, EMAState):
            return new
        moved = new.own.hyper.count > old.own.hyper.count

        def average(a: Tensor, b: Tensor) -> Tensor:
            b = b.to(a.dtype)
            return torch.where(moved, _average(a, b, new.kept) if a.is_floating_point() else b, a)

        match(buffers, new.buffers, "params_ema: averages of buffers, made by TrainState.create")
        return new._replace(buffers=tree.map(average, new.buffers, buffers))

    moved = [move(old, new) for old, new in zip(_nodes(before)[0], nodes, strict=True)]
    return pytree.tree_unflatten(moved, spec)


def averages_of(state: Tree) -> list[tuple[Tree, Tree | None]]:
    """List the averages of each `params_ema`: of parameters, and of buffers if it has them.

    >>> averages_of(params_ema(0.9).init({"w": torch.ones(1)}))
    [({'w': tensor([1.])}, None)]
    """
    found: list[tuple[Tree, Tree | None]] = []
    for node in _nodes(state)[0]:
        if isinstance(node, EMAState):
            found.append((node.own.slots["ema"], node.buffers))
        elif isinstance(node, State) and (*node.slots, *rates_of(node.hyper)) == ("ema", "decay"):
            found.append((node.slots["ema"], None))
    return found
