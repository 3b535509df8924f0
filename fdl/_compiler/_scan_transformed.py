"""`scan` under `grad`, `vmap` and `jvp` inside `jit`: still one loop, as in JAX.

The body is first traced as it is written, outside of the transformations (`_closed_body.py`). Each
transformation makes another loop of it (`_loop_rules.py`, `_loop_gradient.py`), the innermost one
first, and below the last one the loop is written into the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _functorch as functorch

from fdl._compiler._closed_body import ClosedBody, close_body
from fdl._compiler._custom_functions import CannotClose
from fdl._compiler._graph import nodes_of, results_of
from fdl._compiler._loop_gradient import under_grad
from fdl._compiler._loop_rules import under_jvp, under_vmap
from fdl._compiler._loops import RULES, Loop, run_loop
from fdl._compiler._scan_eager import scan_as_loop
from fdl._compiler._scan_traced import FlatBody, flat_body
from fdl._compiler._signature import unflatten
from fdl._compiler._trace import current_trace
from fdl.tree import Tree

RULES |= {
    functorch.TransformType.Vmap: under_vmap,
    functorch.TransformType.Grad: under_grad,
    functorch.TransformType.Jvp: under_jvp,
}


def scan_transformed(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    """Run a scan under the active transformations, as one loop."""
    flat = flat_body(f, init, xs)
    try:
        unchanged, body = _move_unchanged(_close(f, flat))
        loop = Loop(body.graph, len(body.init), len(body.xs), length)
        results = run_loop(loop, [*body.init, *body.xs, *body.closed_over])
    except CannotClose as reason:  # of the body, or of its derivative
        current_trace().unrolled.append((length, str(reason)))
        return scan_as_loop(f, init, xs, length)
    carry, ys = iter(results[: loop.carry]), results[loop.carry :]
    leaves = [unchanged[i] if i in unchanged else next(carry) for i in range(len(flat.init))]
    return unflatten(leaves, flat.carry_spec), unflatten(ys, flat.y_specs[0])


def _close(f: Callable[..., Any], flat: FlatBody) -> ClosedBody:
    names = {level.key() for level in functorch.get_interpreter_stack()} - RULES.keys()
    if names:
        raise CannotClose(f"it is called under {names.pop().name.lower()}")
    return close_body(f, flat)


def _move_unchanged(body: ClosedBody) -> tuple[dict[int, Tensor], ClosedBody]:
    """Move leaves of the carry that every step returns as they are to the constants of the loop.

    Returns:
        These leaves, by index, and the body without them.
    """
    graph = body.graph.graph
    inputs, results = nodes_of(graph, "placeholder"), results_of(graph)
    unchanged = {i: leaf for i, leaf in enumerate(body.init) if results[i] is inputs[i]}
    for i in unchanged:
        nodes_of(graph, "placeholder")[-1].append(inputs[i])
    (output,) = nodes_of(graph, "output")
    output.args = ([node for i, node in enumerate(results) if i not in unchanged],)
    init = [leaf for i, leaf in enumerate(body.init) if i not in unchanged]
    closed_over = [*body.closed_over, *unchanged.values()]
    return unchanged, body._replace(init=init, closed_over=closed_over)
