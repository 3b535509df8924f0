"""Loss scaling, against underflow of float16 gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._kinds import register
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.optim._base import Optimizer, State, map_grads, match_grads, upcast
from fdl.optim._conditional import FiniteState
from fdl.optim._helpers import (
    all_finite,
    check_whole,
    keeps_finite,
    scalar,
    stays_finite,
    tree_where,
    zero_unless,
)
from fdl.tree import Tree
from fdl.tree._paths import dotted

LEAST_SCALE = 2.0**-24


@register
class LossScaleState(NamedTuple):
    """The state of `loss_scale`."""

    inner: Tree
    scale: Tensor  # float32 [], factor of the next loss
    good: Tensor  # int64 [], updates with finite gradients since the scale last changed


def loss_scale(
    opt: OptimizerLike,
    init: float = 2.0**15,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
) -> Optimizer:
    """Scale the loss before it is differentiated, so that float16 gradients do not underflow.

    The gradients are divided by the scale, in float32, before `opt` sees them. If one of them is
    then not finite, or a new parameter would not be, the update is 0, the state of `opt` does not
    change, and the scale is multiplied by `backoff_factor`. After `growth_interval` finite updates
    in a row it is multiplied by `growth_factor`, unless it would overflow float32. These are the
    rules of `torch.amp.GradScaler`, except that the scale does not fall below 2⁻²⁴, the smallest
    number of float16 (or `init`, if that is less), while torch's falls to 0. `train_step` scales
    the loss itself, and keeps the old buffers if new ones are not finite; a loop of your own
    differentiates `value * optim.loss_scale_of(state)` and passes the unscaled `value`.

    Put clipping and everything else that depends on gradients inside:
    `loss_scale(chain(clip, sgd))`. Source: Micikevicius et al., Mixed Precision Training, 2018,
    https://arxiv.org/abs/1710.03740

    Args:
        opt: applied to the unscaled gradients.
        init: initial scale.
        growth_interval: number of finite updates in a row after which the scale grows.
        growth_factor: factor of growth, above 1.
        backoff_factor: factor after an overflow, between 0 and 1.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: a number out of its range; (at init) `opt` already contains a `loss_scale`.

    >>> from fdl import optim
    >>> opt, params = loss_scale(optim.sgd(1.0), init=4.0), {"w": torch.ones(1)}
    >>> updates, state = opt.update({"w": torch.tensor([4.0])}, opt.init(params), params)
    >>> updates
    {'w': tensor([-1.])}
    >>> opt.update({"w": torch.tensor([torch.inf])}, state, params)[1].scale
    tensor(2.)
    """
    begin, step = as_optimizer("loss_scale", opt)
    check_whole("loss_scale", "growth_interval", growth_interval, least=1)
    largest = torch.finfo(torch.float32).max
    for name, number, low, high in (
        ("init", init, 0.0, largest),
        ("growth_factor", growth_factor, 1.0, largest),
        ("backoff_factor", backoff_factor, 0.0, 1.0),
    ):
        if not (isinstance(number, (int, float)) and low < number < high):
            raise ValueError(
                f"loss_scale: {name} must be above {low:g} and below {high:.3g}, got {number!r}"
            )

    def start(params: Tree) -> LossScaleState:
        inner = begin(params)
        if loss_scale_of(inner) is not None:
            raise ValueError(
                "loss_scale: there is a loss_scale inside already; keep one of the two"
            )
        scale, good = scalar(params, init, torch.float32), scalar(params, 0, torch.int64)
        return LossScaleState(inner, scale, good)

    floor = min(LEAST_SCALE, init)

    def update(
        grads: Tree, state: LossScaleState, params: Tree, **extra: Any
    ) -> tuple[Tree, LossScaleState]:
        match_grads(grads, params, "loss_scale")
        plain = map_grads(lambda g: upcast(g) / state.scale, grads)
        finite = all_finite(plain, state.scale.device)
        updates, inner = step(zero_unless(finite, plain), state.inner, params, **extra)
        finite = finite & stays_finite(params, updates, state.scale.device)
        grows = state.good + 1 >= growth_interval
        grown = (state.scale.double() * growth_factor).float()
        grown = torch.where(grows & torch.isfinite(grown), grown, state.scale)
        shrunk = (state.scale.double() * backoff_factor).clamp(min=floor).float()
        return zero_unless(finite, updates), LossScaleState(
            tree_where(finite, inner, state.inner),
            torch.where(finite, grown, shrunk),
            torch.where(finite & ~grows, state.good + 1, 0),
        )

    return Optimizer(start, update)


def loss_scale_of(state: Tree) -> Tensor | None:
    """Return the factor of the next loss, or `None` if the optimizer does not scale losses.

    Raises:
        ValueError: the `loss_scale` is not the first to see all gradients.

    >>> from fdl import optim
    >>> params = {"w": torch.ones(1)}
    >>> loss_scale_of(optim.loss_scale(optim.sgd(0.1)).init(params))
    tensor(32768.)
    >>> loss_scale_of(optim.sgd(0.1).init(params)) is None
    True
    """
    scale = None
    ends = (LossScaleState, FiniteState, State)  # a State cannot contain a loss_scale
    pairs, _ = pytree.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, ends))
    for entries, node in pairs:
        if isinstance(node, FiniteState) and loss_scale_of(node.inner) is not None:
            raise ValueError(
                "apply_if_finite: the loss_scale inside never sees an overflow, which is skipped "
                "before; remove apply_if_finite (loss_scale skips overflows too), or put it inside"
            )
        if not isinstance(node, LossScaleState):
            continue
        if any(
            isinstance(entry, pytree.MappingKey)
            or (isinstance(entry, pytree.SequenceKey) and entry.idx > 0)
            for entry in entries
        ):
            raise ValueError(
                f"loss_scale: at {dotted(entries)!r} of the state it does not see all "
                "gradients first, so that others stay scaled; put the whole chain, or all parts, "
                "inside loss_scale(...)"
            )
        scale = node.scale
    return None if scale is None else scale.clone()


def keep_finite(state: Tree, old: Tree, new: Tree) -> Tree:
    """Keep the old buffers where an update that skips bad gradients goes with bad new buffers.

    A batch with a NaN leaves one in the running statistics too, for good. Buffers that stay finite
    are the new ones even if the update was skipped, as with torch's `GradScaler`.

    Args:
        state: of an optimizer; without `apply_if_finite` and `loss_scale` the new buffers are kept.
        old: the buffers before the step.
        new: those after it.

    >>> from fdl import optim
    >>> state = optim.apply_if_finite(optim.sgd(0.1)).init({})
    >>> keep_finite(state, {"mean": torch.ones(1)}, {"mean": torch.tensor([torch.nan])})
    {'mean': tensor([1.])}
    """
    skips = (FiniteState, LossScaleState)
    nodes = pytree.tree_leaves(state, is_leaf=lambda node: isinstance(node, (State, *skips)))
    leaves = tree.leaves(new)
    if not leaves or not any(isinstance(node, skips) for node in nodes):
        return new
    return tree_where(keeps_finite(old, new, leaves[0].device), new, old)
