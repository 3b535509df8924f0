"""Ctrl-C while a compiled loop runs.

Python handles signals between two instructions of its own, so a program in C++ would run to its
end first. Therefore each turn of a compiled loop lets Python handle them, at most every 50 ms. If
the handler raises, as Python's own does after Ctrl-C, the program stops.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import has_side_effect

from fdl._compiler._graph import LOOP, memory, nodes_of
from fdl._compiler._order import predecessors, written
from fdl._torch_compat import RELEASE

aten = torch.ops.aten
INTACT = "fdl_arguments_are_intact"  # attribute of an error that was raised before any write


@torch.library.custom_op("fdl::check_signals", mutates_args=())
def check_signals(intact: bool) -> None:
    """Let Python handle signals; `intact` if nothing has been written to donated memory yet."""


@check_signals.register_fake
def _(intact: bool) -> None:
    pass


CHECK_SIGNALS = has_side_effect(check_signals._opoverload)


def signal_check(intact: bool) -> str:
    """Write `check_signals` in C++; the caller of the program raises what the handler raised.

    To read a clock takes as long as a few percent of a short turn, so it is read at turns 1, 2, 4,
    8, … after a check.
    """
    mark = f"""
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyErr_NormalizeException(&type, &value, &trace);
        if (PyObject_SetAttrString(value, "{INTACT}", Py_True)) PyErr_Clear();
        PyErr_Restore(type, value, trace);"""
    return f"""{{
    static thread_local int64_t turns = 0, stride = 1;
    static thread_local std::chrono::steady_clock::time_point checked;
    if (++turns >= stride) {{
        turns = 0;
        auto now = std::chrono::steady_clock::now();
        if (now - checked < std::chrono::milliseconds(50)) {{
            stride *= 2;
        }} else {{
            checked = now;
            stride = 1;
            py::gil_scoped_acquire_simple acquire;
            if (PyErr_CheckSignals()) {{{mark if intact else ""}
                return;
            }}
        }}
    }}
}}"""


def watch_signals(module: GraphModule) -> None:
    """Let each turn of the loops in a graph for the CPU check for signals."""
    if RELEASE < (2, 12):  # there the loop itself runs in Python
        return
    before = predecessors(module.graph)
    needed = [_needed_by(write, before) for write in _writes(module)]
    for loop in _loops(module):
        _insert_check(module, loop, all(loop in nodes for nodes in needed))


def _insert_check(module: GraphModule, loop: Node, intact: bool) -> None:
    body = cast(GraphModule, module.get_submodule(cast(Any, loop.args[0]).target))
    for inner in _loops(body):
        _insert_check(body, inner, intact)
    first = next(node for node in body.graph.nodes if node.op != "placeholder")
    with body.graph.inserting_before(first):
        body.graph.call_function(CHECK_SIGNALS, (intact,))
    body.recompile()


def _loops(module: GraphModule) -> list[Node]:
    return [node for node in nodes_of(module.graph, "call_function") if node.target is LOOP]


def _writes(module: GraphModule) -> list[Node]:
    """List the nodes that write to donated memory; none writes what it holds (`_merging.py`)."""
    return [
        node
        for node in nodes_of(module.graph, "call_function")
        if any(memory(z).op == "placeholder" for z in written(node))
    ]


def _needed_by(node: Node, before: dict[Node, list[Node]]) -> set[Node]:
    """Return the nodes that have to run before this one."""
    needed, rest = set[Node](), [node]
    while rest:
        inputs = set(before[rest.pop()]) - needed
        needed |= inputs
        rest += inputs
    return needed
