"""`loss.backward()` through a jitted function, by a jitted backward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fdl._compiler._graph import is_smooth
from fdl._compiler._settings import Settings, use_settings
from fdl._compiler._signature import flatten, unflatten
from fdl.tree import Tree

Pullback = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def pullback(
    fn: Callable[..., Any], spec: Hashable, wanted: Sequence[int], settings: Settings
) -> Pullback:
    """Make the pure function from arguments and cotangents to gradients.

    It takes a cotangent for each floating or complex result, and returns a gradient for each
    `wanted` leaf of the arguments. `fn` runs once more, as in checkpointing, under `settings`.
    """

    def backward(leaves: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        def flat(*chosen: Tensor) -> list[Tensor]:
            replaced = list(leaves)
            for i, leaf in zip(wanted, chosen, strict=True):
                replaced[i] = leaf
            args, kwargs = unflatten(replaced, spec)
            with use_settings(settings):
                result = fn(*args, **kwargs)
            return _differentiable(flatten(result)[0])

        vjp = torch.func.vjp(flat, *(leaves[i] for i in wanted))[1]
        return list(vjp(cotangents))

    return backward


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], backward: Pullback, *leaves: Tensor) -> Any:
        ctx.save_for_backward(*leaves)
        ctx.pullback = backward
        ctx.wanted = [leaf.requires_grad for leaf in leaves]
        results = run([leaf.detach() for leaf in leaves])
        smooth = {id(x) for x in _differentiable(results)}
        ctx.mark_non_differentiable(*(x for x in results if id(x) not in smooth))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grads = iter(ctx.pullback(list(ctx.saved_tensors), _differentiable(cotangents)))
        return None, None, *(next(grads) if wanted else None for wanted in ctx.wanted)


def differentiable(
    run: Callable[[list[Tensor]], Tree], backward: Pullback, leaves: Sequence[Tensor]
) -> Tree:
    """Run a function of leaves with a custom backward pass.

    Args:
        run: the function; autograd does not record it.
        backward: its `pullback` to the leaves that require grad.
        leaves: the arguments.
    """
    specs: list[Hashable] = []

    def flat(leaves: list[Tensor]) -> list[Tensor]:
        results, spec = flatten(run(leaves))
        specs.append(spec)
        return results

    results = cast(Any, _Call.apply(flat, backward, *leaves))
    return unflatten(list(results), specs[0])


def _differentiable(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in leaves if is_smooth(x)]
