"""`loss.backward()` through a jitted function: the backward pass is a jitted function too."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl.tree import Tree

__all__ = ["differentiable", "pullback"]


def pullback(
    fn: Callable[..., Any], spec: pytree.TreeSpec
) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
    """Make the pure function from arguments and cotangents to the gradients of the arguments.

    Both sides have entries for floating leaves only; `fn` runs once more, as in checkpointing.
    """

    def backward(leaves: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        def flat(*floating: Tensor) -> list[Tensor]:
            given = iter(floating)
            whole = [next(given) if x.is_floating_point() else x for x in leaves]
            args, kwargs = pytree.tree_unflatten(whole, spec)
            return _floating(pytree.tree_leaves(fn(*args, **kwargs)))

        vjp = torch.func.vjp(flat, *_floating(leaves))[1]
        return list(vjp(cotangents))

    return backward


def differentiable(
    run: Callable[[list[Tensor]], Tree],
    backward: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    leaves: Sequence[Tensor],
) -> Tree:
    """Run a function of flat arguments so that autograd finds its backward pass."""
    specs: list[pytree.TreeSpec] = []

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
            ctx.save_for_backward(*leaves)
            results, spec = pytree.tree_flatten(run([leaf.detach() for leaf in leaves]))
            ctx.mark_non_differentiable(*(x for x in results if not x.is_floating_point()))
            specs.append(spec)
            return tuple(results)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
            leaves = list(ctx.saved_tensors)
            grads = iter(backward(leaves, _floating(cotangents)))
            return tuple(next(grads) if x.is_floating_point() else None for x in leaves)

    return pytree.tree_unflatten(list(Call.apply(*leaves)), specs[0])


def _floating(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in leaves if x.is_floating_point()]
