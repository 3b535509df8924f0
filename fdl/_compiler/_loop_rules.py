"""A loop under `vmap` or `jvp` is a loop with another body."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from fdl._compiler._closed_body import closed_graph
from fdl._compiler._graph import reached
from fdl._compiler._loops import Loop, replaced, run_graph, run_loop, unpack_duals


def under_vmap(loop: Loop, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    """Run the body under `vmap`; what is batched in some step is batched from the first step on."""
    level = interpreter.level()
    pairs = [functorch._unwrap_batched(x, level) for x in operands]
    axes = {i: axis for i, (_, axis) in enumerate(pairs) if axis is not None}
    if not axes:
        with interpreter.lower():
            return run_loop(loop, operands)
    inputs, outputs = reached(loop.body.graph, axes, loop.carry)
    in_dims = tuple(0 if i in inputs else None for i in range(len(operands)))
    out_dims = tuple(0 if batched else None for batched in outputs)

    def move(i: int) -> Tensor:
        """Move the axis of the batch to the front, or in xs behind that of the steps."""
        value = pairs[i][0]
        if i in axes:
            axis = int(loop.carry <= i < loop.carry + loop.xs)
            return value if axes[i] == axis else value.movedim(axes[i], axis)
        return value.expand(interpreter.batch_size(), *value.shape) if i in inputs else value

    def fn(*leaves: Tensor) -> list[Tensor]:
        run = vmap(
            lambda *z: tuple(run_graph(loop.body, z)), cast(Any, in_dims), cast(Any, out_dims)
        )
        return list(run(*leaves))

    with interpreter.lower():
        moved = [move(i) for i in range(len(operands))]
        body, more = closed_graph(fn, loop.examples(moved))
        results = run_loop(loop._replace(body=body), [*moved, *more])
    return [
        functorch._add_batch_dim(x, int(i >= loop.carry), level) if outputs[i] else x
        for i, x in enumerate(results)
    ]


def under_jvp(loop: Loop, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    """Carry the tangents beside the values."""
    primals, tangents = unpack_duals(operands, interpreter.level())
    if not tangents:
        with interpreter.lower():
            return run_loop(loop, primals)
    inputs, outputs = reached(loop.body.graph, tangents, loop.carry, smooth=True)
    moving, n = sorted(inputs), loop.carry
    counts = (n, loop.xs, len(operands) - n - loop.xs)

    def fn(*leaves: Tensor) -> list[Tensor]:
        parts = [(part[:k], part[k:]) for part, k in zip(new.split(leaves), counts, strict=True)]
        values = [x for part, _ in parts for x in part]
        directions = [x for _, part in parts for x in part]

        def along(*chosen: Tensor) -> tuple[Tensor, ...]:
            return tuple(run_graph(loop.body, replaced(values, moving, chosen)))

        results, slopes = cast(Any, jvp)(along, tuple(values[i] for i in moving), tuple(directions))
        # torch makes the tangent of a 0-d tensor times a Python number float64 (issue 90065).
        chosen = [(i, x.to(results[i].dtype)) for i, x in enumerate(slopes) if outputs[i]]
        carry = [x for i, x in chosen if i < n]
        return [*results[:n], *carry, *results[n:], *(x for i, x in chosen if i >= n)]

    with interpreter.lower():
        slopes = [tangents[i] if i in tangents else torch.zeros_like(primals[i]) for i in moving]
        init, xs, constants = loop.split(primals)
        k, m = sum(i < n for i in moving), sum(i < n + loop.xs for i in moving)
        init, xs, constants = init + slopes[:k], xs + slopes[k:m], constants + slopes[m:]
        new = Loop(loop.body, len(init), len(xs), loop.length)
        all_operands = [*init, *xs, *constants]
        body, more = closed_graph(fn, new.examples(all_operands))
        results = run_loop(new._replace(body=body), [*all_operands, *more])
    return _pack(results, outputs, n)


def _pack(results: list[Tensor], moves: list[bool], carry: int) -> list[Tensor]:
    """Make dual numbers of `[*carry, *their tangents, *ys, *their tangents]`."""
    first = carry + sum(moves[:carry])  # of ys
    ys = first + len(moves) - carry
    values = [*results[:carry], *results[first:ys]]
    slopes = iter([*results[carry:first], *results[ys:]])
    return [
        forward_ad.make_dual(x, next(slopes)) if has_tangent else x
        for x, has_tangent in zip(values, moves, strict=True)
    ]
