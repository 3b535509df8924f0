"""Compare trees leaf by leaf, and say in a few words how they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from fdl import tree
from fdl._checks import check_at_least_0, describe
from fdl.tree import Tree

# Those of torch.testing; all other dtypes must be equal.
RTOL = {
    torch.float64: 1e-7,
    torch.complex128: 1e-7,
    torch.float32: 1.3e-6,
    torch.complex64: 1.3e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1.6e-2,
}
MOST = 20  # lines of a message
Explained = Callable[[Tensor, Tensor], bool]


def assert_trees_close(
    actual: Tree,
    expected: Tree,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    equal_nan: bool = False,
) -> None:
    """Raise an AssertionError unless two trees are equal but for rounding.

    Containers, paths, shapes and dtypes must be equal, and each value must satisfy
    |actual − expected| ≤ atol + rtol · |expected|. An infinity is close only to itself. Integers
    (random keys included), bools, and leaves that are not tensors must be equal. The message has a
    line for each path that differs: how many values, the largest gap, and a transposition, a
    factor or a sign where one explains it.

    Args:
        actual: the tree to test, on any device.
        expected: the tree it should be.
        rtol: relative tolerance of floating values. If None, that of `torch.testing` for the dtype:
            1e-7 for float64, 1.3e-6 for float32, 1e-3 for float16, 1.6e-2 for bfloat16.
        atol: absolute tolerance of floating values. It is 0, unlike in `torch.testing`: values of
            1e-6 and twice that would be close with torch's 1e-5.
        equal_nan: let NaN be equal to NaN.

    Raises:
        AssertionError: the trees differ.
        TypeError: a leaf is an array of another library, or a key of a dict is not a string.
        ValueError: a tolerance is negative or not finite.

    >>> w = torch.arange(6.0).view(2, 3)
    >>> assert_trees_close({"w": w, "b": w[0]}, {"w": w, "b": w[0] * (1 + 1e-6)})
    >>> assert_trees_close({"w": w.T}, {"w": w})
    Traceback (most recent call last):
    AssertionError: assert_trees_close: 1 difference
      w: expected float32[2, 3], got float32[3, 2]; got.permute(1, 0) is expected
    """
    check_at_least_0("assert_trees_close", rtol=0.0 if rtol is None else rtol, atol=atol)
    lines = differences(actual, expected, rtol=rtol, atol=atol, equal_nan=equal_nan)
    if lines:
        count = f"{len(lines)} difference{'s' * (len(lines) > 1)}"
        raise AssertionError(f"assert_trees_close: {count}{listed(lines)}")


def listed(lines: Sequence[str], indent: str = "  ") -> str:
    r"""Write lines below each other, and of many only the first.

    >>> listed(["a", "b"])
    '\n  a\n  b'
    """
    more = [f"… and {len(lines) - MOST} more"] * (len(lines) > MOST)
    return "".join(f"\n{indent}{line}" for line in [*lines[:MOST], *more])


def differences(
    actual: Tree,
    expected: Tree,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    of_largest: float = 0.0,
    equal_nan: bool = False,
) -> list[str]:
    """List the paths at which `actual` differs, with what explains it.

    Args:
        actual: the tree to test.
        expected: the tree it should be.
        rtol: as for `assert_trees_close`.
        atol: as for `assert_trees_close`.
        of_largest: let a value also differ by this times rtol times the largest of its leaf, for
            sums of terms that cancel.
        equal_nan: let NaN be equal to NaN.

    >>> differences({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0])})
    ['w: 1 of 2 values differs, at [1]: expected 2, got 1, relative gap 0.5']
    """
    pair = actual, expected
    got, wanted = (tree.flatten_dict(each) for each in pair)
    for path, leaf in (*got.items(), *wanted.items()):
        if not isinstance(leaf, Tensor) and hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
            raise TypeError(
                f"{_name(path)} must be a tensor, got {describe(leaf)}; convert arrays with "
                "fdl.interop.from_numpy or from_jax"
            )
    lines = []
    for line in tree.diff(expected, actual, values=False):
        path = line.partition(": expected ")[0]
        hint = _hint(got.get(path), wanted.get(path))
        lines.append(f"{_name('') if line.startswith(':') else ''}{line}{hint}")
    for path in wanted.keys() & got.keys():
        x, y = got[path], wanted[path]
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape == y.shape and x.dtype == y.dtype:
                lines += _values(path, x, y, rtol, atol, of_largest, equal_nan)
        elif not equal_nan and x != x and y != y:  # diff takes NaN for itself
            lines.append(f"{_name(path)}: expected {y!r}, got {x!r}; equal_nan=True allows it")
    return sorted(lines)


def _name(path: str) -> str:
    return path or "the value"


def _values(
    path: str,
    actual: Tensor,
    expected: Tensor,
    rtol: float | None,
    atol: float,
    of_largest: float,
    equal_nan: bool,
) -> Iterator[str]:
    """Yield at most one line about the values of two tensors of one shape and dtype."""
    x, y = wide(actual), wide(expected)
    if x.is_floating_point() or x.is_complex():
        gap = (x - y).abs()
        rtol = RTOL.get(actual.dtype, 0.0) if rtol is None else rtol
        close = gap <= atol + rtol * (y.abs() + of_largest * largest(y))
        same = (x == y) | (close & gap.isfinite())
        far = ~(same | (x.isnan() & y.isnan()) if equal_nan else same)
    else:
        far, gap = x != y, (x.double() - y.double()).abs()
    count, n = int(far.sum()), far.numel()
    if not count:
        return
    worst = int(torch.where(far, gap.nan_to_num(math.inf), -1).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), x.shape)]
    one, other = (z.flatten()[worst].item() for z in (actual, expected))
    size = abs(y.flatten()[worst].item())
    relative = gap.flatten()[worst].item() / size if size else math.inf
    where = f"most at {index}" if count > 1 else f"at {index}"
    many = f"{count} of {n} values differ{'s' * (count == 1)}, {where}: " if x.ndim else ""
    values = f"expected {_number(other)}, got {_number(one)}, relative gap {relative:.2g}"
    yield f"{_name(path)}: {many}{values}{_hint(actual, expected)}"


def _number(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float | complex) else str(value)


def wide(x: Tensor) -> Tensor:
    """Return a tensor on the CPU, its floating values in 64 bits (128 for complex ones).

    >>> wide(torch.ones(2))
    tensor([1., 1.], dtype=torch.float64)
    """
    x = x.detach().cpu()
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x if x.dtype != torch.bool else x.byte()


def largest(x: Tensor) -> float:
    """Return the largest magnitude of all finite values, 0 if there is none.

    >>> largest(torch.tensor([1.0, -3.0, float("inf")]))
    3.0
    """
    finite = x.abs()[x.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def largest_of(values: Tree) -> float:
    """Return the largest finite magnitude in a tree, 0 if there is none.

    >>> largest_of({"w": torch.tensor([1.0, -3.0]), "b": torch.tensor(2)})
    3.0
    """
    return max((largest(wide(leaf)) for leaf in tree.leaves(values)), default=0.0)


def _hint(actual: Any, expected: Any) -> str:
    """Explain how a whole leaf differs, for the end of a line."""
    if not (isinstance(actual, Tensor) and isinstance(expected, Tensor) and expected.numel() > 1):
        return ""
    x, y = wide(actual), wide(expected)
    x, y = (z if z.is_complex() else z.double() for z in (x, y))
    return next((f"; {words}" for words in _explanations(x, y)), "")


def _explanations(x: Tensor, y: Tensor) -> Iterator[str]:
    """Yield what makes x of y."""

    def near(one: Tensor, other: Tensor) -> bool:
        return largest(one - other) <= 1e-5 * largest(other)

    nans = int(x.isnan().sum()), int(y.isnan().sum())
    if any(nans):
        yield f"{nans[0]} of the values are NaN, {nans[1]} expected"
    if not (x.isfinite().all() and y.isfinite().all() and y.any()):
        return
    if x.numel() and not x.any():
        yield "got is all 0"
    elif x.shape == y.shape:
        factor = (x * y.conj()).sum() / (y * y.conj()).sum()
        if near(x, -y):
            yield "got has the opposite sign"
        elif near(x, factor * y) and not near(x, y):
            yield f"got is {factor:.6g} times expected"
    if x.ndim == y.ndim and x.numel() == y.numel() and 2 <= x.ndim <= 4:
        for order in permutations(range(x.ndim)):
            moved = x.permute(order)
            if order != tuple(range(x.ndim)) and moved.shape == y.shape and near(moved, y):
                yield f"got.permute{order} is expected"
