"""Keep a `torch.autograd.Function` in the graph of a loop body, with its own derivative.

A body that is traced outside of all transformations (`_closed_body.py`) would only run the forward
pass. So the call becomes one node, which calls the function again where the graph is transformed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch as functorch
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)

from fdl import _modes
from fdl._compiler._trace import Tracing, plain

Apply = Callable[..., Any]


class CannotClose(Exception):
    """A loop body cannot be traced outside of the transformations around it."""


def recording(apply: Any) -> Any:
    """Make a replacement of the class method `Function.apply` that records calls as nodes."""

    def recorded(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        run = apply.__get__(None, cls)
        tracing = _modes.tracing.get()
        if tracing is None or tracing.decompose or get_proxy_mode() is None:
            return run(*args, **kwargs)
        if not _modes.in_transform():
            return _record(cls, run, tracing, args, kwargs)
        if functorch.peek_interpreter_stack().key() == functorch.TransformType.Functionalize:
            raise CannotClose(f"{cls.__name__}.apply stands beside operations in place")
        return run(*args, **kwargs)

    return classmethod(recorded)


def _record(
    cls: type[torch.autograd.Function],
    run: Apply,
    tracing: Tracing,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [tracing.substitute(functorch.unwrap_if_dead(leaves[i])) for i in indices]
    leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # not kept

    def call(apply: Apply, *tensors: Tensor) -> Any:
        replaced = list(leaves)
        for i, leaf in zip(indices, tensors, strict=True):
            replaced[i] = leaf
        args, kwargs = pytree.tree_unflatten(replaced, spec)
        return apply(*args, **kwargs)

    def node(*tensors: Tensor) -> Any:
        return call(cls.apply, *tensors)

    node.__name__ = cls.__name__
    versions = [x._version for x in tensors]
    closed_over = tracing.count_substitutes()
    with disable_proxy_modes_tracing():
        result = call(run, *tensors)
        result = pytree.tree_map_only(Tensor, plain, result)  # may be an argument
    if versions != [x._version for x in tensors]:
        raise CannotClose(f"{cls.__name__}.apply changes an argument in place")
    if closed_over != tracing.count_substitutes():
        raise CannotClose(f"{cls.__name__}.apply closes over a tensor")
    tracer = cast(Any, get_proxy_mode()).tracer
    proxy = tracer.create_proxy("call_function", node, tuple(map(tracer.unwrap_proxy, tensors)), {})
    return track_tensor_tree(result, proxy, constant=None, tracer=tracer)
