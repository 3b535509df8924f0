"""`scan` inside `jit`: one node of the traced graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from fdl._compiler._graph import LOOP, NEEDS_Y, nodes_of, results_of
from fdl._compiler._scan_eager import _check_whole, _checked_carry, _fresh, _scan_as_loop
from fdl._compiler._signature import flatten, unflatten
from fdl._compiler._trace import faked, trace_flat, unshared, watch
from fdl.tree import Tree
from fdl.tree._checks import check_tensors

aten = torch.ops.aten
AT_ONCE = 10  # tiny steps written one after the other
CALLED = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default)


def _scan_traced(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    """Write the loop into the graph that `jit` is tracing, as one node with the body's graph."""
    init_leaves, carry_spec = flatten(init)
    xs_leaves, x_spec = flatten(xs)
    y_specs: list[Hashable] = []
    n, m = len(init_leaves), len(xs_leaves)

    def flat(*leaves: Tensor) -> list[Tensor]:
        carry = unflatten(leaves[:n], carry_spec)
        new, y = f(carry, unflatten(leaves[n:], x_spec))
        ys, y_spec = flatten(y)
        check_tensors(ys, y, "scan: every leaf of y")
        _check_whole("scan", y, "y")
        y_specs.append(y_spec)
        return [*flatten(_checked_carry(init, new))[0], *ys]

    # With one order in memory throughout, a view in the body is one at each step.
    init_leaves = [leaf.contiguous() for leaf in faked(init_leaves)]
    xs_leaves = faked(xs_leaves)
    names = ["the carry of a scan"] * n + ["the row of xs that a scan is at"] * m
    made_before = len(watch().made)
    with disable_proxy_modes_tracing():
        # Copies, for the body may close over the carry's first value, which is another thing.
        fakes = [*(leaf.clone() for leaf in init_leaves), *(leaf[0] for leaf in xs_leaves)]
        watch().note(fakes)
        body, closed_over = trace_flat(flat, fakes, names)
    del fakes
    watch().check(f, body, "scan: the body", made_before)
    times = _steps_at_once(body, length)
    if times == length:
        return _scan_as_loop(f, init, xs, length)
    arguments, results = nodes_of(body.graph, "placeholder"), results_of(body.graph)
    # What the body hands on as it is does not change: it need not be carried around.
    moving = [i for i in range(n) if results[i] is not arguments[i]]
    still = [i for i in range(n) if results[i] is arguments[i]]
    used = [i for i in range(m) if arguments[n + i].users]
    # The operator wants something to carry, and something to walk along.
    device = next((leaf.device for leaf in [*init_leaves, *xs_leaves]), None)
    filler = torch.zeros(length, device=device)
    carried = [_fresh(init_leaves[i]) for i in moving] or [filler[0].clone()]
    walked = [xs_leaves[i] for i in used] or [filler]
    constant = unshared([*closed_over, *(init_leaves[i] for i in still)], [])  # it insists

    def step(*leaves: Tensor) -> list[Tensor]:
        """Outputs must not share memory with inputs or each other, and strides must be stable."""
        rest = iter(leaves)
        new = [next(rest) for _ in carried]
        rows = [next(rest) for _ in walked]
        constants = [next(rest) for _ in closed_over]
        carry = dict(zip(still, rest, strict=True))
        ys = []
        for i in range(times):
            at_i = rows if times == 1 else [block[i] for block in rows]
            row = dict(zip(used, at_i, strict=False))
            carry |= dict(zip(moving, new, strict=False))
            got = body(*(carry[i] for i in range(n)), *(row.get(i) for i in range(m)), *constants)
            new = [got[i] for i in moving] or new
            ys.append(got[n:] or [torch.zeros_like(filler[0])] * NEEDS_Y)
        out = ys[0] if times == 1 else [torch.stack(y) for y in zip(*ys, strict=True)]
        return [_fresh(leaf) for leaf in [*new, *out]]

    if times > 1:  # copies, for the operator suspects views of what the body closes over
        walked = [leaf.unflatten(0, (length // times, times)).clone() for leaf in walked]
    out = LOOP(step, carried, walked, tuple(constant))
    new = dict(zip(moving, out, strict=False)) | {i: init_leaves[i] for i in still}
    carry = unflatten([new[i] for i in range(n)], carry_spec)
    ys = [y if times == 1 else y.flatten(0, 1) for y in out[len(carried) :]]
    return carry, unflatten(ys, y_specs[0])


def _steps_at_once(body: GraphModule, length: int) -> int:
    """Say how many steps to write one after the other: several where a step is next to nothing.

    Linear regression on ten examples takes less time than the loop around it, which handles a
    dozen tensors a turn; and one kernel does ten steps.
    """
    calls = nodes_of(body.graph, "call_function")
    small = len(calls) <= 200 and all(_is_small(node) for node in calls)
    return max(n for n in range(1, AT_ONCE + 1) if length % n == 0) if small else 1


def _is_small(node: Node) -> bool:
    """Say whether an operation is merged with its neighbours and done in a microsecond."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.numel() > 4096 or node.target is LOOP:
        return False
    factors = [arg.meta["val"] for arg in node.args if isinstance(arg, Node)]
    return node.target not in CALLED or factors[-1].numel() * value.numel() <= 4096
