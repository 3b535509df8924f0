"""`scan` inside `jit`: one node of the traced graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fdl._compiler._callbacks import calls_back, keep
from fdl._compiler._graph import LOOP, NEEDS_Y, nodes_of, results_of
from fdl._compiler._scan_eager import check_carry, check_not_sharded, contiguous_copy, scan_as_loop
from fdl._compiler._signature import flatten, unflatten
from fdl._compiler._trace import copy_aliases, current_trace, to_fake, trace_part
from fdl.tree import Tree
from fdl.tree._checks import check_tensors

aten = torch.ops.aten
MAX_UNROLL = 10  # steps of a tiny body
MAX_OPERATIONS = 400  # of all unrolled steps: more take long to compile, and gain little
CALLED = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default)


def scan_traced(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    """Write the loop into the graph that `jit` is tracing, as one node with the body's graph."""
    body = _trace_body(f, init, xs)
    unroll = _unroll_factor(body.graph, length)
    if unroll == length:
        return scan_as_loop(f, init, xs, length)
    operands = _choose_operands(body, length)
    carried, ys = _write_loop(body, operands, length, unroll)
    carry = dict(zip(operands.changed, carried, strict=True))
    carry |= {i: body.init[i] for i in operands.unchanged}
    leaves = [carry[i] for i in range(len(body.init))]
    return unflatten(leaves, body.carry_spec), unflatten(ys, body.y_spec)


class FlatBody(NamedTuple):
    """The body of a scan as a function of leaves."""

    fn: Callable[..., list[Tensor]]  # (*carry, *row) -> [*carry, *y]
    init: list[Tensor]
    xs: list[Tensor]
    carry_spec: Hashable
    y_specs: list[Hashable]  # one more at each run of fn
    names: list[str]  # of the arguments of fn, for errors


class _Body(NamedTuple):
    """The traced body, and the leaves that the loop starts from."""

    graph: GraphModule  # (*carry, *row, *closed_over) -> [*carry, *y]
    init: list[Tensor]
    xs: list[Tensor]
    closed_over: list[Tensor]
    carry_spec: Hashable
    y_spec: Hashable


def flat_body(f: Callable[..., Any], init: Tree, xs: Tree) -> FlatBody:
    """Write the body of a scan as a function of leaves."""
    init_leaves, carry_spec = flatten(init)
    xs_leaves, x_spec = flatten(xs)
    y_specs: list[Hashable] = []
    n = len(init_leaves)

    def fn(*leaves: Tensor) -> list[Tensor]:
        carry = unflatten(leaves[:n], carry_spec)
        new, y = f(carry, unflatten(leaves[n:], x_spec))
        ys, y_spec = flatten(y)
        check_tensors(ys, y, "scan: every leaf of y")
        check_not_sharded("scan", y, "y")
        y_specs.append(y_spec)
        return [*flatten(check_carry(init, new))[0], *ys]

    names = ["the carry of a scan"] * n + ["the row of xs in a scan"] * len(xs_leaves)
    substitute = current_trace().substitute
    return FlatBody(
        fn,
        [substitute(leaf) for leaf in init_leaves],
        [substitute(leaf) for leaf in xs_leaves],
        carry_spec,
        y_specs,
        names,
    )


def _trace_body(f: Callable[..., Any], init: Tree, xs: Tree) -> _Body:
    flat = flat_body(f, init, xs)
    # If the carry has one memory layout throughout, a view in the body is a view at every step.
    init_leaves = [_resolve_sign(leaf).contiguous() for leaf in to_fake(flat.init)]
    xs_leaves = [_resolve_sign(leaf) for leaf in to_fake(flat.xs)]

    def arguments() -> list[Tensor]:
        # Copies: the body may also close over the first carry itself.
        return [*(leaf.clone() for leaf in init_leaves), *(leaf[0] for leaf in xs_leaves)]

    graph, closed_over = trace_part(f, flat.fn, arguments, flat.names, "scan: the body")
    return _Body(graph, init_leaves, xs_leaves, closed_over, flat.carry_spec, flat.y_specs[0])


class _Operands(NamedTuple):
    """The operands of the loop's node, and the leaves of the carry and of xs that they come from.

    The operator insists on a carry and on xs: without any of them, `filler` takes the place.
    """

    changed: list[int]  # leaves of the carry that change from step to step
    unchanged: list[int]  # leaves that the body returns as they are: constants of the loop
    used: list[int]  # leaves of xs that the body reads
    carried: list[Tensor]
    walked: list[Tensor]
    constants: list[Tensor]  # closed over, then unchanged
    filler: Tensor  # zeros, [length]


