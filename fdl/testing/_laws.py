"""Check that a function is pure and commutes with every transformation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from fdl import random, tree
from fdl._checks import check_at_least_0, check_function, describe
from fdl._compiler import jit, scan
from fdl.testing._grads import directions, on_leaves, weighted_sum
from fdl.testing._trees import RTOL, differences, largest_of, listed
from fdl.tree import Tree
from fdl.tree._checks import check_tensors

ROWS = 3
ROUNDING = 1e3  # of derivatives that are sums which cancel, in units of ε
Law = Callable[[], list[str]]  # -> what contradicts it


def check_laws(fn: Callable[..., Tree], *args: Tree, rtol: float | None = None) -> list[str]:
    """Raise unless `fn` keeps the laws on which transformations rest; list those that were checked.

    - `inputs unchanged`: no bit of an argument is written to.
    - `pure`: two calls with equal arguments return equal bits.
    - `jit = eager`, and a `scan` and a `vmap` over three rows of arguments equal a loop. The rows
      are the arguments themselves and two whose floating values are up to a quarter smaller.
    - `jvp = grad`: ⟨w, J v⟩ is the same in forward and in reverse mode.
    - `vmap of grad = loop`, `jit of grad = eager`.

    The laws of derivatives need floating arguments and results, and are left out without them. All
    laws are tried, so that one message names all that fail, those that raise included. Three
    programs are compiled.

    Args:
        fn: a function of trees of tensors that returns one, such as a loss or a training step.
        *args: its arguments. Float64 makes the comparison sharpest.
        rtol: tolerance relative to a value and to the largest of its leaf, where results need not
            be equal to the bit; if None, by dtype as in `assert_trees_close`.

    Returns:
        The names of the laws.

    Raises:
        AssertionError: some laws do not hold; each is named, with the paths that differ.
        TypeError: `fn` is not a function; a leaf of the arguments or of the result is no tensor, or
            is complex, and there are derivatives to compare.
        ValueError: the arguments have no leaves.

    >>> import fdl
    >>> x, calls = torch.ones(3, dtype=torch.float64), []
    >>> def counted(x):
    ...     calls.append(x)
    ...     return x * len(calls)
    >>> with fdl.disable_jit():              # only to keep this example short
    ...     check_laws(counted, x)
    Traceback (most recent call last):
    AssertionError: check_laws: 7 of 8 laws do not hold for the function counted
    ...
    """
    check_function("check_laws", "fn", fn)
    check_at_least_0("check_laws", rtol=0.0 if rtol is None else rtol)
    check_tensors(tree.leaves(args), args, "check_laws: each leaf of the arguments")
    if not tree.leaves(args):
        raise ValueError("check_laws: the arguments must have at least one tensor, got none")
    result = fn(*_copies(args))
    check_tensors(tree.leaves(result), result, "check_laws: each leaf of the result")
    x, _ = on_leaves("check_laws", fn, args)
    laws = _laws(fn, args, result, rtol)
    if x and any(isinstance(y, Tensor) and y.is_floating_point() for y in tree.leaves(result)):
        laws |= _laws_of_derivatives(fn, args, rtol)
    broken = {name: lines for name, law in laws.items() if (lines := _attempt(law))}
    if broken:
        raise AssertionError(
            f"check_laws: {len(broken)} of {len(laws)} laws do not hold for {describe(fn)}"
            + "".join(f"\n  {name}:{listed(lines, '    ')}" for name, lines in broken.items())
        )
    return list(laws)


def _laws(
    fn: Callable[..., Tree], args: tuple[Tree, ...], result: Tree, rtol: float | None
) -> dict[str, Law]:
    rows = _rows(args)

    def unchanged() -> list[str]:
        given = _copies(args)
        fn(*given)
        return _bits(given, args)

    def scanned(rows: Tree) -> Tree:
        return scan(lambda carry, row: (carry, fn(*row)), (), rows)[1]

    return {
        "inputs unchanged": unchanged,
        "pure": lambda: _bits(fn(*_copies(args)), result),
        "jit = eager": lambda: _near(jit(fn)(*_copies(args)), fn(*_copies(args)), rtol),
        "vmap = loop": lambda: _near(vmap(fn)(*tree.stack(rows)), _loop(fn, rows), rtol),
        "scan = loop": lambda: _near(jit(scanned)(tree.stack(rows)), _loop(fn, rows), rtol),
    }


def _laws_of_derivatives(
    fn: Callable[..., Tree], args: tuple[Tree, ...], rtol: float | None
) -> dict[str, Law]:
    def grads(*args: Tree) -> Tree:
        x, g = on_leaves("check_laws", fn, args)
        return tree.unflatten_dict(grad(lambda x: weighted_sum(y := g(x), directions(y, 2)))(x))

    def near(actual: Tree, expected: Tree) -> list[str]:
        eps = max(torch.finfo(leaf.dtype).eps for leaf in tree.leaves(expected))
        return _near(actual, expected, rtol, ROUNDING * eps * largest_of(expected))

    def both_modes() -> list[str]:
        x, g = on_leaves("check_laws", fn, _copies(args))
        v = directions(x, 1)
        y, slopes = g(x), jvp(g, (x,), (v,))[1]
        weights = directions(y, 2)
        slopes_by_leaf = tree.flatten_dict(grads(*_copies(args)))
        forward, reverse = (
            float(weighted_sum(*pair)) for pair in ((slopes, weights), (slopes_by_leaf, v))
        )
        dtypes = {leaf.dtype for leaf in (*x.values(), *y.values())}
        bound = max(RTOL.get(dtype, 0.0) for dtype in dtypes) if rtol is None else rtol
        size = float(sum((slopes[path] * w).abs().sum() for path, w in weights.items()))
        noise = ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes) * largest_of(y)
        close = abs(forward - reverse) <= bound * size + noise
        return [] if close else [f"⟨w, J v⟩ is {forward:.7g} and {reverse:.7g}"]

    rows = _rows(args)
    return {
        "jvp = grad": both_modes,
        "vmap of grad = loop": lambda: near(vmap(grads)(*tree.stack(rows)), _loop(grads, rows)),
        "jit of grad = eager": lambda: near(jit(grads)(*_copies(args)), grads(*_copies(args))),
    }


def _attempt(law: Law) -> list[str]:
    """Return what contradicts a law; an error does."""
    try:
        return law()
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return [f"raised {type(error).__name__}: {text[:200]}"]


def _rows(args: tuple[Tree, ...]) -> list[tuple[Tree, ...]]:
    """Return the arguments, and others like them that lie in the same intervals around 0."""

    def smaller(leaf: Tensor, key: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return leaf * (1 - random.uniform(key, leaf.shape, torch.float64) / 4).to(leaf)

    leaves = tree.leaves(args)
    keys = [random.split(random.key(row), len(leaves)) for row in range(1, ROWS)]
    others = []
    for row in keys:
        each = iter(row)
        others.append(tree.map(lambda leaf, each=each: smaller(leaf, next(each)), args))
    return [args, *others]


def _copies(args: tuple[Tree, ...]) -> tuple[Tree, ...]:
    copies: tuple[Tree, ...] = tree.map(lambda leaf: leaf.detach().clone(), args)
    return copies


def _loop(fn: Callable[..., Tree], rows: list[tuple[Tree, ...]]) -> Tree:
    return tree.stack([fn(*_copies(row)) for row in rows])


def _near(actual: Tree, expected: Tree, rtol: float | None, atol: float = 0.0) -> list[str]:
    return differences(actual, expected, rtol=rtol, atol=atol, of_largest=1, equal_nan=True)


def _bits(actual: Tree, expected: Tree) -> list[str]:
    """List the leaves that differ in structure, shape, dtype or any bit; NaN is itself."""
    lines = differences(actual, expected, rtol=0, equal_nan=True)
    if lines:
        return lines
    pairs = tree.flatten_dict(expected)
    return [
        f"{path or 'the value'}: differs in the sign of a 0 or the bits of a NaN"
        for path, leaf in tree.flatten_dict(actual).items()
        if not equal_bits(leaf, pairs[path])
    ]


def equal_bits(x: Tensor, y: Tensor) -> bool:
    """Check that two tensors are equal in dtype, shape and every bit: −0 is not 0, NaN is itself.

    >>> equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    same = x.dtype == y.dtype and x.shape == y.shape
    x, y = (z.detach().contiguous().reshape(-1) for z in (x, y))
    return same and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
