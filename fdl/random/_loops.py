"""Loops that draw until everything is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fdl import _modes, tree
from fdl._compiler import while_loop

Carry = TypeVar("Carry")


def until_done(
    step: Callable[[Carry], Carry], is_done: Callable[[Carry], Tensor], init: Carry
) -> Carry:
    """Repeat `carry = step(carry)` until `is_done(carry)` is true of all elements."""
    return while_loop(lambda carry: ~is_done(carry).all(), step, init)


def until_each_is_done(
    step: Callable[..., Carry],
    is_done: Callable[[Carry], Tensor],
    init: Carry,
    constants: tuple[Tensor, ...],
) -> Carry:
    """As `until_done`, for a step that treats each element by itself: eagerly, only what is left.

    Args:
        step: a function of the carry and of `constants`, elementwise, which must leave the results
            of what is done alone.
        is_done: a function from the carry to bools, elementwise.
        init: the first carry; all its tensors, and `constants`, have one shape.
        constants: other arguments of the step.
    """
    if not _modes.is_eager():
        return until_done(lambda carry: step(carry, *constants), is_done, init)
    shape = constants[0].shape
    carry, constants = tree.map(torch.flatten, (init, constants))
    results = tree.map(torch.clone, carry)
    left = torch.arange(constants[0].numel(), device=constants[0].device)
    while left.numel():
        carry = step(carry, *constants)
        tree.map(lambda result, x, rows=left: result.index_copy_(0, rows, x), results, carry)
        rest = (~is_done(carry)).nonzero()[:, 0]
        left, carry, constants = tree.map(lambda x, rows=rest: x[rows], (left, carry, constants))
    return tree.map(lambda x: x.reshape(shape), results)
