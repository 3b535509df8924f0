"""Compile a program in pieces around the operations that torch's compiler refuses.

An error often names the operation: then the program is cut around it. Otherwise it is cut in
halves, and a half that fails in halves again. Pieces that compile are kept, so that little is
compiled twice; a refused operation runs by itself, and a refused loop in Python over its body,
which is compiled the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module

from fdl._compiler import _inductor
from fdl._compiler._graph import LOOP, nodes_of, results_of
from fdl._compiler._inductor import Compiled
from fdl._compiler._interpreter import Loop, Run, loop_in_python
from fdl._compiler._refusals import refused_operations
from fdl._compiler._trace import Traced
from fdl.tree._summary import shape_dtype

MAX_FAILURES = 20  # what still fails then runs operation by operation

Unit = list[Node]  # an operation, and the nodes that take its results apart


class _Step(NamedTuple):
    """A piece of the program: a function of some values to others."""

    run: Compiled
    inputs: list[Node]
    outputs: list[Node]
    drop: list[Node]  # values that no later step reads


class NothingCompiles(RuntimeError):
    """No piece of a program compiles."""


class AnotherShape(RuntimeError):
    """An operation returned another shape or dtype than its fake implementation says."""


class _Pieces:
    """Compiles the pieces of one program, and collects the names of refused operations."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.failures = self.compiled = 0
        self.refused: list[str] = []

    def compile(self, module: GraphModule, error: Exception | None, loop: Loop) -> Compiled:
        """Compile a graph, which may have failed with `error` before."""
        units = _units(module)
        if error is None or self.failures > MAX_FAILURES:
            pieces = self._piece(module, units, loop)
        else:
            self.failures += 1
            pieces = self._cut(module, units, error, loop)
        return _sequence(module, pieces)

    def _piece(self, module: GraphModule, units: list[Unit], loop: Loop) -> list[_Step]:
        """Compile some operations as one piece, or else as several."""
        if not units:
            return []
        if self.failures > MAX_FAILURES:
            return [self._one_by_one(module, unit, None, loop) for unit in units]
        graph, inputs, outputs = _extract(module, list(chain.from_iterable(units)))
        fakes = [node.meta["val"] for node in inputs]
        try:
            run = _inductor.lower(graph, self.traced.mode, fakes)
        except Exception as error:
            self.failures += 1
            return self._cut(module, units, error, loop)
        self.compiled += 1
        return [_Step(_with_strides(run, fakes), inputs, outputs, [])]

    def _cut(
        self, module: GraphModule, units: list[Unit], error: Exception, loop: Loop
    ) -> list[_Step]:
        """Cut operations that failed with `error` in pieces."""
        operations = refused_operations(error)
        refused = [_mentions(module, unit[0], operations) for unit in units]
        if len(units) == 1:
            return [self._one_by_one(module, unit, error, loop) for unit in units]
        if any(refused):
            steps: list[_Step] = []
            for is_refused, group in groupby(zip(refused, units, strict=True), lambda p: p[0]):
                part = [unit for _, unit in group]
                if is_refused:
                    steps += [self._one_by_one(module, unit, error, loop) for unit in part]
                else:
                    steps += self._piece(module, part, loop)
            return steps
        middle = len(units) // 2
        halves = units[:middle], units[middle:]
        return [step for half in halves for step in self._piece(module, half, loop)]

    def _one_by_one(
        self, module: GraphModule, unit: Unit, error: Exception | None, loop: Loop
    ) -> _Step:
        """Run an operation by itself, or a loop in Python over its compiled body."""
        graph, inputs, outputs = _extract(module, unit)
        bodies: dict[str, Compiled] = {}
        if unit[0].target is LOOP:
            name = cast(str, cast(Any, unit[0].args[0]).target)
            body = cast(GraphModule, module.get_submodule(name))
            named = error is not None and _mentions(module, unit[0], refused_operations(error))
            bodies[name] = self.compile(body, error if named else None, loop_in_python)
        name = "a loop, which runs in Python" if bodies else str(unit[0].target)
        if name not in self.refused:
            self.refused.append(name)
        run = _checked(Run(graph, bodies, loop), name, [node.meta["val"] for node in outputs])
        return _Step(run, inputs, outputs, [])


