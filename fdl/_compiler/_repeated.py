"""Trace a function of one leaf once, and copy what it recorded for other leaves of the same form.

An optimizer calls its rule for every parameter. For two that are alike in shape, strides, dtype and
device it records the same operations, and to copy these takes a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Node, Proxy
from torch.fx.experimental.proxy_tensor import track_tensor_tree
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from fdl import _modes
from fdl._compiler._graph import may_be_view
from fdl._compiler._trace import current_trace, proxy_node
from fdl._compiler._zeros import MARK

T = TypeVar("T")


class Recording(NamedTuple):
    """What a function did with arguments of one form."""

    arguments: Sequence[Node | None]
    nodes: Sequence[Node]  # to be copied: those that depend on the arguments
    results: Sequence[Any]  # nodes, of these or of arguments, and what is the same for all
    spec: pytree.TreeSpec  # of the results


def repeated(f: Callable[..., T]) -> Callable[..., T]:
    """Make a pure function of tensors, or None, that takes less time to trace when called again.

    >>> repeated(torch.add)(torch.ones(1), torch.ones(1))
    tensor([2.])
    """
    if not _modes.is_tracing() or _modes.in_transform():
        return f
    recordings: dict[Hashable, Recording | None] = {}

    def call(*args: Any) -> T:
        form = _form(args)
        if form is None:
            return f(*args)
        if form not in recordings:
            result, recordings[form] = _record(f, args)
            return result
        recording = recordings[form]
        return f(*args) if recording is None else _copy(recording, args)

    return call


def _form(args: Sequence[Any]) -> Hashable:
    """Return what decides about the operations; None if an argument is not a part of the graph."""
    parts: list[Any] = []
    with torch._C.DisableTorchFunction():
        for x in args:
            if x is None:
                parts.append(None)
                continue
            if type(x) is not FakeTensor or proxy_node(x) is None or x.layout is not torch.strided:
                return None
            if x.requires_grad or x.is_conj() or x.is_neg() or hasattr(x, MARK):
                return None
            first = next(i for i, y in enumerate(args) if y is x)
            parts.append((x.shape, x.stride(), x.dtype, x.device, first))
    return (*parts,)


def _record(f: Callable[..., T], args: Sequence[Any]) -> tuple[T, Recording | None]:
    """Call a function; return its result, and what it recorded unless that cannot be copied."""
    last = next(iter(reversed(current_trace().tracers[-1].graph.nodes)))
    result = f(*args)
    arguments = [None if x is None else proxy_node(x) for x in args]
    recorded: list[Node] = []
    while (node := (recorded or [last])[-1].next).op != "root":
        recorded.append(node)
    leaves, spec = pytree.tree_flatten(result)
    sources = [proxy_node(x) if type(x) is FakeTensor else None for x in leaves]
    known = all(
        source is not None or not isinstance(leaf, Tensor)
        for leaf, source in zip(leaves, sources, strict=True)
    )
    if not known or not all(map(_is_pure, recorded)):
        return result, None
    nodes: dict[Node, None] = {}
    for node in recorded:
        if any(x in nodes or x in arguments for x in node.all_input_nodes):
            nodes[node] = None
    if any(source in recorded and source not in nodes for source in sources):
        nodes = dict.fromkeys(recorded)  # each call returns a tensor of its own
    results = [
        source if source in nodes or (source and source in arguments) else leaf
        for leaf, source in zip(leaves, sources, strict=True)
    ]
    return result, Recording(arguments, list(nodes), results, spec)


def _is_pure(node: Node) -> bool:
    """Check for an operation with one result, a tensor, that changes nothing."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return False
    is_single = len(target._schema.returns) == 1
    return is_single and not target._schema.is_mutable and type(node.meta.get("val")) is FakeTensor


def _copy(recording: Recording, args: Sequence[Any]) -> Any:
    """Return the result of a recorded function for other arguments."""
    tracing = current_trace()
    tracer = tracing.tracers[-1]
    copies: dict[Node, Node] = {}
    values: dict[Node, Tensor] = {}  # of what is recorded, but for these arguments
    for node, x in zip(recording.arguments, args, strict=True):
        if node is not None:
            copies[node], values[node] = cast(Node, proxy_node(x)), x
    with torch._C.DisableTorchFunction():
        with _disable_current_modes():
            for node in recording.nodes:
                copies[node] = copy = tracer.graph.node_copy(node, lambda n: copies.get(n, n))
                values[node] = copy.meta["val"] = _value(node, values, tracing.mode)
        results = [values[x] if isinstance(x, Node) else x for x in recording.results]
        for node, made in zip(recording.results, results, strict=True):
            if node in recording.nodes:
                track_tensor_tree(made, Proxy(copies[node], tracer), constant=None, tracer=tracer)
                tracing.leaks.note(made, node.target)
    return pytree.tree_unflatten(results, recording.spec)


def _value(node: Node, values: dict[Node, Tensor], mode: FakeTensorMode) -> Tensor:
    """Make what a node computes: a view of what it is a view of, or a tensor of its own."""
    if not may_be_view(node):
        like: FakeTensor = node.meta["val"]
        sizes, strides = like.shape, like.stride()
        memory = torch.empty_strided(sizes, strides, dtype=like.dtype, device="meta")
        return FakeTensor(mode, memory, like.fake_device)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values.get(n, n.meta["val"]))
    with mode:
        view: Tensor = cast(Any, node.target)(*args, **kwargs)
        return view.detach()  # does not keep its base
