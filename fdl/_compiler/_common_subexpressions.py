"""Compute equal values once: a derivative repeats much of what it is the derivative of.

Each `jvp` and each `grad` of a function runs the function again, so that a program with several of
them has the same matrix products several times. Inductor merges only operations that land in one
kernel.
"""

from __future__ import annotations

from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fdl._compiler._divisors import NONZERO
from fdl._compiler._draws import WORDS
from fdl._compiler._graph import is_mutable, may_be_view, memory, nodes_of, results_of
from fdl._compiler._indices import IN_RANGE

aten = torch.ops.aten
BARRIER = {"memory_format": torch.preserve_format}  # of a clone, see `stop_merging`


def stop_merging(x: Tensor) -> Tensor:
    """Return a copy; what is computed from it is not merged with what is computed from `x`."""
    return x.clone(memory_format=torch.preserve_format)


def merge_equal(graph: Graph) -> None:
    """Replace each operation by an earlier one with the same arguments; results stay distinct."""
    first: dict[tuple[Any, str], Node] = {}
    for node in nodes_of(graph, "call_function"):
        if node.target is aten.alias.default:
            same = cast(Node, node.args[0])
        elif _can_merge(node):
            # By their text, in which 0, 0.0, −0.0 and False differ, and nodes have unique names.
            same = first.setdefault((node.target, f"{node.args} {node.kwargs}"), node)
        else:
            continue
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    keep_results_apart(graph)


def _can_merge(node: Node) -> bool:
    """Check for a pure operation of torch that is not a barrier."""
    op = node.target
    if op in (getitem, IN_RANGE, NONZERO, WORDS):
        return True
    return (
        isinstance(op, OpOverload)
        and op.namespace in ("aten", "prims")
        and node.kwargs != BARRIER
        and torch.Tag.nondeterministic_seeded not in op.tags
        and not is_mutable(node)
    )


def keep_results_apart(graph: Graph) -> None:
    """Copy each result that shares memory with an argument or an earlier result.

    The traced function has none; they come from merging, and from torch's rules for x · 1.
    """
    (output,) = nodes_of(graph, "output")
    used = set(nodes_of(graph, "placeholder"))
    results = results_of(graph)
    for i, node in enumerate(results):
        if not isinstance(node, Node):  # a number, the result of a branch
            continue
        if (owner := memory(node)) in used:
            with graph.inserting_before(output):
                results[i] = graph.call_function(aten.clone.default, (node,))
            results[i].meta["val"] = node.meta["val"].clone()
            _note_sharing(node)
        used.add(owner)
    single = isinstance(output.args[0], Node)  # of the condition of a loop
    output.args = (results[0] if single else cast(Any, type(output.args[0]))(results),)


def _note_sharing(node: Node) -> None:
    """Let the fake values of views share memory as the views do, or Inductor removes the copy."""
    if may_be_view(node):
        _note_sharing(cast(Node, node.args[0]))
        args, kwargs = map_arg((node.args, node.kwargs), lambda z: z.meta["val"])
        node.meta["val"] = cast(Any, node.target)(*args, **kwargs)
