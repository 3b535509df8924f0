"""Python functions that a program calls with the values of its tensors while it runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import has_side_effect

from fdl._compiler._graph import copy_graph
from fdl._modes import is_eager, is_tracing

Function = Callable[[list[Tensor]], None]

_library = torch.library.Library("fdl", "FRAGMENT")
# A program cannot hold a Python function: it names one by its number.
_library.define("callback(Tensor[] values, int number, int batches) -> ()")
CALLBACK = has_side_effect(torch.ops.fdl.callback.default)
NOTHING = 0  # the number of a function that does nothing
_functions: dict[int, Function] = {NOTHING: lambda values: None}
_numbers = itertools.count(NOTHING + 1)
_thread = threading.local()


def call_back(fn: Function, values: Sequence[Tensor]) -> None:
    """Call `fn(values)` now, or, while `jit` traces, whenever the program gets there.

    Under `vmap`, `fn` is called for each member; under other transformations with the primals.
    """
    if is_eager():
        return fn([value.detach() for value in values])
    number, n = next(_numbers), len(values)
    _functions[number] = lambda values: fn(values[:n])
    # Inductor takes the device of an operation from its arguments: there has to be one.
    try:
        CALLBACK([*values] or [torch.zeros(())], number, 0)
    finally:
        if not is_tracing():
            del _functions[number]
            take_error()


def calls_back(module: GraphModule) -> bool:
    """Check for callbacks in a graph, and in the bodies of its loops."""
    return any(
        each.graph.find_nodes(op="call_function", target=CALLBACK) for each in _graphs(module)
    )


def without_callbacks(module: GraphModule) -> GraphModule:
    """Copy a graph, and the bodies of its loops, without their callbacks."""
    if not calls_back(module):
        return module
    copy = copy_graph(module)
    for each in _graphs(copy):
        for node in each.graph.find_nodes(op="call_function", target=CALLBACK):
            each.graph.erase_node(node)
        each.recompile()
    return copy


def _graphs(module: GraphModule) -> list[GraphModule]:
    """List a graph, and the bodies of its loops."""
    return [each for each in module.modules() if isinstance(each, GraphModule)]


def keep(result: Tensor) -> None:
    """Keep the operation that computes `result` in the graph, though it may be unused."""
    CALLBACK([result], NOTHING, 0)


def _call(values: list[Tensor], number: int, batches: int) -> None:
    # Copies: the program may overwrite its intermediate values.
    try:
        for member in _members([value.detach().clone() for value in values], batches):
            _functions[number](member)
    except BaseException as error:
        _thread.error = error
        raise


def take_error() -> BaseException | None:
    """Return the error of a callback of this thread, which a program in C++ replaces by its own."""
    error: BaseException | None = getattr(_thread, "error", None)
    _thread.error = None
    return error


def _members(values: list[Tensor], batches: int) -> Iterator[list[Tensor]]:
    """Take apart the first axes of all values."""
    if not batches:
        yield values
        return
    for rows in zip(*values, strict=True):
        yield from _members(list(rows), batches - 1)


def _call_for_each(
    info: Any, in_dims: Any, values: list[Tensor], number: int, batches: int
) -> tuple[None, None]:
    """Move the axis of `vmap` behind those of the ones around it, which come later."""
    moved = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(values, in_dims[0], strict=True)
    ]
    CALLBACK(moved, number, batches + 1)
    return None, None


_library.impl("callback", _call, "CompositeExplicitAutograd")
torch.library.register_fake("fdl::callback", lambda values, number, batches: None, lib=_library)
torch.library.register_vmap("fdl::callback", _call_for_each, lib=_library)
