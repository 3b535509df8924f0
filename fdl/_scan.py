"""`scan`, a loop written as a function, and what of `jit` it has to know.

How a `scan` runs depends on where it is called:

- eagerly, or under a `torch.func` transformation: a Python loop;
- inside `jit` on the CPU: torch's `scan` operator, so that Inductor emits the loop itself;
- inside `jit` on CUDA, or where the operator refuses: a loop over a compiled body;
- inside `torch.compile`: torch's operator, or the Python loop where Inductor refuses the operator
  (without `fullgraph`) or gets its backward pass wrong.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._guards import TracingContext
from torch._higher_order_ops.scan import scan as scan_for_dynamo
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from fdl import tree
from fdl._dtensors import is_spread
from fdl._dynamo import assume_constant_result
from fdl._flat import flatten, unflatten
from fdl._trace import (
    LOOP,
    NEEDS_Y,
    check_tensors,
    faked,
    is_tracing,
    nodes_of,
    results_of,
    trace_flat,
    unshared,
    watch,
)
from fdl.tree import Tree

Carry = TypeVar("Carry")

aten = torch.ops.aten
AT_ONCE = 10  # tiny steps written one after the other
CALLED = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default)


class _None(NamedTuple):
    """Stands for None, which is a tree without leaves to JAX, and to torch a leaf."""


def _has_none(part: Tree) -> bool:
    return any(leaf is None for leaf in tree.leaves(part))


def _hide(part: Tree) -> Tree:
    """Put a tree without leaves in the place of each None."""
    if not _has_none(part):
        return part
    return pytree.tree_map(lambda leaf: _None() if leaf is None else leaf, part)


def _show(part: Tree) -> Tree:
    """Undo `_hide`."""
    return pytree.tree_map(lambda x: None if _is_none(x) else x, part, is_leaf=_is_none)


def _is_none(node: Any) -> bool:
    return isinstance(node, _None)


@assume_constant_result
def in_transform() -> bool:
    """Say whether a torch.func transformation is active, also while Dynamo traces one."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@assume_constant_result
def _inductor_takes_loops() -> bool:
    """Say whether the compiler behind Dynamo may count steps: not in a plain `torch.compile`."""
    mode: Any = TracingContext.get().fake_mode
    return torch.compiler.is_exporting() or mode.shape_env.allow_scalar_outputs


def is_eager() -> bool:
    """Say whether Python sees values: nothing is being traced, transformed or jitted."""
    return not (torch.compiler.is_compiling() or in_transform() or is_tracing())


def scan(
    f: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    xs: Tree = (),
    *,
    length: int | None = None,
) -> tuple[Carry, Tree]:
    """Fold `f` over the first axis of `xs`: `carry, y = f(carry, x)`; equals `jax.lax.scan`.

    Args:
        f: a pure function `(carry, x) -> (carry, y)`. The carry keeps its structure, shapes and
            dtypes. `y` is any tree of tensors, `None` or `()` for none.
        init: the first carry, a tree of tensors.
        xs: a tree of tensors with one common first axis; step `i` sees `leaf[i]`. None or `()` for
            none, which each step sees.
        length: the number of steps; needed only where `xs` has no leaves.

    Returns:
        The last carry, and the `y`s stacked along a new first axis. Of no steps, these are `init`
        and empty leaves, whose forms one run of `f` on zeros tells.

    Raises:
        TypeError: a leaf of `init`, `xs` or `y` is not a tensor, or one of `xs` or `y` a DTensor
            (every path is listed).
        ValueError: `xs` has no common first axis, or `f` changed the form of the carry (every
            path is listed).

    >>> scan(lambda total, x: (total + x, total), torch.tensor(0), torch.arange(4))
    (tensor(6), tensor([0, 0, 1, 3]))
    """
    has_none = _has_none(init) or _has_none(xs)
    init, xs = _hide(init), _hide(xs)

    def step(carry: Tree, x: Tree) -> tuple[Tree, Tree]:
        new, y = f(_show(carry), _show(x)) if has_none else f(cast(Carry, carry), x)
        return _hide(new) if has_none else new, _hide(y)

    for name, part in [("init", init), ("xs", xs)]:
        check_tensors(tree.leaves(part), part, f"scan: every leaf of {name}")
    _check_whole(xs, "xs")
    length = _scan_length(xs, length)
    carry, ys = _way(length)(step, init, xs, length)
    return _show(carry), _show(ys)


def _way(length: int) -> Callable[..., tuple[Tree, Tree]]:
    """Choose how a scan of some steps runs here."""
    if length == 0:
        return _scan_of_no_steps
    if in_transform():  # the operator has no rules for grad, vmap and jvp
        return _scan_as_loop
    if torch.compiler.is_compiling():
        return _scan_as_operator if _inductor_takes_loops() else _scan_as_loop
    return _scan_traced if is_tracing() and length > 1 else _scan_as_loop


