"""`cond` inside `jit`: one node of the traced graph, also under `grad`, `vmap` and `jvp`.

Both branches are traced first, outside of the transformations. Each transformation of a `cond` is
then a `cond` with other branches, and the innermost one is handled first, as for a scan
(`_scan_transformed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.func import jvp, vjp, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from fdl import _modes, tree
from fdl._compiler._callbacks import calls_back, keep
from fdl._compiler._closed_body import close_body
from fdl._compiler._graph import COND, is_smooth, results_of
from fdl._compiler._loops import (
    OPERATORS,
    innermost_first,
    replaced,
    run_below,
    run_graph,
    unpack_duals,
)
from fdl._compiler._scan_eager import contiguous_copy
from fdl._compiler._scan_traced import FlatBody
from fdl._compiler._signature import flatten, unflatten
from fdl._compiler._trace import copy_aliases, current_trace, to_fake, trace_flat, trace_part
from fdl.tree import Tree
from fdl.tree._checks import check_tensors
from fdl.tree._map import match

Branch = Callable[..., list[Tensor]]  # of plain tensors, which closes over no others


def cond_traced(
    pred: Tensor, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Tree
) -> Tree:
    """Write a `cond` into the graph that `jit` is tracing."""
    given, spec = flatten(operands)
    at = [i for i, leaf in enumerate(given) if isinstance(leaf, Tensor)]
    leaves = [current_trace().substitute(given[i]) for i in at]
    specs: list[Hashable] = []

    def flat(fn: Callable[..., Any], name: str) -> Branch:
        def call(*leaves: Tensor) -> list[Tensor]:
            result = fn(*unflatten(replaced(given, at, leaves), spec))
            outputs, out_spec = flatten(result)
            check_tensors(outputs, result, f"cond: every leaf of the result of {name}")
            specs.append(out_spec)
            return outputs

        return call

    yes = close(true_fn, flat(true_fn, "true_fn"), leaves, "cond: true_fn")
    no = close(false_fn, flat(false_fn, "false_fn"), leaves, "cond: false_fn")
    match_branches(unflatten(yes.examples(), specs[0]), unflatten(no.examples(), specs[-1]))
    n, m = len(leaves), len(leaves) + len(yes.closed_over)
    branches = (lambda *z: yes.run(*z[:m]), lambda *z: no.run(*z[:n], *z[m:]))
    new = run_cond(branches, [pred, *leaves, *yes.closed_over, *no.closed_over])
    return unflatten(new, specs[0])


def match_branches(yes: Tree, no: Tree) -> list[Tensor]:
    """Check that the results of two branches are alike, and return the leaves of the second."""
    for result, name in ((yes, "true_fn"), (no, "false_fn")):
        check_tensors(tree.leaves(result), result, f"cond: every leaf of the result of {name}")
    leaves = match(yes, no, "cond: the result of false_fn")
    forms = zip(tree.leaves(yes), leaves, strict=True)
    if any(x.shape != y.shape or x.dtype != y.dtype for x, y in forms):
        lines = tree.diff(yes, no, values=False)
        raise ValueError(
            "cond: the results of true_fn and false_fn must have the same structure, shapes and "
            "dtypes:\n  " + "\n  ".join(lines)
        )
    return leaves


class Closed(NamedTuple):
    """A function of tensors that closes over none."""

    graph: GraphModule  # (*leaves, *closed_over) -> list of results
    closed_over: list[Tensor]

    def run(self, *leaves: Tensor) -> list[Tensor]:
        return run_graph(self.graph, leaves)

    def examples(self) -> list[Tensor]:
        """Return fake tensors like the results."""
        return [node.meta["val"] for node in results_of(self.graph.graph)]


def close(
    f: Callable[..., Any], fn: Branch, leaves: Sequence[Tensor], name: str, noun: str = "an operand"
) -> Closed:
    """Trace a function by itself; what it closes over becomes its last arguments.

    Args:
        f: the function.
        fn: the same as a function of leaves.
        leaves: its arguments.
        name: name of the function in error messages.
        noun: of an argument in error messages.
    """
    names = [f"{noun} of {name.partition(':')[0]}"] * len(leaves)
    if _modes.in_transform():
        body = close_body(f, FlatBody(fn, list(leaves), [], (), [], names))
        return Closed(body.graph, body.closed_over)
    return Closed(*trace_part(f, fn, lambda: _copies(leaves), names, name))


def _copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.clone() for leaf in to_fake(leaves)]


def _write(branches: tuple[Branch, Branch], operands: list[Tensor]) -> list[Tensor]:
    """Write a `cond` into the graph that is being traced."""
    pred, *rest = operands
    rest = copy_aliases(rest, [])  # the operator refuses operands that share memory
    yes, no = (pure_graph(branch, rest) for branch in branches)
    if not (calls_back(yes) or calls_back(no)):
        return list(COND(pred, yes, no, tuple(rest)))

    def with_filler(branch: Branch) -> Branch:  # there may be no result to keep
        return lambda *z: [*branch(*z), torch.zeros((), device=pred.device)]

    yes, no = (pure_graph(with_filler(branch), rest) for branch in branches)
    *results, filler = COND(pred, yes, no, tuple(rest))
    keep(filler)
    return results


def pure_graph(fn: Branch, operands: Sequence[Tensor]) -> GraphModule:
    """Trace a function that closes over no tensors, without in-place operations.

    Its results do not share memory with its operands or each other, and are contiguous.
    """
    leaks = current_trace().leaks
    made_before = len(leaks.made)
    with disable_proxy_modes_tracing():
        fakes = _copies(operands)
        graph, constants = trace_flat(lambda *z: [*map(contiguous_copy, fn(*z))], fakes, ())
    assert not constants, "a branch is closed"
    del leaks.made[made_before:]
    return graph


def _under_vmap(
    branches: tuple[Branch, Branch], operands: list[Tensor], interpreter: Any
) -> list[Tensor]:
    level = interpreter.level()
    values, axes = zip(*(functorch._unwrap_batched(x, level) for x in operands), strict=True)
    if axes[0] is not None:  # a predicate for each member: both branches run
        pred, rest = operands[0], operands[1:]
        yes, no = (
            branch(*(torch.where(taken, x, x.detach()) if is_smooth(x) else x for x in rest))
            for branch, taken in zip(branches, (pred, ~pred), strict=True)
        )
        return [torch.where(pred, x, y) for x, y in zip(yes, no, strict=True)]
    if all(axis is None for axis in axes):
        with interpreter.lower():
            return run_cond(branches, values)

    def batched(branch: Branch) -> Branch:
        run = vmap(lambda *z: tuple(branch(*z)), cast(Any, axes[1:]))
        return lambda *z: list(run(*z))

    with interpreter.lower():
        results = run_cond((batched(branches[0]), batched(branches[1])), values)
    return [functorch._add_batch_dim(x, 0, level) for x in results]


def _under_jvp(
    branches: tuple[Branch, Branch], operands: list[Tensor], interpreter: Any
) -> list[Tensor]:
    values, slopes = unpack_duals(operands, interpreter.level())
    n = len(values)

    def along(branch: Branch) -> Branch:
        def fn(*leaves: Tensor) -> list[Tensor]:
            fixed, directions = leaves[: n - 1], leaves[n - 1 :]

            def step(*chosen: Tensor) -> tuple[Tensor, ...]:
                return tuple(branch(*replaced(fixed, moving, chosen)))

            new, slopes = cast(Any, jvp)(step, tuple(fixed[i] for i in moving), directions)
            return [*new, *(slope for slope in slopes if is_smooth(slope))]

        return fn

    with interpreter.lower():
        if not slopes:
            return run_cond(branches, values)
        moving = [i - 1 for i in slopes]
        results = run_cond((along(branches[0]), along(branches[1])), [*values, *slopes.values()])
    count = len(results) - sum(is_smooth(x) for x in results) // 2
    directions = iter(results[count:])
    return [
        forward_ad.make_dual(x, next(directions)) if is_smooth(x) else x for x in results[:count]
    ]


def _under_grad(
    branches: tuple[Branch, Branch], operands: list[Tensor], interpreter: Any
) -> list[Tensor]:
    class Cond(_SingleLevelFunction):
        @staticmethod
        def forward(*operands: Tensor) -> tuple[Tensor, ...]:
            return run_below(interpreter, partial(run_cond, branches), operands)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
            saved = [functorch.unwrap_if_dead(x) for x in ctx.saved_tensors]
            needed = [i for i, x in enumerate(ctx.needs_input_grad) if x]
            smooth = [i for i, x in enumerate(cotangents) if is_smooth(x)]
            grads = iter(_pull_back(branches, saved, cotangents, needed, smooth))
            return tuple(next(grads) if i in needed else None for i in range(len(saved)))

    with enable_single_level_autograd_function():
        return list(cast(Any, Cond).apply(*operands))


def _pull_back(
    branches: tuple[Branch, Branch],
    operands: list[Tensor],
    cotangents: Sequence[Tensor],
    needed: list[int],
    smooth: list[int],
) -> list[Tensor]:
    """Run the derivative of the branch that is taken."""
    n = len(operands)

    def backwards(branch: Branch) -> Branch:
        def fn(*leaves: Tensor) -> list[Tensor]:
            inputs, along = leaves[: n - 1], leaves[n - 1 :]
            wanted = [i - 1 for i in needed]

            def step(*chosen: Tensor) -> tuple[Tensor, ...]:
                results = branch(*replaced(inputs, wanted, chosen))
                return tuple(results[i] for i in smooth)

            return list(vjp(step, *(inputs[i] for i in wanted))[1](along))

        return fn

    pulled = (backwards(branches[0]), backwards(branches[1]))
    return run_cond(pulled, [*operands, *(cotangents[i] for i in smooth)])


RULES = {
    functorch.TransformType.Vmap: _under_vmap,
    functorch.TransformType.Grad: _under_grad,
    functorch.TransformType.Jvp: _under_jvp,
}


# Runs it under the active transformations, given the branches and all operands.
run_cond = partial(innermost_first, RULES, _write)


def _rerun(pred: Tensor, yes: Any, no: Any, operands: Sequence[Tensor]) -> list[Tensor]:
    """Run a node of a graph again, under the active transformations."""
    branches = (lambda *z: run_graph(yes, z), lambda *z: run_graph(no, z))
    return run_cond(branches, [pred, *operands])


OPERATORS[COND] = _rerun
