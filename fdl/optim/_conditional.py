"""Wrappers that decide when, or with which gradients, an optimizer runs.

Decisions that depend on numbers are made with `torch.where`, so that there is one program: the
inner optimizer runs in every update, and its result is discarded where it should not have run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl import tree
from fdl._kinds import register
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.optim._base import Optimizer, check_floating, in_32_bits, match_grads
from fdl.optim._foreach import map_leaves
from fdl.optim._helpers import (
    NO_SURPLUS,
    all_finite,
    as_value,
    check_whole,
    scalar,
    stays_finite,
    surplus_of,
    tree_where,
    weigh,
    zero_unless,
)
from fdl.tree import Tree


@register
class FiniteState(NamedTuple):
    """The state of `apply_if_finite`."""

    inner: Tree
    skipped: Tensor  # int64 [], number of updates skipped


def apply_if_finite(opt: OptimizerLike) -> Optimizer:
    """Skip an update if a gradient, the value or a new parameter is infinite or NaN.

    The updates are then 0, the state of `opt` does not change, and `skipped` in the state is one
    higher. New parameters are tested in their own dtype, if they were finite before the update.
    `train_step` then keeps the old buffers too, if new ones are not finite.

    Args:
        opt: applied when everything is finite.

    Raises:
        TypeError: `opt` is not an optimizer.

    >>> from fdl import optim
    >>> opt, params = apply_if_finite(optim.sgd(1.0)), {"w": torch.ones(1)}
    >>> updates, state = opt.update({"w": torch.tensor([torch.nan])}, opt.init(params), params)
    >>> updates, state.skipped
    ({'w': tensor([0.])}, tensor(1))
    """
    begin, step = as_optimizer("apply_if_finite", opt)

    def init(params: Tree) -> FiniteState:
        return FiniteState(begin(params), scalar(params, 0, torch.int64))

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
            tree_where(finite, inner, state.inner), state.skipped + ~finite
        )

    return Optimizer(init, update)


@register
class AccumulateState(NamedTuple):
    """The state of `accumulate`."""

    inner: Tree
    mean: Tree  # like params, in float32 at least: Σ count · g / k so far
    value: Tensor  # float64 []: Σ count · value / k so far
    gathered: Tensor  # int64 [], number of gradients so far, below k
    # float64 [], Σ (count − 1) so far. Files of earlier versions, in which each gradient counted 1,
    # lack it.
    surplus: Tensor = NO_SURPLUS


def accumulate(opt: OptimizerLike, k: int) -> Optimizer:
    """Accumulate the gradients of k updates, then apply `opt` once, to their mean.

    The updates in between are 0. With losses that are means, k micro-batches make the step of the
    whole batch: each gradient is weighted by `count`, which `train_step` passes, so that a padded
    batch counts less; without a count all weights are equal. `opt` is passed the mean of the k
    values with the same weights, and no `value_fn`, which would be that of one micro-batch. A leaf
    needs all k gradients or none: while its gradient is `None`, it and its mean do not change.

    Gradients accumulated when training ends are not applied. Make the number of micro-batches a
    multiple of k, or complete the last window with updates of `count=0`, which `train_step` makes
    of batches whose mask is all False.

    Args:
        opt: applied to the mean.
        k: number of gradients per update.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: `k` is not an int of at least 1; (at update) a value or count with axes.

    >>> from fdl import optim
    >>> opt, params = accumulate(optim.sgd(1.0), k=2), {"w": torch.zeros(1)}
    >>> first, state = opt.update({"w": torch.tensor([1.0])}, opt.init(params), params, count=3)
    >>> second, state = opt.update({"w": torch.tensor([5.0])}, state, params, count=1)
    >>> first, second
    ({'w': tensor([0.])}, {'w': tensor([-2.])})
    """
    begin, step = as_optimizer("accumulate", opt)
    check_whole("accumulate", "k", k, least=1)

    def init(params: Tree) -> AccumulateState:
        check_floating(params, "accumulate")
        zero = scalar(params, 0, torch.float64)
        gathered = scalar(params, 0, torch.int64)
        mean = tree.map(torch.zeros_like, params)
        return AccumulateState(begin(params), mean, zero, gathered, zero.clone())

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
        mean = map_leaves(
            lambda m, g: m if g is None else m + weigh(count, g.to(m.dtype)) / k, state.mean, grads
        )
        if value is not None:
            total = total + weigh(count, as_value("accumulate", value, total)) / k
        # Divide by Σ count instead of k: the factor is exactly 1 if each count is 1.
        weight = gathered + surplus
        share = torch.where(weight > 0, k / torch.where(weight > 0, weight, 1.0), 0.0)
        means = map_leaves(lambda m, g: None if g is None else m * share.to(m.dtype), mean, grads)
        updates, inner = step(
            means,
            state.inner,
            params,
            value=None if value is None else total * share,
            count=None if count is None else weight,
        )
        full = gathered >= k
        return zero_unless(full, updates), AccumulateState(
            tree_where(full, inner, state.inner),
            map_leaves(lambda m, g: m if g is None else torch.where(full, 0.0, m), mean, grads),
            torch.where(full, 0.0, total),
            torch.where(full, 0, gathered),
            torch.where(full, 0.0, surplus),
        )

    return in_32_bits(init, update)
