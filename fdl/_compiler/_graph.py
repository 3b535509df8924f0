"""Helpers for `torch.fx` graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fdl._torch_compat import RELEASE

aten = torch.ops.aten
LOOP = torch.ops.higher_order.scan  # the node of a loop: (body, init, xs, constants)
NEEDS_Y = RELEASE < (2, 12)  # the loop has to have a y
MOVE = torch.ops.prims.device_put.default  # to another device
LITERAL = (aten.lift_fresh.default, aten.lift_fresh_copy.default)  # what torch.tensor(1.0) ends in


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


def nodes_of(graph: Graph, op: str) -> list[Node]:
    """List the nodes of one kind, in order."""
    return [node for node in graph.nodes if node.op == op]


def results_of(graph: Graph) -> list[Node]:
    """List the nodes that a graph returns."""
    (output,) = nodes_of(graph, "output")
    return cast(list[Node], list(cast(Any, output.args[0])))
