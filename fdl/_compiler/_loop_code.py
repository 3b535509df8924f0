"""Loops in Inductor's C++ code: when they make a turn, and what they allocate at each."""

from __future__ import annotations

from functools import wraps
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from fdl._compiler._graph import nodes_of

aten = torch.ops.aten


def allocate_only_what_is_stored() -> None:
    """Tell the code of a program which values in the bodies of its loops stay within a kernel.

    The code of a body is written into that of the program, which looks up only its own list of
    values that need no memory. A draw of random numbers in a loop has dozens of them.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    wrapper: Any = CppWrapperCpu
    write = wrapper.codegen_subgraph

    @wraps(write)
    def codegen_subgraph(self: Any, subgraph: Any, *args: Any, **kwargs: Any) -> Any:
        V.graph.never_reuse_buffers.update(subgraph.graph.never_reuse_buffers)
        result = write(self, subgraph, *args, **kwargs)
        V.graph.removed_buffers.update(subgraph.graph.removed_buffers)  # their names are unique
        return result

    wrapper.codegen_subgraph = codegen_subgraph


def makes_a_turn(condition: Graph, loop: Node) -> bool:
    """Check whether a `while_loop` counts from a number to a greater one, as that of a scan does.

    Args:
        condition: the graph of its condition.
        loop: its node in the graph around it.
    """
    first = cast(Any, loop.args[2])[0]
    match nodes_of(condition, "call_function"):
        case [test] if test.target is aten.lt.Scalar and first.target is aten.full.default:
            counter, end = cast(Any, test.args)
            return counter is next(iter(condition.nodes)) and bool(first.args[1] < end)
    return False
