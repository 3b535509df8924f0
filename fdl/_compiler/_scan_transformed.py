"""`scan` under `grad`, `vmap` and `jvp` inside `jit`: still one loop, as in JAX.

The body is first traced as it is written, outside of the transformations (`_closed_body.py`). Each
transformation of a loop is then a loop with another body, and the innermost one is handled first:

- `vmap`: the body under `vmap`; what depends on a batched tensor is batched from the first step on;
- `jvp`: the carry and its tangent, in step;
- `grad`: the loop also returns the carry that each step starts from; the derivative is a loop over
  these, from the last step to the first, that runs the step again and pulls back its cotangents.

Below the last transformation the loop is written into the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.func import jvp, vjp, vmap
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_slot

from fdl._compiler._closed_body import close_body, closed_graph
from fdl._compiler._custom_functions import CannotClose
from fdl._compiler._graph import LOOP, is_smooth, nodes_of, reached, results_of, with_results, worth_keeping
from fdl._compiler._purity import innermost
from fdl._compiler._scan_eager import scan_as_loop
from fdl._compiler._scan_traced import flat_body, scan_traced
from fdl._compiler._signature import unflatten
from fdl._compiler._trace import current_trace, plain
from fdl.tree import Tree


def scan_transformed(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    """Run a scan under the active transformations, as one loop."""
    flat = flat_body(f, init, xs)
    try:
        body = close_body(f, flat)
    except CannotClose as reason:
        current_trace().unrolled.append((length, str(reason)))
        return scan_as_loop(f, init, xs, length)
    n, m = len(body.init), len(body.xs)
    # Leaves that every step returns as they are become constants of the loop.
    inputs, results = nodes_of(body.graph.graph, "placeholder"), results_of(body.graph.graph)
    kept = [i for i in range(n) if results[i] is inputs[i]]
    changed = [i for i in range(n) if i not in kept]
    for i in kept:
        nodes_of(body.graph.graph, "placeholder")[-1].append(inputs[i])
    (output,) = nodes_of(body.graph.graph, "output")
    output.args = ([results[i] for i in [*changed, *range(n, len(results))]],)
    operands = [
        *(body.init[i] for i in changed),
        *body.xs,
        *body.closed_over,
        *(body.init[i] for i in kept),
    ]
    new = run_loop(Loop(body.graph, len(changed), m, length), operands)
    carry = dict(zip(changed, new, strict=False)) | {i: body.init[i] for i in kept}
    return (
        unflatten([carry[i] for i in range(n)], flat.carry_spec),
        unflatten(new[len(changed) :], flat.y_specs[0]),
    )


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


def run_loop(loop: Loop, operands: Sequence[Tensor]) -> list[Tensor]:
    """Run a loop under the active transformations, innermost first: `[*carry, *ys]`."""
    operands = [functorch.unwrap_if_dead(x) for x in operands]
    if functorch.peek_interpreter_stack() is None:
        return _write(loop, operands)
    interpreter = retrieve_current_functorch_interpreter()
    return RULES[interpreter.key()](loop, operands, interpreter)


def _write(loop: Loop, operands: list[Tensor]) -> list[Tensor]:
    """Write a loop into the graph that is being traced."""
    init, xs, constants = loop.split(operands)

    def body(carry: list[Tensor], row: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        results = run_graph(loop.body, [*carry, *row, *constants])
        return results[: loop.carry], results[loop.carry :]

    carry, ys = scan_traced(body, init, xs, loop.length)
    return [*carry, *ys]


def run_graph(
    graph: GraphModule,
    arguments: Sequence[Tensor],
    note: Callable[[dict[Node, Node]], None] | None = None,
) -> list[Tensor]:
    """Run the graph of a body under the active transformations, with its inner loops.

    Args:
        graph: the graph.
        arguments: its arguments.
        note: called for each tensor, with its node and the node that computes it in the graph that
            is being traced.
    """
    return cast(list[Tensor], _Run(graph, note).run(*arguments))


class _Run(Interpreter):
    def __init__(self, graph: GraphModule, note: Callable[[dict[Node, Node]], None] | None) -> None:
        super().__init__(graph)
        self.note = note

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.note is not None and isinstance(value, Tensor):
            tracer = current_trace().tracers[-1]
            self.note({n: get_proxy_slot(innermost(value), tracer, None, lambda x: x.proxy.node)})
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not LOOP:
            return super().call_function(target, args, kwargs)
        body, init, xs, constants = args[:4]
        return run_loop(Loop(body, len(init), len(xs), len(xs[0])), [*init, *xs, *constants])


def _examples(loop: Loop, operands: Sequence[Tensor]) -> list[Tensor]:
    """Make arguments of a body from the operands of its loop."""
    init, xs, constants = loop.split(operands)
    return [*map(plain, init), *(plain(x, 1) for x in xs), *map(plain, constants)]


def _under_vmap(loop: Loop, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    level, size = interpreter.level(), interpreter.batch_size()
    values, axes = zip(*(functorch._unwrap_batched(x, level) for x in operands), strict=True)
    graph = loop.body.graph
    inputs, outputs = reached(
        graph, [i for i, axis in enumerate(axes) if axis is not None], loop.carry
    )
    is_row = [loop.carry <= i < loop.carry + loop.xs for i in range(len(operands))]

    def move(i: int) -> Tensor:
        """Move the axis of the batch to the front, or in xs behind that of the steps."""
        if axes[i] is not None:
            return values[i].movedim(axes[i], int(is_row[i]))
        return values[i].expand(size, *values[i].shape) if i in inputs else values[i]

    def fn(*leaves: Tensor) -> list[Tensor]:
        in_dims = tuple(0 if i in inputs else None for i in range(len(leaves)))
        out_dims = tuple(0 if is_batched else None for is_batched in outputs)
        batched = vmap(lambda *z: tuple(run_graph(loop.body, z)), in_dims, out_dims)
        return list(batched(*leaves))

    with interpreter.lower():
        moved = [move(i) for i in range(len(operands))]
        new = loop._replace(body=closed_graph(fn, _examples(loop, moved)))
        results = run_loop(new, moved)
    return [
        functorch._add_batch_dim(x, int(i >= loop.carry), level) if outputs[i] else x
        for i, x in enumerate(results)
    ]


def _under_jvp(loop: Loop, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    level = interpreter.level()
    pairs = [forward_ad.unpack_dual(x) if is_smooth(x) else (x, None) for x in operands]
    primals = [functorch._unwrap_for_grad(primal, level) for primal, _ in pairs]
    tangents = {
        i: functorch._unwrap_for_grad(tangent, level)
        for i, (_, tangent) in enumerate(pairs)
        if tangent is not None
    }
    inputs, outputs = reached(loop.body.graph, tangents, loop.carry, smooth=True)
    moving = sorted(inputs)
    n, m = loop.carry, loop.carry + loop.xs
    n_moving, m_moving = sum(i < n for i in moving), sum(i < m for i in moving)
    with interpreter.lower():
        operand_tangents = [
            tangents[i] if i in tangents else torch.zeros_like(primals[i]) for i in moving
        ]
        init, xs, constants = loop.split(primals)
        init += operand_tangents[:n_moving]
        xs += operand_tangents[n_moving:m_moving]
        constants += operand_tangents[m_moving:]
        new = Loop(loop.body, len(init), len(xs), loop.length)

        def fn(*leaves: Tensor) -> list[Tensor]:
            carry, row, rest = new.split(leaves)
            k, fixed = len(rest) - (len(moving) - m_moving), [*carry[:n], *row[: loop.xs]]
            fixed += rest[:k]
            directions = (*carry[n:], *row[loop.xs :], *rest[k:])

            def along(*chosen: Tensor) -> tuple[Tensor, ...]:
                arguments = _replaced(fixed, moving, chosen)
                return tuple(run_graph(loop.body, arguments))

            results, slopes = jvp(along, tuple(fixed[i] for i in moving), directions)
            carried = [slopes[i] for i in range(n) if outputs[i]]
            stacked = [slopes[i] for i in range(n, len(outputs)) if outputs[i]]
            return [*results[:n], *carried, *results[n:], *stacked]

        body = closed_graph(fn, _examples(new, [*init, *xs, *constants]))
        results = run_loop(new._replace(body=body), [*init, *xs, *constants])
    carry, ys = results[: len(init)], results[len(init) :]
    count = len(outputs) - n
    values, slopes = [*carry[:n], *ys[:count]], iter([*carry[n:], *ys[count:]])
    return [
        forward_ad.make_dual(x, next(slopes)) if moves else x
        for x, moves in zip(values, outputs, strict=True)
    ]


def _under_grad(loop: Loop, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    level, n_operands = interpreter.level(), len(operands)
    n_results = len(results_of(loop.body.graph))
    # The backward pass reads the carry at the start of each step, and what is costly to compute.
    kept = [*nodes_of(loop.body.graph, "placeholder")[: loop.carry], *worth_keeping(loop.body.graph)]
    with_kept = loop._replace(body=with_results(loop.body, kept))

    class Scan(_SingleLevelFunction):
        @staticmethod
        def forward(*operands: Tensor) -> tuple[Tensor, ...]:
            values = [functorch._unwrap_for_grad(x, level) for x in operands]
            with (
                torch.enable_grad(),
                forward_ad._set_fwd_grad_enabled(True),
                interpreter.lower(),
            ):
                results = run_loop(with_kept, values)
            return tuple(functorch._wrap_for_grad(x, level) for x in results)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs, *output[n_results:])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = [functorch.unwrap_if_dead(x) for x in ctx.saved_tensors]
            inputs, rows = saved[:n_operands], saved[n_operands:]
            needed = [i for i, x in enumerate(ctx.needs_input_grad) if x]
            return _pull_back(loop, inputs, rows, cotangents[:n_results], needed)

    with enable_single_level_autograd_function():
        return list(Scan.apply(*operands))[:n_results]


def _pull_back(
    loop: Loop,
    operands: list[Tensor],
    kept: list[Tensor],
    cotangents: Sequence[Tensor | None],
    needed: list[int],
) -> tuple[Tensor | None, ...]:
    """Run the steps of a loop backwards, and return the gradients of the operands.

    Args:
        loop: the loop.
        operands: of the loop.
        kept: the carry at the start of each step, then the values that are `worth_keeping`.
        cotangents: of the last carry and of ys; None stands for zeros.
        needed: indices of operands whose gradients are returned, others are None.
    """
    n, m = loop.carry, loop.carry + loop.xs
    inputs, outputs = reached(loop.body.graph, needed, n, smooth=True)
    carried = [i for i in range(n) if i in inputs]
    rows = [i for i in needed if n <= i < m]
    fixed = [i for i in needed if i >= m]
    ys = [i for i in range(n, len(outputs)) if outputs[i] and cotangents[i] is not None]
    results = [*(i for i in carried if outputs[i]), *ys]
    more = len(kept) - n
    computed: dict[Node, Node] = {}  # what computes the values of the body in its derivative

    def fn(*leaves: Tensor) -> list[Tensor]:
        carry, row, constants = new.split(leaves)
        arguments = [*row[:n], *row[n + more : m + more], *constants]
        wanted = [*carried, *rows, *fixed]

        def step(*chosen: Tensor) -> tuple[Tensor, ...]:
            values = run_graph(loop.body, _replaced(arguments, wanted, chosen), computed.update)
            return tuple(values[i] for i in results)

        along = [x for i, x in zip(carried, carry, strict=False) if outputs[i]]
        grads = vjp(step, *(arguments[i] for i in wanted))[1]((*along, *row[m + more :]))
        k = len(wanted) - len(fixed)
        sums = [a + b for a, b in zip(carry[len(carried) :], grads[k:], strict=True)]
        return [*grads[: len(carried)], *sums, *grads[len(carried) : k]]

    if all(cotangents[i] is None for i in results):
        return (None,) * len(operands)
    _, xs, constants = loop.split(operands)
    init = [_or_zeros(cotangents[i], operands[i]) for i in carried]
    init += [torch.zeros_like(operands[i]) for i in fixed]
    xs = [x.flip(0) for x in [*kept, *xs, *(cast(Tensor, cotangents[i]) for i in ys)]]
    new = Loop(loop.body, len(init), len(xs), loop.length)
    all_operands = [*init, *xs, *constants]
    body = closed_graph(fn, _examples(new, all_operands))
    _read(body, computed, dict(zip(worth_keeping(loop.body.graph), range(len(init) + n, len(init) + n + more), strict=True)))
    grads = run_loop(new._replace(body=body), all_operands)
    by_index = dict(zip([*carried, *fixed], grads, strict=False))
    by_index |= {i: x.flip(0) for i, x in zip(rows, grads[len(init) :], strict=True)}
    return tuple(by_index[i] if i in needed else None for i in range(len(operands)))


def _read(body: GraphModule, computed: dict[Node, Node], inputs: dict[Node, int]) -> None:
    """Read values from arguments of a body instead of computing them.

    Args:
        body: the graph, which is changed.
        computed: the node of `body` that computes each value.
        inputs: the index of the argument that holds it.
    """
    arguments = nodes_of(body.graph, "placeholder")
    for value, i in inputs.items():
        if computed.get(value) is not None:
            computed[value].replace_all_uses_with(arguments[i])
    body.graph.eliminate_dead_code()


def _or_zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x


def _replaced(values: Sequence[Tensor], indices: Sequence[int], by: Sequence[Tensor]) -> list[Tensor]:
    new = list(values)
    for i, value in zip(indices, by, strict=True):
        new[i] = value
    return new


RULES = {
    functorch.TransformType.Vmap: _under_vmap,
    functorch.TransformType.Grad: _under_grad,
    functorch.TransformType.Jvp: _under_jvp,
}
