"""Loops as `jit` transforms them: the graph of a body that closes over nothing, and operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.fx import GraphModule, Interpreter, Node

from fdl._compiler._callbacks import CALLBACK, without_callbacks
from fdl._compiler._differentiable_ops import REPLACEMENTS
from fdl._compiler._graph import LOOP, is_smooth
from fdl._compiler._purity import innermost
from fdl._compiler._scan_traced import scan_traced
from fdl._compiler._settings import as_written
from fdl._compiler._trace import plain, proxy_node


class Loop(NamedTuple):
    """A loop whose operands are `[*init, *xs, *constants]`."""

    body: GraphModule  # (*carry, *row, *constants) -> [*carry, *y]
    carry: int  # number of leaves
    xs: int
    length: int

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Split operands, or the arguments of the body."""
        n, m = self.carry, self.carry + self.xs
        return list(operands[:n]), list(operands[n:m]), list(operands[m:])

    def examples(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Make arguments of the body from operands."""
        init, xs, constants = self.split(operands)
        return [*map(plain, init), *(plain(x, 1) for x in xs), *map(plain, constants)]


Rule = Callable[[Loop, list[Tensor], Any], list[Tensor]]
RULES: dict[Any, Rule] = {}  # of each transformation; `_scan_transformed.py` fills it
# How other operators with graphs run under transformations: functions of a node's arguments.
OPERATORS: dict[Any, Callable[..., list[Tensor]]] = {}


def run_loop(loop: Loop, operands: Sequence[Tensor]) -> list[Tensor]:
    """Run a loop under the active transformations: `[*carry, *ys]`."""
    return innermost_first(RULES, _write, loop, operands)


def innermost_first(
    rules: Mapping[Any, Callable[..., list[Tensor]]],
    write: Callable[..., list[Tensor]],
    subject: Any,
    operands: Sequence[Tensor],
) -> list[Tensor]:
    """Apply the rule of the innermost transformation; without any, write into the graph.

    Args:
        rules: of each transformation, functions of subject, operands and interpreter.
        write: a function of subject and operands.
        subject: what is transformed, such as a loop.
        operands: its operands.
    """
    operands = [functorch.unwrap_if_dead(x) for x in operands]
    if functorch.peek_interpreter_stack() is None:
        return write(subject, operands)
    interpreter = retrieve_current_functorch_interpreter()
    return rules[interpreter.key()](subject, operands, interpreter)


def _write(loop: Loop, operands: list[Tensor]) -> list[Tensor]:
    """Write a loop into the graph that is being traced."""
    init, xs, constants = loop.split(operands)

    def body(carry: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        results = run_graph(loop.body, [*carry, *row, *constants])
        return results[: loop.carry], results[loop.carry :]

    carry, ys = cast(Any, scan_traced(body, init, xs, loop.length))
    return [*carry, *ys]


def run_graph(
    graph: GraphModule, arguments: Sequence[Tensor], computed: dict[Node, Node] | None = None
) -> list[Tensor]:
    """Run the graph of a body under the active transformations, with its inner loops.

    Args:
        graph: the graph.
        arguments: its arguments.
        computed: for each node whose value is a tensor, the node that computes it in the graph that
            is being traced is added here.
    """
    with as_written():  # the graph contains the casts of autocast
        return cast(list[Tensor], _Run(graph, computed).run(*arguments))


class _Run(Interpreter):
    def __init__(self, graph: GraphModule, computed: dict[Node, Node] | None) -> None:
        super().__init__(graph)
        self.computed = computed

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.computed is not None and isinstance(value, Tensor):
            node = proxy_node(innermost(value))
            if node is not None:
                self.computed[n] = node
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        runs_again = self.computed is not None  # the forward pass has made the calls
        if target is CALLBACK and runs_again:
            return None
        if target in OPERATORS:
            return OPERATORS[target](*args)
        if target is not LOOP:
            return super().call_function(REPLACEMENTS.get(target, target), args, kwargs)
        body, init, xs, constants = args[:4]
        body = without_callbacks(body) if runs_again else body
        return run_loop(Loop(body, len(init), len(xs), len(xs[0])), [*init, *xs, *constants])


def replaced(
    values: Sequence[Tensor], indices: Sequence[int], by: Sequence[Tensor]
) -> list[Tensor]:
    """Copy a list with new values at some indices.

    >>> replaced([1, 2, 3], [0, 2], [10, 30])
    [10, 2, 30]
    """
    new = list(values)
    for i, value in zip(indices, by, strict=True):
        new[i] = value
    return new


def run_below(
    interpreter: Any, run: Callable[[list[Tensor]], list[Tensor]], operands: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run a function under the transformations around a `grad`, on what the `grad` wraps.

    It is the forward pass of a `_SingleLevelFunction`, which turns derivatives off that the
    transformations around it still need.
    """
    level = interpreter.level()
    values = [functorch._unwrap_for_grad(x, level) for x in operands]
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
        results = run(values)
    return tuple(functorch._wrap_for_grad(x, level) for x in results)


def unpack_duals(operands: Sequence[Tensor], level: int) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Return the values of dual numbers, and by index the tangents of those that have one."""
    primals: list[Tensor] = []
    tangents: dict[int, Tensor] = {}
    for i, x in enumerate(operands):
        tangent = None
        if is_smooth(x):
            x, tangent = forward_ad.unpack_dual(x)[:2]
        primals.append(functorch._unwrap_for_grad(x, level))
        if tangent is not None:
            tangents[i] = functorch._unwrap_for_grad(tangent, level)
    return primals, tangents
