"""Rewrite loops over complex numbers: Inductor emits a loop only if it carries real ones.

Complex tensors enter and leave a loop as pairs of real numbers; the body is as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.fx import GraphModule, Node

from fdl._compiler._graph import LOOP, aten, nodes_of, results_of

TO_REAL, TO_COMPLEX = aten.view_as_real.default, aten.view_as_complex.default


def make_loops_real(module: GraphModule) -> None:
    """Rewrite the loops of a graph, without those in the bodies of loops."""
    for loop in nodes_of(module.graph, "call_function"):
        if loop.target is LOOP:
            reference, init, xs, constants = cast(Any, loop.args[:4])
            operands = [*init, *xs, *constants]
            results = cast(Sequence[Tensor], loop.meta["val"])
            if any(_is_complex(node.meta["val"]) for node in operands) or any(
                map(_is_complex, results)
            ):
                _open_body(cast(GraphModule, module.get_submodule(reference.target)))
                real = [_to_real(node, loop) for node in operands]
                n, m = len(init), len(init) + len(xs)
                loop.args = (reference, real[:n], real[n:m], tuple(real[m:]))
                _close_results(loop)


def _open_body(body: GraphModule) -> None:
    """Let a body take and return pairs of real numbers."""
    graph = body.graph
    (output,) = nodes_of(graph, "output")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in nodes_of(graph, "placeholder"):
        if _is_complex(node.meta["val"]):
            value = node.meta["val"]
            with graph.inserting_before(first):
                new = graph.call_function(TO_COMPLEX, (node,))
            new.meta["val"] = value
            _replace(node, new)
            with value.fake_mode:
                node.meta["val"] = aten.view_as_real(value)
    output.args = ([_to_real(node, output) for node in results_of(graph)],)
    body.recompile()


def _close_results(loop: Node) -> None:
    """Turn results back to complex numbers."""
    values = list(loop.meta["val"])
    for user in list(loop.users):
        if _is_complex(user.meta["val"]):
            with loop.graph.inserting_after(user):
                new = loop.graph.call_function(TO_COMPLEX, (user,))
            new.meta["val"] = user.meta["val"]
            _replace(user, new)
    for i, value in enumerate(values):
        if _is_complex(value):
            with value.fake_mode:
                values[i] = aten.view_as_real(value)
    for user in loop.users:
        user.meta["val"] = values[cast(int, user.args[1])]
    loop.meta["val"] = tuple(values)


def _replace(old: Node, new: Node) -> None:
    """Let `new`, which is computed from `old`, take its place everywhere else."""
    old.replace_all_uses_with(new, lambda user: user is not new)


def _to_real(node: Node, before: Node) -> Node:
    value = node.meta["val"]
    if not _is_complex(value):
        return node
    with before.graph.inserting_before(before), value.fake_mode:
        if value.is_conj():  # lazily
            node = before.graph.call_function(aten.clone.default, (node,))
            value = node.meta["val"] = value.clone()
        new = before.graph.call_function(TO_REAL, (node,))
        new.meta["val"] = aten.view_as_real(value)
    return new


def _is_complex(value: Tensor) -> bool:
    return value.is_complex()
