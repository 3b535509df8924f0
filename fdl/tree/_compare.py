"""Compare two trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl.tree._paths import Tree, flatten_dict, join, named_children
from fdl.tree._summary import describe_leaf


def diff(
    a: Tree, b: Tree, *, rtol: float = 0.0, atol: float = 0.0, values: bool = True
) -> list[str]:
    """List the paths at which two trees differ in containers, presence, shape, dtype or value.

    Tolerances apply to floating tensors, as in `torch.isclose`, in float64; NaN equals NaN, and an
    infinity only itself. Integers (random keys included), bools, and leaves that are not tensors
    must be equal.

    Args:
        a: the expected tree.
        b: the actual tree.
        rtol: relative tolerance of floating values.
        atol: absolute tolerance of floating values.
        values: compare values too; if false, only containers, presence, shape and dtype.

    >>> diff({"w": torch.zeros(2), "b": torch.zeros(1)}, {"w": torch.ones(2)})
    ['b: expected float32[1], got nothing', 'w: 2 of 2 values differ, by at most 1']
    """
    one, two = flatten_dict(a), flatten_dict(b)
    kinds, others = dict(_containers(a)), dict(_containers(b))
    common = one.keys() & two.keys()
    lines = []
    for path in sorted(one.keys() | two.keys() | kinds.keys() | others.keys()):
        if path in one or path in two:
            expected = describe_leaf(one[path]) if path in one else "nothing"
            got = describe_leaf(two[path]) if path in two else "nothing"
            if expected == got and values and isinstance(one[path], Tensor):
                lines += _differ(path, one[path], two[path].to(one[path].device), rtol, atol)
            elif expected == got and values and hasattr(one[path], "tobytes"):
                # The text of a long array of NumPy or JAX leaves most of its values out.
                same = one[path].tobytes() == two[path].tobytes()
                lines += [] if same else [f"{path}: the arrays differ in values"]
        else:
            expected, got = kinds.get(path, "nothing"), others.get(path, "nothing")
            flat = "nothing" in (expected, got) and any(p.startswith(f"{path}.") for p in common)
            if flat:
                absent = f"keys that begin with {path + '.'!r}"
                expected, got = expected.replace("nothing", absent), got.replace("nothing", absent)
            elif _differ_in_leaves_only(expected, got):
                continue
        if expected != got:
            lines.append(f"{path}: expected {expected}, got {got}")
    return lines


def _differ_in_leaves_only(one: str, two: str) -> bool:
    """Return True if two containers differ only in their leaves, which are listed themselves."""
    kinds = {one.removeprefix("empty "), two.removeprefix("empty ")}
    return len(kinds) == 1 or ("nothing" in kinds and "empty " not in one + two)


def _differ(path: str, x: Tensor, y: Tensor, rtol: float, atol: float) -> list[str]:
    """Describe how many values differ and by how much, in a list of at most one line."""
    if x.is_floating_point() or x.is_complex():
        wide = torch.complex128 if x.is_complex() else torch.float64
        x, y = x.to(wide), y.to(wide)
        far = ~torch.isclose(x, y, rtol=rtol, atol=atol, equal_nan=True)
        gap = (x - y)[far].abs().amax().item() if far.any() else 0
    else:
        far = x != y
        pairs = zip(x[far].tolist(), y[far].tolist(), strict=True)
        gap = max((abs(int(p) - int(q)) for p, q in pairs), default=0)  # exact beyond 2**53
    count = int(far.sum())
    return [f"{path}: {count} of {x.numel()} values differ, by at most {gap:.3g}"] if count else []


def _containers(tree: Tree, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and kind of every container: dict, tuple, empty list, ..."""
    if pytree.tree_is_leaf(tree):
        return
    children = named_children(tree)
    kind = "dict" if isinstance(tree, Mapping) else type(tree).__name__
    yield path, kind if children else f"empty {kind}"
    for name, child in children:
        yield from _containers(child, join(path, name))


def allclose(a: Tree, b: Tree, *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Return True if two trees have the same structure, and values within tolerance.

    `diff` lists the differences.

    Args:
        a: the expected tree.
        b: the actual tree.
        rtol: relative tolerance of floating values, as in `torch.isclose`.
        atol: absolute tolerance of floating values. Numbers of magnitude `atol` and below are all
            close to each other.

    >>> allclose({"w": torch.ones(2)}, {"w": torch.ones(2) + 1e-9})
    True
    """
    return not diff(a, b, rtol=rtol, atol=atol)
