"""Averages of parameters: `lookahead` and `params_ema`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl import tree
from fdl._kinds import register
from fdl.optim._base import (
    Optimizer,
    State,
    check_floating,
    in_32_bits,
    map_grads,
    match_grads,
    upcast,
    update_of,
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
)
from fdl.tree import Tree


@register
class LookaheadState(NamedTuple):
    """The state of `lookahead`."""

    own: State  # slow_step and the count of updates; the slot `slow`
    inner: Tree


def lookahead(opt: Optimizer, sync_period: int = 6, slow_step: ScalarOrSchedule = 0.5) -> Optimizer:
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
    step = update_of("lookahead", opt)
    check_whole("lookahead", "sync_period", sync_period, least=1)
    check_rate("lookahead", "slow_step", slow_step, RANGES["slow_step"])
    rates = {"slow_step": slow_step}

    def init(params: Tree) -> LookaheadState:
        check_floating(params, "lookahead")
        own = State(init_hyper(rates, params), {"slow": tree.map(torch.clone, params)})
        return LookaheadState(own, opt.init(params))

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


def params_ema(decay: ScalarOrSchedule) -> Optimizer:
    """Keep an exponential moving average of the parameters; updates pass unchanged.

    (`optax.ema` averages updates instead.) With w the updated parameters, a ← w after the first
    update and a ← decay · a + (1 − decay) · w after each later one, as in
    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`. Put it last in a chain, and
    inside wrappers that skip updates: `accumulate(chain(sgd, params_ema), k)`. The average is the
    slot `ema`: `optim.slots(state)["ema"]`. It also follows parameters whose gradient is `None`.

    The average of 16-bit parameters is kept in float32; `tree.cast` it to evaluate in their dtype.
    Running statistics of batch normalization belong to the parameters of training: recompute them
    for the average with `fdl.update_bn` before you evaluate it.

    Args:
        decay: a number, a 0-d tensor or a schedule, in [0, 1).

    Raises:
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
    rates = {"decay": decay}

    def init(params: Tree) -> State:
        check_floating(params, "params_ema")
        return State(init_hyper(rates, params), {"ema": tree.map(torch.clone, params)})

    def update(grads: Tree, state: State, params: Tree, **extra: Any) -> tuple[Tree, State]:
        match_grads(grads, params, "params_ema")
        kept = rates_now(rates, state.hyper)["decay"]
        first = state.hyper.count == 0

        def average(a: Tensor, p: Tensor, u: Tensor | None) -> Tensor:
            w = p if u is None else p + u.to(p.dtype)
            return torch.where(first, w, (a + (1 - kept) * (w - a)).to(a.dtype))

        averages = map_leaves(average, tree.map(upcast, state.slots["ema"]), params, grads)
        return grads, State(next_hyper(rates, state.hyper), {"ema": averages})

    return in_32_bits(init, update)
