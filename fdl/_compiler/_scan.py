"""`scan`: a loop as a function.

How a `scan` runs depends on where it is called:

- eagerly: as a Python loop;
- inside `jit` on the CPU: as torch's `scan` operator, for which Inductor emits a loop, also under a
  `torch.func` transformation;
- inside `jit` on CUDA, or if Inductor fails: as a Python loop over a compiled body;
- inside `torch.compile`: as torch's operator, or as a Python loop if Inductor does not support the
  operator (without `fullgraph`) or computes wrong gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._checks import check_function, describe
from fdl._compiler._scan_dynamo import scan_as_operator
from fdl._compiler._scan_eager import check_carry, check_not_sharded, scan_as_loop
from fdl._compiler._scan_traced import scan_traced
from fdl._compiler._scan_transformed import scan_transformed
from fdl._modes import in_transform, inductor_takes_loops, is_tracing
from fdl.tree import Tree
from fdl.tree._checks import check_tensors

Carry = TypeVar("Carry")


class _None(NamedTuple):
    """Replaces None, which is an empty tree in JAX but a leaf in torch's pytree."""


def _has_none(part: Tree) -> bool:
    return any(leaf is None for leaf in tree.leaves(part))


def _hide(part: Tree) -> Tree:
    """Replace each None by an empty tree."""
    if not _has_none(part):
        return part
    return pytree.tree_map(lambda leaf: _None() if leaf is None else leaf, part)


def _show(part: Tree) -> Tree:
    """Undo `_hide`."""
    return pytree.tree_map(lambda x: None if _is_none(x) else x, part, is_leaf=_is_none)


def _is_none(node: Any) -> bool:
    return isinstance(node, _None)


def scan(
    f: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    xs: Tree = (),
    *,
    length: int | None = None,
    reverse: bool = False,
) -> tuple[Carry, Tree]:
    """Fold `f` over the first axis of `xs`: `carry, y = f(carry, x)`; equals `jax.lax.scan`.

    Args:
        f: a pure function `(carry, x) -> (carry, y)`. The new carry has the structure, shapes and
            dtypes of the old one. `y` is any tree of tensors, or `None` or `()`.
        init: the first carry, a tree of tensors.
        xs: a tree of tensors with one common first axis; step `i` gets `leaf[i]`. With None or `()`
            every step gets just that.
        length: the number of steps; only needed if `xs` has no leaves.
        reverse: start from the last row of `xs`; step `i` still has `leaf[i]`, and gives row `i` of
            the result.

    Returns:
        The last carry, and the `y`s stacked along a new first axis. If there are no steps, these
        are `init` and empty leaves; `f` runs once on zeros to find out their shapes and dtypes.

    Raises:
        TypeError: `f` is not a function or does not return a pair; a leaf of `init`, `xs` or `y` is
            not a tensor, or a leaf of `xs` or `y` is a DTensor (every path is listed).
        ValueError: `xs` has no common first axis, or `f` changed the structure, a shape or a dtype
            of the carry (every path is listed).

    >>> scan(lambda total, x: (total + x, total), torch.tensor(0), torch.arange(4))
    (tensor(6), tensor([0, 0, 1, 3]))
    """
    check_function("scan", "f", f, "(carry, x) -> (carry, y)")
    has_none = _has_none(init) or _has_none(xs)
    init, xs = _hide(init), _hide(xs)

    def step(carry: Tree, x: Tree) -> tuple[Tree, Tree]:
        result = f(_show(carry), _show(x)) if has_none else f(cast(Carry, carry), x)
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(
                f"scan: f must return a pair (carry, y), got {describe(result)}; y may be None"
            )
        new, y = result
        return _hide(new) if has_none else new, _hide(y)

    if length is not None and not isinstance(length, Integral | torch.SymInt):
        raise TypeError(f"scan: length must be an int, got {describe(length)}")
    check_tensors(tree.leaves(init), init, "scan: every leaf of init")
    length = _check_xs("scan", xs, length)
    if reverse:
        xs = tree.map(_flip, xs)
    carry, ys = _implementation(length)(step, init, xs, length)
    return _show(carry), _show(tree.map(_flip, ys) if reverse else ys)


def _implementation(length: int) -> Callable[..., tuple[Tree, Tree]]:
    """Choose how a scan of `length` steps runs here."""
    if length == 0:
        return _scan_zero_steps
    if in_transform():  # for which torch's operator has no rules
        return scan_transformed if is_tracing() and length > 1 else scan_as_loop
    if torch.compiler.is_compiling():
        return scan_as_operator if inductor_takes_loops() else scan_as_loop
    return scan_traced if is_tracing() and length > 1 else scan_as_loop


def _check_xs(caller: str, xs: Tree, length: int | None = None) -> int:
    """Check that `xs` are tensors with one common first axis, and return its length."""
    check_tensors(tree.leaves(xs), xs, f"{caller}: every leaf of xs")
    check_not_sharded(caller, xs, "xs")
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in tree.leaves(xs)}
    if length is not None:
        lengths.add(length)
    if len(lengths) != 1 or None in lengths:
        shapes = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(xs).items()}
        given = "" if length is None else f" (length={length})"
        raise ValueError(f"{caller}: xs needs one common first axis{given}, got shapes {shapes}")
    return cast(int, lengths.pop())


def _flip(leaf: Tensor) -> Tensor:
    return leaf.flip(0)


def _scan_zero_steps(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    """Return the first carry, and empty ys like those that `f` returns for a row of zeros."""
    row = tree.map(lambda leaf: _zeros(leaf.shape[1:], leaf), xs)
    carry, y = f(init, row)
    check_carry(init, carry)
    check_tensors(tree.leaves(y), y, "scan: every leaf of y")
    return init, tree.map(lambda leaf: _zeros((length, *leaf.shape), leaf), y)


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