def _scan_length(xs: Tree, length: int | None) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in tree.leaves(xs)}
    if length is not None:
        lengths.add(length)
    if len(lengths) != 1 or None in lengths:
        found = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(xs).items()}
        raise ValueError(
            f"scan: xs needs one common first axis (length={length}), got shapes {found}"
        )
    return cast(int, lengths.pop())


def _row(xs: Tree, i: int) -> Tree:
    return tree.map(lambda leaf: leaf[i], xs)


def _checked_carry(init: Tree, carry: Tree) -> Tree:
    """Return `carry` with its leaves in the order of `init`, having compared their forms."""
    found = tree.match(init, carry, "scan: the carry that f returned")
    check_tensors(found, carry, "scan: every leaf of the carry that f returned")
    for before, after in zip(tree.leaves(init), found, strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            lines = tree.diff(init, carry, values=False)
            raise ValueError(
                "scan: f must return a carry of the form it was given:\n  " + "\n  ".join(lines)
            )
        if _placements(before) != _placements(after):
            raise ValueError(
                "scan: f must return a carry that is spread as it was given: expected "
                f"{_placements(before)}, got {_placements(after)}, shape {list(after.shape)}"
            )
    return pytree.tree_unflatten(found, pytree.tree_structure(init))


def _check_whole(part: Tree, name: str) -> None:
    spread = [path for path, leaf in tree.flatten_dict(part).items() if is_spread(leaf)]
    if spread:
        raise TypeError(
            f"scan: {name} must be whole, got leaves spread over processes: {', '.join(spread)}; "
            "gather them (fdl.parallel.gather), or keep them in the carry"
        )


def _placements(leaf: Any) -> Any:
    return leaf.placements if is_spread(leaf) else None


def _scan_of_no_steps(
    f: Callable[..., Any], init: Tree, xs: Tree, length: int
) -> tuple[Tree, Tree]:
    """Return the first carry and empty ys, of the forms that `f` returns for a row of zeros."""
    row = tree.map(lambda leaf: _zeros(leaf.shape[1:], leaf), xs)
    carry, y = f(init, row)
    _checked_carry(init, carry)
    check_tensors(tree.leaves(y), y, "scan: every leaf of y")
    return init, tree.map(lambda leaf: _zeros((length, *leaf.shape), leaf), y)


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _scan_as_loop(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    carry, ys = init, []
    for i in range(length):
        new, y = f(carry, _row(xs, i))
        carry = _checked_carry(init, new)
        check_tensors(tree.leaves(y), y, "scan: every leaf of y")
        _check_whole(y, "y")
        ys.append(y)
    return carry, tree.map(lambda *rows: torch.stack(rows), *ys)


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
        _check_whole(y, "y")
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


def _scan_as_operator(
    f: Callable[..., Any], init: Tree, xs: Tree, length: int
) -> tuple[Tree, Tree]:
    # The operator takes flat lists only, and its body may have no side effects, so the structure
    # of y has to be known beforehand: trace f once more. Inductor drops that unused copy.
    init_leaves, carry_spec = pytree.tree_flatten(init)
    xs_leaves, x_spec = pytree.tree_flatten(xs)
    first = f(init, _row(xs, 0))
    if any(leaf.requires_grad for leaf in tree.leaves(first)):
        # Gradients are wrong by Inductor (pytorch#153679) and, in 2.11, by autograd (#184528).
        return _scan_as_loop(f, init, xs, length)
    y_spec = pytree.tree_structure(first[1])
    # It also needs something to carry, an axis to run along and, in torch 2.11, some y.
    device = next((leaf.device for leaf in [*init_leaves, *xs_leaves]), None)
    init_leaves = init_leaves or [torch.zeros((), device=device)]
    xs_leaves = xs_leaves or [torch.zeros(length, device=device)]

    def unflatten(carry: list[Tensor]) -> Tree:
        return pytree.tree_unflatten(carry[: carry_spec.num_leaves], carry_spec)

    def body(leaves: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        carry = unflatten(leaves)
        new, y = f(carry, pytree.tree_unflatten(x[: x_spec.num_leaves], x_spec))
        # Outputs must not alias inputs (unchanged leaves do), and strides must be stable.
        outputs = tree.match(carry, new, "scan") or leaves
        ys = tree.leaves(y) or [torch.zeros((), device=device)]
        return [_fresh(leaf) for leaf in outputs], [_fresh(leaf) for leaf in ys]

    carry, ys = scan_for_dynamo(body, [_fresh(leaf) for leaf in init_leaves], xs_leaves)
    return unflatten(carry), pytree.tree_unflatten(ys[: y_spec.num_leaves], y_spec)


def _fresh(leaf: Tensor) -> Tensor:
    return leaf.clone(memory_format=torch.contiguous_format)


def form(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """List what a program depends on: other values run the same one, other forms do not."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in leaves)