def _choose_operands(body: _Body, length: int) -> _Operands:
    """Choose what the loop carries, what it walks along, and what is constant."""
    n = len(body.init)
    arguments, results = nodes_of(body.graph.graph, "placeholder"), results_of(body.graph.graph)
    changed = [i for i in range(n) if results[i] is not arguments[i]]
    unchanged = [i for i in range(n) if results[i] is arguments[i]]
    used = [i for i in range(len(body.xs)) if arguments[n + i].users]
    device = next((leaf.device for leaf in [*body.init, *body.xs]), None)
    filler = torch.zeros(length, device=device)
    return _Operands(
        changed,
        unchanged,
        used,
        carried=[contiguous_copy(body.init[i]) for i in changed] or [filler[0].clone()],
        walked=[body.xs[i] for i in used] or [filler],
        # The operator refuses constants that share memory.
        constants=copy_aliases(
            [*map(_resolve_sign, body.closed_over), *(body.init[i] for i in unchanged)], []
        ),
        filler=filler,
    )


def _write_loop(
    body: _Body, operands: _Operands, length: int, unroll: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Write the node of a loop that runs `unroll` steps of the body at each turn.

    Returns:
        The last values of the leaves in `operands.changed`, and the stacked ys.
    """
    changed, unchanged, used, carried, walked, constants, filler = operands
    n, m = len(body.init), len(body.xs)
    is_complex = [x.is_complex() for x in [*carried, *walked, *constants]]
    y_is_complex = [node.meta["val"].is_complex() for node in results_of(body.graph.graph)[n:]]

    def turn(*leaves: Tensor) -> list[Tensor]:
        # Outputs must not share memory with inputs or each other, and strides must be stable.
        rest = iter(_as_complex(leaves, is_complex))
        new = [next(rest) for _ in carried]
        rows = [next(rest) for _ in walked]
        closed_over = [next(rest) for _ in body.closed_over]
        carry = dict(zip(unchanged, rest, strict=True))
        ys = []
        for i in range(unroll):
            row_leaves = rows if unroll == 1 else [block[i] for block in rows]
            row = dict(zip(used, row_leaves[: len(used)], strict=True))
            carry |= dict(zip(changed, new[: len(changed)], strict=True))
            outputs = body.graph(
                *(carry[j] for j in range(n)), *(row.get(j) for j in range(m)), *closed_over
            )
            new = [outputs[j].contiguous() for j in changed] or new  # as the body was traced
            ys.append(outputs[n:] or [torch.zeros((), device=filler.device)] * NEEDS_Y)
        stacked = ys[0] if unroll == 1 else [torch.stack(y) for y in zip(*ys, strict=True)]
        return [contiguous_copy(leaf) for leaf in _as_real([*new, *stacked])]

    if unroll > 1:  # copies: the operator refuses views of what the body closes over
        walked = [leaf.unflatten(0, (length // unroll, unroll)).clone() for leaf in walked]
    # Inductor refuses loops over complex numbers.
    outputs = LOOP(turn, _as_real(carried), _as_real(walked), tuple(_as_real(constants)))
    if calls_back(body.graph):
        keep(outputs[0])
    carry = _as_complex(outputs[: len(changed)], is_complex)
    ys = _as_complex(outputs[len(carried) :], y_is_complex)
    return carry, ys if unroll == 1 else [y.flatten(0, 1) for y in ys]


def _as_real(leaves: Sequence[Tensor]) -> list[Tensor]:
    """View complex numbers as pairs of real ones."""
    return [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in leaves]


def _as_complex(leaves: Sequence[Tensor], is_complex: Sequence[bool]) -> list[Tensor]:
    """Undo `_as_real`."""
    pairs = zip(leaves, is_complex, strict=False)
    return [torch.view_as_complex(x.contiguous()) if complex_ else x for x, complex_ in pairs]


def _resolve_sign(leaf: Tensor) -> Tensor:
    """Compute a lazy conjugate or negative, which the operator has no rule for."""
    return leaf.resolve_conj().resolve_neg()


def _unroll_factor(body: GraphModule, length: int) -> int:
    """Return how many steps to unroll: several if the body is tiny.

    A step of linear regression on ten examples takes less time than the loop around it, which
    handles a dozen tensors per turn; unrolled, ten steps are one kernel.
    """
    calls, trace = nodes_of(body.graph, "call_function"), current_trace()
    if not trace.unroll or not all(_is_small(node) for node in calls):
        return 1
    most = min(MAX_UNROLL, MAX_OPERATIONS // max(len(calls), 1))
    factor = max((n for n in range(1, most + 1) if length % n == 0), default=1)
    trace.several_steps |= factor > 1
    return factor


def _is_small(node: Node) -> bool:
    """Check whether an operation fuses with its neighbours and takes about a microsecond."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_complex() or value.numel() > 4096:
        return False
    if node.target is LOOP:
        return False
    factors = [arg.meta["val"] for arg in node.args if isinstance(arg, Node)]
    return node.target not in CALLED or factors[-1].numel() * value.numel() <= 4096
