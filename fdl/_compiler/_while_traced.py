"""`while_loop` inside `jit`: one node of the traced graph, also under `vmap` and `jvp`.

Each transformation of a loop is a loop with another condition and body; the innermost one is
handled first, as for a scan (`_scan_transformed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from fdl._compiler._branches_traced import close, pure_graph
from fdl._compiler._callbacks import calls_back, keep
from fdl._compiler._custom_functions import CannotClose
from fdl._compiler._fakes import make_symbols
from fdl._compiler._graph import WHILE, is_smooth
from fdl._compiler._loops import OPERATORS, innermost_first, replaced, run_graph, unpack_duals
from fdl._compiler._scan_eager import contiguous_copy
from fdl._compiler._signature import flatten, unflatten
from fdl._compiler._trace import copy_aliases, current_trace
from fdl.tree import Tree

NO_REVERSE = (
    "while_loop: no gradient can be taken in reverse mode, since the number of steps is not known; "
    "use fori_loop with ints or scan, forward mode (torch.func.jvp), or detach the carry"
)


def as_pred(x: Any) -> Tensor:
    """Check the result of a condition, and return it as a bool."""
    if isinstance(x, bool):
        return torch.full((), x)
    if not isinstance(x, Tensor) or x.ndim:
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"while_loop: cond_fun must return a 0-d tensor, got {got}")
    return x if x.dtype == torch.bool else x != 0


class While(NamedTuple):
    """A loop whose operands are `[*init, *constants]`."""

    condition: Callable[..., Tensor]  # of carry and constants; it closes over no tensors
    body: Callable[..., list[Tensor]]  # likewise, returns the carry
    carry: int  # number of leaves


def while_traced(
    condition: Callable[[Tree], Tensor], body: Callable[[Tree], Tree], init: Tree
) -> Tree:
    """Write a `while_loop` into the graph that `jit` is tracing."""
    leaves, spec = flatten(init)
    leaves = [current_trace().substitute(leaf) for leaf in leaves]
    n, noun = len(leaves), "the carry"

    def flat_condition(*leaves: Tensor) -> list[Tensor]:
        return [condition(unflatten(leaves, spec))]

    def flat_body(*leaves: Tensor) -> list[Tensor]:
        return flatten(body(unflatten(leaves, spec)))[0]

    try:
        first = close(condition, flat_condition, leaves, "while_loop: cond_fun", noun)
        second = close(body, flat_body, leaves, "while_loop: body_fun", noun)
        m = n + len(first.closed_over)
        loop = While(lambda *z: first.run(*z[:m])[0], lambda *z: second.run(*z[:n], *z[m:]), n)
        tested = [x.detach() for x in first.closed_over]  # a condition has no derivative
        results = run_while(loop, [*leaves, *tested, *second.closed_over])
    except CannotClose as reason:
        raise NotImplementedError(f"while_loop: it cannot be traced here: {reason}") from reason
    return unflatten(results, spec)


def _write(loop: While, operands: list[Tensor]) -> list[Tensor]:
    """Write a loop into the graph that is being traced."""
    carry = [contiguous_copy(x) for x in operands[: loop.carry]]
    constants = copy_aliases(operands[loop.carry :], [])

    make_symbols(current_trace().mode)  # the operator asks for them
    condition = pure_graph(lambda *z: [loop.condition(*z)], [*carry, *constants])
    body = pure_graph(loop.body, [*carry, *constants])
    results = list(
        WHILE(
            lambda *z: condition(*z)[0], lambda *z: tuple(body(*z)), tuple(carry), tuple(constants)
        )
    )
    if calls_back(condition) or calls_back(body):
        keep(results[0])
    return results


def _under_vmap(loop: While, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    level, size, n = interpreter.level(), interpreter.batch_size(), loop.carry
    values, axes = zip(*(functorch._unwrap_batched(x, level) for x in operands), strict=True)
    if all(axis is None for axis in axes):
        with interpreter.lower():
            return run_while(loop, values)
    dims = tuple(0 if i < n or axis is not None else None for i, axis in enumerate(axes))

    def condition(*leaves: Tensor) -> Tensor:
        return vmap(loop.condition, dims)(*leaves).any()

    def body(*leaves: Tensor) -> list[Tensor]:
        def step(*leaves: Tensor) -> tuple[Tensor, ...]:  # a finished member stays as it is
            go_on = loop.condition(*leaves)
            new = loop.body(*leaves)
            return tuple(torch.where(go_on, x, y) for x, y in zip(new, leaves[:n], strict=True))

        return list(vmap(step, dims)(*leaves))

    with interpreter.lower():
        moved = [
            x.movedim(axis, 0) if axis is not None else x.expand(size, *x.shape) if i < n else x
            for i, (x, axis) in enumerate(zip(values, axes, strict=True))
        ]
        results = run_while(While(condition, body, n), moved)
    return [functorch._add_batch_dim(x, 0, level) for x in results]


def _under_jvp(loop: While, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    values, slopes = unpack_duals(operands, interpreter.level())
    n = loop.carry
    with interpreter.lower():
        if not slopes:
            return run_while(loop, values)
        carried = [i for i in range(n) if is_smooth(values[i])]
        fixed = [i for i in slopes if i >= n]
        directions = [
            slopes[i] if i in slopes else torch.zeros_like(values[i]) for i in [*carried, *fixed]
        ]
        k = n + len(carried)

        def split(leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            """Return the operands of `loop`, and their directions."""
            m = k + len(values) - n
            return [*leaves[:n], *leaves[k:m]], [*leaves[n:k], *leaves[m:]]

        def condition(*leaves: Tensor) -> Tensor:
            return loop.condition(*split(leaves)[0])

        def body(*leaves: Tensor) -> list[Tensor]:
            inputs, along = split(leaves)
            moving = [*carried, *fixed]

            def step(*chosen: Tensor) -> tuple[Tensor, ...]:
                return tuple(loop.body(*replaced(inputs, moving, chosen)))

            new, slopes = cast(Any, jvp)(step, tuple(inputs[i] for i in moving), tuple(along))
            # torch's tangents of 0-d tensors may have a wider dtype.
            return [*new, *(slopes[i].to(new[i].dtype) for i in carried)]

        c = len(carried)
        operands = [*values[:n], *directions[:c], *values[n:], *directions[c:]]
        results = run_while(While(condition, body, k), operands)
    duals = dict(zip(carried, results[n:], strict=True))
    return [
        forward_ad.make_dual(x, duals[i]) if i in duals else x for i, x in enumerate(results[:n])
    ]


def _under_grad(loop: While, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    level = interpreter.level()
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        raise NotImplementedError(NO_REVERSE)
    values = [functorch._unwrap_for_grad(x, level) for x in operands]
    with interpreter.lower():
        return run_while(loop, values)


RULES = {
    functorch.TransformType.Vmap: _under_vmap,
    functorch.TransformType.Grad: _under_grad,
    functorch.TransformType.Jvp: _under_jvp,
}


# Runs it under the active transformations, given the loop and all operands.
run_while = partial(innermost_first, RULES, _write)


def _rerun(
    condition: Any, body: Any, carry: Sequence[Tensor], constants: Sequence[Tensor]
) -> list[Tensor]:
    """Run a node of a graph again, under the active transformations."""
    loop = While(
        lambda *z: cast(Any, run_graph(condition, z)),
        lambda *z: run_graph(body, z),
        len(carry),
    )
    return run_while(loop, [*carry, *constants])


OPERATORS[WHILE] = _rerun
