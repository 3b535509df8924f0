"""Decompose the operations of a traced graph into the primitives that Inductor lowers.

This is not done while the function is traced: a program that is found in the cache on disk needs
no decompositions, and Inductor, which has them, takes a second to import. An operation on arguments
of one signature is decomposed once, so that many equal layers take no longer than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any, cast

from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fdl._compiler._decompositions import decompositions
from fdl._compiler._fakes import make_symbols
from fdl._compiler._graph import Verbatim, nodes_of, results_of
from fdl._compiler._signature import signature
from fdl._compiler._trace import Traced, trace_again

_Part = GraphModule | None  # None: the operation is a primitive


def decompose(traced: Traced) -> Traced:
    """Return a trace of primitives, which computes the same; the graph itself is changed."""
    make_symbols(traced.mode)  # loops that Inductor emits count their steps with one
    _decompose(traced.graph, traced, {})
    traced.mode.allow_scalar_outputs = True
    return traced


def _decompose(module: GraphModule, traced: Traced, known: dict[str, _Part]) -> None:
    for child in module.children():
        if isinstance(child, GraphModule):
            _decompose(child, traced, known)
    table = decompositions()
    for node in nodes_of(module.graph, "call_function"):
        if node.target not in table:
            continue
        key = repr((node.target, map_arg((node.args, node.kwargs), _described)))
        if key not in known:
            known[key] = _trace_operation(node, traced)
        part = known[key]
        if part is not None:
            _inline(node, part)
    module.graph.eliminate_dead_code()
    module.recompile()


def _described(node: Node) -> Any:
    value = node.meta["val"]
    lazy = value.is_conj(), value.is_neg()
    return Verbatim(f"<{signature([value])}, {value.storage_offset()}, {lazy}>")


def _arguments(node: Node) -> list[Node]:
    """List the tensors among the arguments of an operation, each as often as it is passed."""
    nodes: list[Node] = []
    map_arg((node.args, node.kwargs), nodes.append)
    return nodes


def _trace_operation(node: Node, traced: Traced) -> _Part:
    """Decompose an operation; the graph returns its results, without those that are None."""

    def fn(*leaves: Tensor) -> list[Tensor]:
        rest = iter(leaves)
        args, kwargs = map_arg((node.args, node.kwargs), lambda _: next(rest))
        return [x for _, x in _values(cast(Any, node.target)(*args, **kwargs))]

    with traced.mode:  # an argument that is passed twice has two names: the next may be passed once
        examples = [z.meta["val"].detach() for z in _arguments(node)]
    try:
        part, constants = trace_again(fn, examples, traced.mode)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None  # Inductor calls torch's own kernel, or refuses the operation
    return None if constants or _is_same(node, part) else part


def _is_same(node: Node, part: GraphModule) -> bool:
    """Check whether a graph is just the operation itself."""
    calls = [z for z in nodes_of(part.graph, "call_function") if z.target is not getitem]
    if [call.target for call in calls] != [node.target]:
        return False
    outer = dict(zip(nodes_of(part.graph, "placeholder"), _arguments(node), strict=True))
    arguments = map_arg((calls[0].args, calls[0].kwargs), outer.__getitem__)
    return repr(arguments) == repr((node.args, node.kwargs))


def _inline(node: Node, part: GraphModule) -> None:
    """Put a graph in the place of an operation."""
    graph = node.graph
    inner, outer = nodes_of(part.graph, "placeholder"), _arguments(node)
    copies = dict(zip(inner, outer, strict=True))
    with graph.inserting_before(node):
        for each in part.graph.nodes:
            if each.op == "call_function":
                copies[each] = graph.node_copy(each, copies.__getitem__)
    results = [copies[each] for each in results_of(part.graph)]
    value = node.meta.get("val")  # none of an operation without a result
    values = _values(value)
    new = {i: (z, part_value) for z, (i, part_value) in zip(results, values, strict=True)}
    if isinstance(value, Tensor):
        _replace(node, *new[0], outer)
    else:
        for user in list(node.users):
            _replace(user, *new[cast(int, user.args[1])], outer)
            graph.erase_node(user)
    graph.erase_node(node)


def _values(result: Any) -> list[tuple[int, Tensor]]:
    """List the tensors that an operation returns, with their positions."""
    leaves = result if isinstance(result, tuple | list) else [result]
    return [(i, x) for i, x in enumerate(leaves) if isinstance(x, Tensor)]


def _replace(node: Node, new: Node, value: Tensor, arguments: Sequence[Node]) -> None:
    """Let a node's users read another one, which then has the strides that they were traced for."""
    if new not in arguments:
        new.meta["val"] = value
    node.replace_all_uses_with(new)