def compile_pieces(
    traced: Traced, error: Exception, loop: Loop = loop_in_python
) -> tuple[Compiled, list[str]]:
    """Compile a program in pieces, and run refused operations one by one.

    Args:
        traced: the program.
        error: the error with which it cannot be compiled as a whole.
        loop: runs an outermost loop that is refused; inner loops run in Python.

    Returns:
        The program, and the names of the refused operations.

    Raises:
        NothingCompiles: every operation is refused.
    """
    pieces = _Pieces(traced)
    program = pieces.compile(traced.graph, error, loop)
    if not pieces.compiled:
        raise NothingCompiles(f"none of the pieces of the program compiles: {error}")
    return program, pieces.refused


def _units(module: GraphModule) -> list[Unit]:
    """List the operations in order, each with the `getitem`s that take its results apart."""
    units: dict[Node, Unit] = {}
    for node in nodes_of(module.graph, "call_function"):
        if node.target is getitem:
            owner = units[cast(Node, node.args[0])]
            units[node] = owner
            owner.append(node)
        else:
            units[node] = [node]
    return [unit for node, unit in units.items() if unit[0] is node]


def _mentions(module: GraphModule, node: Node, operations: Sequence[str]) -> bool:
    """Check whether a node, or the body of a loop, calls one of some operations."""
    if not operations:
        return False
    bodies = [
        cast(GraphModule, module.get_submodule(cast(str, z.target)))
        for z in node.all_input_nodes
        if z.op == "get_attr"
    ]
    return str(node.target) in operations or any(
        _mentions(body, inner, operations)
        for body in bodies
        for inner in nodes_of(body.graph, "call_function")
    )


def _extract(
    module: GraphModule, nodes: Sequence[Node]
) -> tuple[GraphModule, list[Node], list[Node]]:
    """Make a graph of some nodes.

    Returns:
        The graph, and the nodes of `module` that are its inputs and its outputs.
    """
    chosen, graph, copies = set(nodes), Graph(), dict[Node, Node]()
    outside = dict.fromkeys(z for node in nodes for z in node.all_input_nodes if z not in chosen)
    inputs = [z for z in outside if z.op != "get_attr"]
    outputs = [
        node
        for node in nodes
        if isinstance(node.meta.get("val"), Tensor) and any(z not in chosen for z in node.users)
    ]
    for z in inputs:
        copies[z] = graph.placeholder(z.name)
        copies[z].meta = dict(z.meta)
    for z in outside:
        if z.op == "get_attr":
            copies[z] = graph.node_copy(z)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    return _make_graph_module(module, graph), inputs, outputs


def _with_strides(run: Compiled, fakes: Sequence[Tensor]) -> Compiled:
    """Give each input the strides for which a piece was compiled.

    An operation that runs by itself may return others than its fake implementation says.
    """

    def call(inputs: list[Tensor]) -> list[Tensor]:
        pairs = zip(inputs, fakes, strict=True)
        return run([x if x.stride() == fake.stride() else _like(x, fake) for x, fake in pairs])

    return call


def _checked(run: Run, name: str, fakes: Sequence[Tensor]) -> Compiled:
    """Check the results of an operation that runs by itself: compiled pieces rely on them."""

    def call(inputs: list[Tensor]) -> list[Tensor]:
        outputs = cast(list[Tensor], run.run(*inputs))
        for x, fake in zip(outputs, fakes, strict=True):
            if x.shape != fake.shape or x.dtype != fake.dtype:
                raise AnotherShape(
                    f"{name} returned {shape_dtype(x)}, but {shape_dtype(fake)} when it was traced"
                )
        return outputs

    return call


def _like(x: Tensor, fake: Tensor) -> Tensor:
    new = torch.empty_strided(fake.shape, fake.stride(), dtype=x.dtype, device=x.device)
    return new.copy_(x)


def _sequence(module: GraphModule, steps: list[_Step]) -> Compiled:
    """Run steps one after another; values are freed after their last use."""
    arguments, results = nodes_of(module.graph, "placeholder"), results_of(module.graph)
    kept, ordered = set(results), list[_Step]()
    for step in reversed(steps):
        drop = [z for z in dict.fromkeys([*step.inputs, *step.outputs]) if z not in kept]
        kept.update(drop)
        ordered.insert(0, step._replace(drop=drop))

    def run(inputs: list[Tensor]) -> list[Tensor]:
        values = dict(zip(arguments, inputs, strict=True))
        for step in ordered:
            outputs = step.run([values[z] for z in step.inputs])
            values.update(zip(step.outputs, outputs, strict=True))
            for z in step.drop:
                del values[z]
        return [values[z] for z in results]

    return run
