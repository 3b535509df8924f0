"""Run a traced program operation by operation, with compiled loop bodies.

This is how programs with loops run on CUDA, where everything is then captured as a CUDA graph
(`_cuda_graphs.py`), and on the CPU if Inductor cannot emit the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from fdl._compiler import _inductor
from fdl._compiler._graph import LOOP, nodes_of
from fdl._compiler._inductor import Compiled
from fdl._compiler._trace import Traced

Loop = Callable[[Compiled, list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]


def loop_in_python(
    body: Compiled, init: list[Tensor], xs: list[Tensor], constants: list[Tensor]
) -> list[Tensor]:
    """Run `[*carry, *row, *constants] -> [*carry, *y]` over the rows of xs; stack the ys."""
    carry, ys = init, []
    xs = [x.contiguous() for x in xs]  # as the body was traced
    for i in range(len(xs[0])):
        out = body([*carry, *(x[i] for x in xs), *constants])
        carry = list(out[: len(init)])
        ys.append(out[len(init) :])
    return [*carry, *(torch.stack(rows) for rows in zip(*ys, strict=True))]


def compile_bodies(traced: Traced, loop: Loop = loop_in_python) -> Compiled:
    """Compile the body of each loop; around the outermost loops there are few operations.

    Args:
        traced: the program.
        loop: runs an outermost loop; inner loops run in Python.
    """
    bodies: dict[str, Compiled] = {}
    for node in nodes_of(traced.graph.graph, "call_function"):
        if node.target is LOOP:
            name = cast(str, cast(Any, node.args[0]).target)
            body = cast(GraphModule, traced.graph.get_submodule(name))
            bodies[name] = _lower(body, traced)
    return lambda inputs: cast(list[Tensor], Run(traced.graph, bodies, loop).run(*inputs))


def _lower(body: GraphModule, traced: Traced) -> Compiled:
    inner = traced._replace(graph=body)
    if any(node.target is LOOP for node in body.graph.nodes):
        return compile_bodies(inner)
    inputs = [node.meta["val"] for node in nodes_of(body.graph, "placeholder")]
    return _inductor.lower(body, traced.mode, inputs)


def interpret(traced: Traced, loop: Loop = loop_in_python) -> Compiled:
    """Run every operation by itself, also in loop bodies."""

    def body_of(name: str) -> Compiled:
        graph = cast(GraphModule, traced.graph.get_submodule(name))
        return interpret(traced._replace(graph=graph))

    bodies = {name: body_of(name) for name, _ in traced.graph.named_children()}
    return lambda inputs: cast(list[Tensor], Run(traced.graph, bodies, loop).run(*inputs))


class Run(Interpreter):
    """Interprets a graph, except for the bodies of its loops."""

    def __init__(self, graph: GraphModule, bodies: dict[str, Compiled], loop: Loop) -> None:
        super().__init__(graph)
        self.bodies, self.loop = bodies, loop

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target is not LOOP:
            return super().run_node(n)
        body, *rest = cast(tuple[Any, ...], n.args[:4])
        init, xs, constants = (list(cast(Any, self.map_nodes_to_values(part, n))) for part in rest)
        return self.loop(self.bodies[body.target], init, xs, constants)


def longest_loop(traced: Traced) -> int:
    """Return the number of steps of the longest outermost loop, 0 without loops."""
    nodes = [node for node in traced.graph.graph.nodes if node.target is LOOP]
    return max((len(cast(Any, node.args[2])[0].meta["val"]) for node in nodes), default=0)
