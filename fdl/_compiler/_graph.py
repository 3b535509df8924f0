"""Helpers for `torch.fx` graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import cache
from operator import getitem
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils._python_dispatch import _disable_current_modes

from fdl._torch_compat import RELEASE

aten = torch.ops.aten
MAY_BE_VIEWS = (aten.reshape.default, aten._unsafe_view.default)
VIEWS = (aten.view.default, *MAY_BE_VIEWS)  # which give another shape
FILLED = {aten.scalar_tensor.default: 0, aten.full.default: 1}  # where their number is
LOOP = torch.ops.higher_order.scan  # the node of a loop: (body, init, xs, constants)
COND = torch.ops.higher_order.cond  # the node of a branch: (predicate, true, false, operands)
WHILE = torch.ops.higher_order.while_loop  # (condition, body, carry, constants)
NEEDS_Y = RELEASE < (2, 12)  # the loop has to have a y
MOVE = torch.ops.prims.device_put.default  # to another device
NAMESPACES = {"aten", "prims", "fdl"}  # of operations that run no code of a user
LITERAL = (aten.lift_fresh.default, aten.lift_fresh_copy.default)  # what torch.tensor(1.0) ends in


class Verbatim(str):
    """Text that stands for a node among the arguments of an operation, without quotes."""

    __repr__ = str.__str__


def operations(module: GraphModule) -> list[Node]:
    """List the operations in a graph, and in the bodies of its loops and branches."""
    parts = [part for part in module.modules() if isinstance(part, GraphModule)]
    return [node for part in parts for node in nodes_of(part.graph, "call_function")]


def prune_loop_outputs(module: GraphModule, loop: Node) -> None:
    """Remove loop outputs that are never read, such as unused metrics."""
    reference, init, *_ = cast(Any, loop.args)
    body = cast(GraphModule, module.get_submodule(reference.target))
    results = results_of(body.graph)
    read = {cast(int, user.args[1]): user for user in loop.users}
    kept = [i for i in range(len(results)) if i < len(init) or i in read]
    if NEEDS_Y and len(kept) == len(init):
        kept.append(len(init))
    (output,) = nodes_of(body.graph, "output")
    output.args = ([results[i] for i in kept],)
    body.graph.eliminate_dead_code()
    body.recompile()
    for new, old in enumerate(kept):
        if old in read:
            read[old].args = (loop, new)
    loop.meta["val"] = tuple(loop.meta["val"][i] for i in kept)


def reached(
    graph: Graph, seeds: Iterable[int], carry: int, smooth: bool = False
) -> tuple[set[int], list[bool]]:
    """Find what depends on some inputs of a loop's body, in any step.

    Args:
        graph: the body, `(*carry, *row, *closed_over) -> [*carry, *y]`.
        seeds: indices of inputs.
        carry: the number of leaves of the carry.
        smooth: follow floating and complex numbers only, as derivatives do.

    Returns:
        The indices of inputs that depend on `seeds`, and for each result whether it does: a leaf
        of the carry always does if its first value is a seed.
    """
    inputs, results = nodes_of(graph, "placeholder"), results_of(graph)
    indices = set(seeds)
    while True:
        nodes = {inputs[i] for i in indices}
        for node in graph.nodes:
            if any(z in nodes for z in node.all_input_nodes) and (not smooth or _is_smooth(node)):
                nodes.add(node)
        more = {i for i in range(carry) if results[i] in nodes} - indices
        if not more:
            seeded = [i < carry and i in indices for i in range(len(results))]
            return indices, [a or z in nodes for a, z in zip(seeded, results, strict=True)]
        indices |= more


def _is_smooth(node: Node) -> bool:
    values = node.meta.get("val")
    values = values if isinstance(values, tuple | list) else [values]
    return any(not isinstance(z, Tensor) or is_smooth(z) for z in values)


def is_smooth(x: Tensor) -> bool:
    """Check that a tensor can have a derivative."""
    return x.is_floating_point() or x.is_complex()


def with_results(module: GraphModule, more: Sequence[Node]) -> GraphModule:
    """Copy a graph that returns more of its nodes, after its results."""
    graph, copies = Graph(), dict[Node, Node]()
    graph.graph_copy(module.graph, copies)
    graph.output([copies[node] for node in [*results_of(module.graph), *more]])
    return _make_graph_module(module, graph)


def copy_graph(module: GraphModule) -> GraphModule:
    """Copy a graph and the bodies of its loops; the fake tensors in them are shared."""
    copy = _make_graph_module(module, deepcopy(module.graph))
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            setattr(copy, name, copy_graph(child))
    return copy


DEEPEST = 8  # elementwise operations in a row that are rather run twice than kept
# Elementwise operations that take longer than to write a result and to read it.
# fmt: off
COSTLY = {
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "celu", "cos", "cosh", "digamma",
    "elu", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "gelu", "lgamma", "log", "log10",
    "log1p", "log2", "log_sigmoid_forward", "logit", "mish", "pow", "selu", "sigmoid", "silu",
    "sin", "sinh", "softplus", "special_erfcx", "special_ndtri", "tan", "tanh", "xlogy",
}
# fmt: on


def worth_keeping(graph: Graph) -> list[Node]:
    """List the intermediate values that a derivative should read instead of computing them again.

    All but views and most elementwise operations, which fuse with those that use them.
    """
    depths: dict[Node, int] = {}
    kept = []
    for node in nodes_of(graph, "call_function"):
        inputs = [depths.get(z, 0) for z in node.all_input_nodes]
        depths[node] = max(inputs, default=0) + (not is_view(node))
        if not inputs or (_is_cheap(node) and depths[node] <= DEEPEST):
            continue
        depths[node] = 0
        if isinstance(node.meta.get("val"), Tensor):
            kept.append(node)
    return kept


def _is_cheap(node: Node) -> bool:
    if node.target is getitem:
        return _is_cheap(node.all_input_nodes[0])
    if getattr(node.target, "_opname", "") in COSTLY:
        return False
    return is_view(node) or torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_view(node: Node) -> bool:
    """Check whether the result of an operation shares memory with its argument."""
    return getattr(node.target, "is_view", False)


def may_be_view(node: Node) -> bool:
    """Check for an operation whose result may share memory with its first argument."""
    if node.target is getitem:  # a part of a view, such as of `split`
        return is_view(cast(Node, node.args[0]))
    return is_view(node) or node.target in MAY_BE_VIEWS


def memory(node: Node) -> Node:
    """Follow a chain of views to the node that made the memory."""
    while may_be_view(node):
        node = cast(Node, node.args[0])
    return node


def is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def check_pure(graph: GraphModule, names: Sequence[str]) -> None:
    """Raise if an argument or a closed-over tensor is changed in place.

    Other in-place operations have been replaced by now.
    """
    named = dict(zip(nodes_of(graph.graph, "placeholder"), names, strict=False))
    changed = [
        named.get(cast(Node, node.args[0]), "a closed-over tensor")
        for node in graph.graph.nodes
        if is_mutable(node)
    ]
    if changed:
        raise ValueError(
            f"jit: the function changes {', '.join(dict.fromkeys(changed))} in place; a jitted "
            "function must be pure: return a new tensor instead"
        )


def value_of(node: Node) -> Tensor:
    """Return the fake tensor that a node computes."""
    return cast(Tensor, node.meta["val"])


def nodes_of(graph: Graph, op: str) -> list[Node]:
    """List the nodes of one kind, in order."""
    return [node for node in graph.nodes if node.op == op]


def caller(graph: Graph, node: Node) -> Callable[..., Node]:
    """Make a function that adds a call before `node`, with its fake result."""
    value, *_ = pytree.tree_leaves(node.meta["val"])

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        with graph.inserting_before(node), value.fake_mode:
            new = graph.call_function(op, args, kwargs)
            values = (z.meta["val"] if isinstance(z, Node) else z for z in args)
            new.meta["val"] = op(*values, **kwargs)
        return new

    return call


def empty(graph: Graph, value: Tensor) -> Node:
    """Add memory for a value, which a later node writes."""
    options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    size = value.shape or (1,)  # Inductor fills an empty tensor without axes
    node = graph.call_function(aten.empty.memory_format, (list(size),), options)
    with cast(Any, value).fake_mode:
        node.meta["val"] = torch.empty(size, **options)
    return node


def results_of(graph: Graph) -> list[Node]:
    """List the nodes that a graph returns."""
    (output,) = nodes_of(graph, "output")
    results = output.args[0]
    # The condition of a while_loop returns a single one.
    return [results] if isinstance(results, Node) else cast(list[Node], list(cast(Any, results)))


def literal(x: Any) -> Any:
    """Return the number that a node is filled with, a number itself, or None."""
    if isinstance(x, bool | int | float):
        return x
    if isinstance(x, Node) and x.op == "call_function":
        number = x.args[FILLED[x.target]] if x.target in FILLED else None
        if isinstance(number, bool | int | float):
            return held(number, value_of(x).dtype) if number else number
    return None


@cache
def held(number: bool | float, dtype: torch.dtype) -> Any:
    """Return a number as a tensor of the dtype holds it: 2.7 is 2 in one of integers."""
    with _disable_current_modes():
        return torch.tensor(number, dtype=dtype).item()
