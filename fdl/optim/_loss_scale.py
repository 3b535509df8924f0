"""Scaling of the loss, against underflow of float16 gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._kinds import register
from fdl.optim._base import Optimizer, State, lift, map_grads, match_grads, update_of
from fdl.optim._conditional import FiniteState
from fdl.optim._helpers import all_finite, check_whole, keep, scalar, stays_finite, zero_unless
from fdl.tree import Tree
from fdl.tree._paths import dotted

LEAST_SCALE = 2.0**-24


@register
class LossScaleState(NamedTuple):
    """The state of `loss_scale`."""

    inner: Tree
    scale: Tensor  # float32 [], what the next loss is multiplied by
    good: Tensor  # int64 [], finite gradients since the scale last changed


def loss_scale(
    opt: Optimizer,
    init: float = 2.0**15,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
) -> Optimizer:
    """Multiply the loss before it is differentiated, so that float16 gradients do not underflow.

    The gradients are divided by the scale, in float32, before `opt` sees them. If one is not finite
    then, or a parameter would no longer be, the update is 0, the state of `opt` stays, and the
    scale falls by `backoff_factor`; after `growth_interval` finite ones in a row it grows by
    `growth_factor`, unless it would leave float32: the rules of `torch.amp.GradScaler`, except that
    the scale does not fall below 2⁻²⁴ (or `init`, if that is less), the least number of float16,
    while torch's falls to 0. `train_step` multiplies the loss itself; a loop of your own
    differentiates `value * optim.loss_scale_of(state)` and passes the plain `value`.

    Clipping and all else that looks at gradients belongs inside: `loss_scale(chain(clip, sgd))`.
    Source: Micikevicius et al., 2018.

    Args:
        opt: what to apply to the gradients of the plain loss.
        init: the first scale.
        growth_interval: how many finite gradients in a row let it grow.
        growth_factor: above 1.
        backoff_factor: between 0 and 1.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: a number out of its range; `opt` holds a `loss_scale` already (at init).

    >>> from fdl import optim
    >>> opt, params = loss_scale(optim.sgd(1.0), init=4.0), {"w": torch.ones(1)}
    >>> updates, state = opt.update({"w": torch.tensor([4.0])}, opt.init(params), params)
    >>> updates
    {'w': tensor([-1.])}
    >>> opt.update({"w": torch.tensor([torch.inf])}, state, params)[1].scale
    tensor(2.)
    """
    step = update_of("loss_scale", opt)
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
        inner = opt.init(params)
        if loss_scale_of(inner) is not None:
            raise ValueError("loss_scale: there is a loss_scale inside already; keep one of them")
        scale, good = scalar(params, init, torch.float32), scalar(params, 0, torch.int64)
        return LossScaleState(inner, scale, good)

    floor = min(LEAST_SCALE, init)

    def update(
        grads: Tree, state: LossScaleState, params: Tree, **extra: Any
    ) -> tuple[Tree, LossScaleState]:
        match_grads(grads, params, "loss_scale")
        plain = map_grads(lambda g: lift(g) / state.scale, grads)
        finite = all_finite(plain, state.scale.device)
        updates, inner = step(zero_unless(finite, plain), state.inner, params, **extra)
        finite = finite & stays_finite(params, updates, state.scale.device)
        grows = state.good + 1 >= growth_interval
        grown = (state.scale.double() * growth_factor).float()
        grown = torch.where(grows & torch.isfinite(grown), grown, state.scale)
        shrunk = (state.scale.double() * backoff_factor).clamp(min=floor).float()
        return zero_unless(finite, updates), LossScaleState(
            keep(finite, inner, state.inner),
            torch.where(finite, grown, shrunk),
            torch.where(finite & ~grows, state.good + 1, 0),
        )

    return Optimizer(start, update)


def loss_scale_of(state: Tree) -> Tensor | None:
    """Read what the next loss is multiplied by, or `None` if the optimizer scales no losses.

    Raises:
        ValueError: a `loss_scale` that does not see all gradients as they come.

    >>> from fdl import optim
    >>> params = {"w": torch.ones(1)}
    >>> loss_scale_of(optim.loss_scale(optim.sgd(0.1)).init(params))
    tensor(32768.)
    >>> loss_scale_of(optim.sgd(0.1).init(params)) is None
    True
    """
    scale = None
    ends = (LossScaleState, FiniteState, State)  # nothing to be found in a State
    pairs, _ = pytree.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, ends))
    for entries, node in pairs:
        if isinstance(node, FiniteState) and loss_scale_of(node.inner) is not None:
            raise ValueError(
                "apply_if_finite: the loss_scale inside never sees an overflow, which it skips "
                "itself; leave apply_if_finite out, or put it inside"
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
