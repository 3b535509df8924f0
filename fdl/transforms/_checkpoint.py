"""`checkpoint`: forget what a function computes, and compute it again for its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp

from fdl import tree
from fdl._compiler._settings import ambient, under
from fdl.optim._base import check_floating
from fdl.tree import Tree
from fdl.tree._checks import check_tensors
from fdl.tree._paths import dotted, join

Flat = Callable[..., tuple[Tensor, ...]]  # tensors to floating tensors
Named = tuple[str, Tensor]


def stop_gradient(value: Tree) -> Tree:
    """Return the tree as constants: no gradient and no tangent goes through it.

    `detach` for trees, at every level of `torch.func`; equals `jax.lax.stop_gradient`.

    Raises:
        TypeError: a leaf is not a tensor.

    >>> from torch.func import grad
    >>> grad(lambda x: x * stop_gradient(x))(torch.tensor(3.0))
    tensor(3.)
    """
    check_tensors(tree.leaves(value), value, "stop_gradient: every leaf")
    return tree.map(lambda leaf: leaf.detach(), value)


def checkpoint(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make `f` keep only its arguments for its gradient, and run again where that is computed.

    Values are those of `f`, gradients too, for one more run of `f`; equals `jax.checkpoint`.
    `torch.utils.checkpoint` does not work inside `torch.func`. Random numbers come from keys, and a
    key is an argument, so the second run draws the same; it runs under the autocast, the default
    dtype and the default device of the first. Works under `grad`, `vmap`, `jvp`, in
    `fdl.jit`, and with `backward()`. Inside `torch.compile` it is `f` itself: Dynamo traces such
    functions wrongly where they are differentiated twice.

    A block of a model: `block._replace(apply=checkpoint(block.apply))`.

    Args:
        f: a pure function of trees to a tree of floating tensors. Whatever is differentiated by
            must be an argument; arguments that are no tensors (None, flags) pass as they are.

    Raises:
        ValueError: `f` closes over a tensor that is differentiated by, or its result has leaves
            that are not floating tensors (at call).

    >>> from torch.func import grad
    >>> grad(checkpoint(lambda x: x.sin().sin()))(torch.tensor(0.0))
    tensor(1.)
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return f(*args, **kwargs)
        tracked = [name for name, leaf in _closed_over(f) if _is_differentiated(leaf)]
        if tracked:
            raise ValueError(
                f"checkpoint: the function closes over {', '.join(tracked)}, which is "
                "differentiated by; the gradient would be lost: make it an argument"
            )
        state = ambient()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors.sort(key=lambda i: not leaves[i].is_floating_point())
        floats = sum(leaves[i].is_floating_point() for i in tensors)
        made: list[pytree.TreeSpec] = []

        def flat(*given: Tensor) -> tuple[Tensor, ...]:
            whole = list(leaves)
            for i, leaf in zip(tensors, given, strict=True):
                whole[i] = leaf
            args, kwargs = pytree.tree_unflatten(whole, spec)
            with under(state):
                result = f(*args, **kwargs)
            check_floating(result, "checkpoint: the result")
            found, made[:] = tree.leaves(result), [pytree.tree_structure(result)]
            return tuple(found)

        given = [leaves[i] for i in tensors]
        return pytree.tree_unflatten(_rematerialised(flat, given[:floats], given[floats:]), made[0])

    return call


class _Remat(torch.autograd.Function):
    """Saves the inputs of a function, and nothing that it computes from them.

    The backward pass is one of these too. `torch.func.grad` records it, to be differentiable once
    more, and would keep everything in it that this is to forget.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(f: Flat, floats: int, *xs: Tensor) -> tuple[Tensor, ...]:
        return f(*xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.f, ctx.floats, *xs = inputs
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        f, n, m = ctx.f, ctx.floats, ctx.floats + len(cotangents)
        xs, others = ctx.saved_tensors[:n], ctx.saved_tensors[n:]

        def pullback(*args: Tensor) -> tuple[Tensor, ...]:
            return cast(tuple, vjp(lambda *xs: f(*xs, *args[m:]), *args[:n])[1](args[n:m]))

        grads = _rematerialised(pullback, (*xs, *cotangents), others)
        return None, None, *grads, *(None for _ in others)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        f, n = ctx.f, ctx.floats
        xs, others = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        return cast(tuple, jvp(lambda *xs: f(*xs, *others), xs, tangents[:n])[1])


def _rematerialised(f: Flat, xs: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Call `f(*xs, *others)`, keeping only these for its gradient by `xs`, which are floating."""
    return cast(Any, _Remat.apply(f, len(xs), *xs, *others))


def _is_differentiated(x: Tensor) -> bool:
    """Say whether a gradient or a tangent would go through `x`, at any level of `torch.func`."""
    while True:
        if x.requires_grad or forward_ad.unpack_dual(x).tangent is not None:
            return True
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)


def _closed_over(f: Any, name: str = "", seen: frozenset[int] = frozenset()) -> Iterator[Named]:
    """List the tensors in the closure of `f`, and of functions in it, with their names there."""
    if id(f) in seen:  # a function that calls itself
        return
    seen |= {id(f)}
    if isinstance(f, partial):
        yield from _closed_over((f.func, f.args, f.keywords), name, seen)
    elif getattr(f, "__closure__", None):
        for inner, cell in zip(f.__code__.co_freevars, f.__closure__, strict=True):
            with suppress(ValueError):  # a cell that is not filled yet
                yield from _closed_over(cell.cell_contents, inner, seen)
    else:
        for path, leaf in pytree.tree_flatten_with_path(f)[0]:
            if isinstance(leaf, Tensor):
                yield join(name, dotted(path)), leaf
            elif callable(leaf):
                yield from _closed_over(leaf, name, seen)
