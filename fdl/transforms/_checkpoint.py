"""`checkpoint`: recompute intermediate values for the gradient instead of storing them."""

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
from fdl._compiler._common_subexpressions import stop_merging
from fdl._compiler._settings import current_settings, use_settings
from fdl._modes import is_tracing
from fdl.optim._base import check_floating
from fdl.tree import Tree
from fdl.tree._checks import check_tensors
from fdl.tree._paths import dotted, join

Flat = Callable[..., tuple[Tensor, ...]]  # tensors to floating tensors
Named = tuple[str, Tensor]


def stop_gradient(value: Tree) -> Tree:
    """Return a tree through which neither gradients nor tangents flow.

    This is `detach` for trees, at every level of `torch.func`; equals `jax.lax.stop_gradient`.

    Raises:
        TypeError: a leaf is not a tensor.

    >>> from torch.func import grad
    >>> grad(lambda x: x * stop_gradient(x))(torch.tensor(3.0))
    tensor(3.)
    """
    check_tensors(tree.leaves(value), value, "stop_gradient: every leaf")
    return tree.map(lambda leaf: leaf.detach(), value)


def checkpoint(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make `f` store only its arguments for its gradient, and run again to compute it.

    Values and gradients are those of `f`, at the price of one more run; equals `jax.checkpoint`.
    The second run draws the same random numbers, since its key is an argument, and has the
    autocast, default dtype and default device of the first. Works under `grad`, `vmap` and `jvp`
    (`torch.utils.checkpoint` does not), in `fdl.jit`, and with `backward()`. Inside `torch.compile`
    it is `f` itself, because Dynamo traces second derivatives of such functions wrongly.

    To checkpoint a block of a model: `block._replace(apply=checkpoint(block.apply))`.

    Args:
        f: a pure function from trees to a tree of floating tensors. Gradients may only be taken
            with respect to its arguments; arguments that are not tensors (None, flags) are allowed.

    Raises:
        ValueError: `f` closes over a tensor with respect to which a gradient is being taken, or its
            result has leaves that are not floating tensors (at call).

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
                f"checkpoint: the function closes over {', '.join(tracked)}, and a gradient is "
                "being taken with respect to it, which would be lost: pass it as an argument"
            )
        settings = current_settings()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors.sort(key=lambda i: not leaves[i].is_floating_point())
        floats = sum(leaves[i].is_floating_point() for i in tensors)
        out_specs: list[pytree.TreeSpec] = []

        def flat(*tensor_leaves: Tensor) -> tuple[Tensor, ...]:
            replaced = list(leaves)
            for i, leaf in zip(tensors, tensor_leaves, strict=True):
                replaced[i] = leaf
            args, kwargs = pytree.tree_unflatten(replaced, spec)
            with use_settings(settings):
                result = f(*args, **kwargs)
            check_floating(result, "checkpoint: the result")
            out_specs[:] = [pytree.tree_structure(result)]
            return tuple(tree.leaves(result))

        xs = [leaves[i] for i in tensors]
        for i in tensors:  # `flat` may outlive this call, and must not keep them
            leaves[i] = None
        results = _rematerialised(flat, xs[:floats], xs[floats:])
        return pytree.tree_unflatten(results, out_specs[0])

    return call


class _Remat(torch.autograd.Function):
    """Saves the inputs of a function, but no intermediate values.

    Its backward pass is a `_Remat` too: `torch.func.grad` records the backward pass, so that it can
    be differentiated again, and would otherwise keep its intermediate values.
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
        # Forward-mode differentiation writes to tangents that have the strides of the primals.
        cotangents = tuple(z.clone() if 0 in z.stride() else z for z in cotangents)
        xs, others = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        if is_tracing():  # otherwise the program would keep the values of the first run
            xs = [stop_merging(x) for x in xs]

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
    """Call `f(*xs, *others)`, saving only these for its gradient with respect to floating `xs`."""
    return cast(Any, _Remat.apply(f, len(xs), *xs, *others))


def _is_differentiated(x: Tensor) -> bool:
    """Check whether a gradient or a tangent flows through `x`, at any level of `torch.func`."""
    while True:
        if x.requires_grad or forward_ad.unpack_dual(x).tangent is not None:
            return True
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)


def _closed_over(f: Any, name: str = "", seen: frozenset[int] = frozenset()) -> Iterator[Named]:
    """List the tensors in the closure of `f` and of functions in it, with their names."""
    if id(f) in seen:  # a function that calls itself
        return
    seen |= {id(f)}
    if isinstance(f, partial):
        yield from _closed_over((f.func, f.args, f.keywords), name, seen)
    elif getattr(f, "__closure__", None):
        for inner, cell in zip(f.__code__.co_freevars, f.__closure__, strict=True):
            with suppress(ValueError):  # an empty cell
                yield from _closed_over(cell.cell_contents, inner, seen)
    else:
        for path, leaf in pytree.tree_flatten_with_path(f)[0]:
            if isinstance(leaf, Tensor):
                yield join(name, dotted(path)), leaf
            elif callable(leaf):
                yield from _closed_over(leaf, name, seen)
