"""Trees: nested dicts, lists, tuples and NamedTuples of tensors, on torch's own pytree.

Every leaf has a dotted path, `conv.0.weight`, the name `state_dict()` would give it:

>>> params = {"fc": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}}
>>> list(flatten_dict(params))
['fc.weight', 'fc.bias']

Trees are matched by key, never by the order in which a dict was filled. `None` is a leaf.

Functions that compute (`stack`, `unstack`) return new memory. Those that rearrange or convert
(`partition`, `merge`, `flatten_dict`, `to`, `cast`) return the given tensors where they need not
change them, never views of parts of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._paths import Tree, Where, dotted, flatten_dict, select, unflatten_dict

__all__ = [
    "Tree",
    "Where",
    "allclose",
    "cast",
    "diff",
    "dotted",
    "flatten_dict",
    "leaves",
    "map",
    "match",
    "merge",
    "partition",
    "select",
    "size",
    "stack",
    "summary",
    "to",
    "unflatten_dict",
    "unstack",
]


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `f` to each leaf of `tree`, with the leaves of `rest` at the same paths.

    The result has the structure of `tree`, key order included.

    Args:
        f: takes one leaf of each tree.
        tree: any tree.
        rest: further trees of its structure.

    Raises:
        ValueError: a tree of `rest` has another structure; every differing path is listed.

    >>> map(lambda p, g: p - 0.1 * g, {"w": 1.0, "b": 2.0}, {"b": 10.0, "w": 20.0})
    {'w': -1.0, 'b': 1.0}
    """
    first, spec = pytree.tree_flatten(tree)
    columns = [match(tree, other, "tree.map") for other in rest]
    return pytree.tree_unflatten([f(*row) for row in zip(first, *columns, strict=True)], spec)


def match(like: Tree, tree: Tree, caller: str) -> list[Any]:
    """List the leaves of `tree` in the order of `like`, whose structure it must have.

    Args:
        like: the expected structure.
        tree: what came.
        caller: how an error begins.

    Raises:
        ValueError: the structures differ; the text starts with `caller` and lists every path.

    >>> match({"w": 0, "b": 0}, {"b": 1, "w": 2}, "here")
    [2, 1]
    """
    spec = pytree.tree_structure(like)
    try:
        subtrees = spec.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(_mismatch(caller, like, tree)) from error
    # flatten_up_to stops at the leaves of `like`; below them there must be nothing more.
    if any(not pytree.tree_is_leaf(subtree) for subtree in subtrees):
        raise ValueError(_mismatch(caller, like, tree))
    return subtrees


def _mismatch(caller: str, like: Tree, tree: Tree) -> str:
    expected, got = _describe(like), _describe(tree)
    lines = [f"{p}: missing (expected {expected[p]})" for p in expected if p not in got]
    lines += [f"{p}: unexpected (got {got[p]})" for p in got if p not in expected]
    lines = lines or ["a container is of another type (list, tuple, dict or NamedTuple)"]
    return f"{caller}: the trees have different structures:\n  " + "\n  ".join(sorted(lines))


def _describe(tree: Tree) -> dict[str, str]:
    return {path: _signature(leaf) for path, leaf in flatten_dict(tree).items()}


def leaves(tree: Tree) -> list[Any]:
    """List the leaves, depth first, dicts in their own order.

    >>> leaves({"a": [1, 2], "b": (3, {})})
    [1, 2, 3]
    """
    return pytree.tree_leaves(tree)


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack trees of one structure leaf by leaf along a new first axis, as `vmap` wants them.

    Raises:
        ValueError: no trees, or one differs in structure, shape or dtype from the first.

    >>> stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])["w"].shape
    torch.Size([2, 3])
    """
    if not trees:
        raise ValueError("tree.stack: needs at least one tree, got none")
    for index, other in enumerate(trees[1:], start=1):
        lines = diff(trees[0], other, values=False)
        if lines:
            raise ValueError(
                f"tree.stack: tree {index} differs from tree 0:\n  " + "\n  ".join(lines)
            )
    return map(lambda *rows: torch.stack(rows), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """Split along the first axis of every leaf: the inverse of `stack`. Leaves are copies.

    Raises:
        ValueError: no leaves, a 0-d leaf, or first axes of different lengths.

    >>> unstack({"w": torch.arange(2)})
    [{'w': tensor(0)}, {'w': tensor(1)}]
    """
    flat = flatten_dict(tree)
    lengths = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in flat.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"tree.unstack: leaves need one common first axis, got {lengths}")
    (length,) = set(lengths.values())
    return [map(lambda leaf, i=i: leaf[i].clone(), tree) for i in range(length or 0)]


def partition(tree: Tree, where: Where) -> tuple[Tree, Tree]:
    """Split a tree into the leaves that `where` selects and the rest; `merge` undoes it.

    Both parts keep every container; where a leaf is absent a dict lacks the key, a list or
    tuple holds `()`. Differentiate with respect to one part and close over the other:

    >>> params = {"body": {"weight": 1.0}, "head": {"weight": 2.0}}
    >>> head, frozen = partition(params, "head.*")
    >>> head, frozen
    ({'body': {}, 'head': {'weight': 2.0}}, {'body': {'weight': 1.0}, 'head': {}})
    >>> merge(head, frozen) == params
    True

    Args:
        tree: any tree.
        where: a glob on dotted paths, several, or a predicate `(path, leaf) -> bool`.

    Raises:
        ValueError: a glob matches no path.
    """
    chosen = select(tree, where, "tree.partition")
    return (
        _keep(tree, "", lambda path: chosen[path]),
        _keep(tree, "", lambda path: not chosen[path]),
    )


def _keep(tree: Tree, path: str, keep: Callable[[str], bool]) -> Tree:
    """Copy the containers and the kept leaves; `()` stands for a leaf that goes."""
    if pytree.tree_is_leaf(tree):
        return tree if keep(path) else ()
    children = {
        name: _keep(child, f"{path}.{name}" if path else name, keep)
        for name, child in _children(tree).items()
    }
    if isinstance(tree, dict):
        gone = [
            name for name in tree if pytree.tree_is_leaf(tree[name]) and _is_hole(children[name])
        ]
        return {name: child for name, child in children.items() if name not in gone}
    return _rebuild(tree, list(children.values()))


def _children(tree: Tree) -> dict[str, Tree]:
    if isinstance(tree, dict):
        return tree
    if hasattr(tree, "_fields"):
        return tree._asdict()
    if isinstance(tree, (list, tuple)):
        return {str(i): child for i, child in enumerate(tree)}
    raise TypeError(
        f"tree: partition and merge take dicts, lists, tuples and NamedTuples, got {type(tree)}"
    )


def _rebuild(tree: Tree, children: list[Tree]) -> Tree:
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)


def merge(*trees: Tree) -> Tree:
    """Unite trees whose leaves lie at different paths; the inverse of `partition`.

    Raises:
        ValueError: two trees have a leaf at one path, or containers of different types there.

    >>> merge({"a": 1}, {"b": {"c": 2}}, {"b": {"d": 3}})
    {'a': 1, 'b': {'c': 2, 'd': 3}}
    """
    if not trees:
        raise ValueError("tree.merge: needs at least one tree, got none")
    merged = trees[0]
    for other in trees[1:]:
        merged = _merge(merged, other, "")
    return merged


def _is_hole(tree: Tree) -> bool:
    return isinstance(tree, tuple) and not hasattr(tree, "_fields") and tree == ()


def _merge(a: Tree, b: Tree, path: str) -> Tree:
    if _is_hole(a):
        return b
    if _is_hole(b):
        return a
    if pytree.tree_is_leaf(a) or pytree.tree_is_leaf(b):
        raise ValueError(f"tree.merge: both trees have something at {path!r}")
    if type(a) is not type(b) or (not isinstance(a, dict) and len(a) != len(b)):
        raise ValueError(
            f"tree.merge: at {path!r} one tree has {type(a).__name__}[{len(a)}], "
            f"another {type(b).__name__}[{len(b)}]"
        )
    one, two = _children(a), _children(b)
    children = {
        name: _merge(one.get(name, ()), two.get(name, ()), f"{path}.{name}" if path else name)
        for name in one | two
    }
    return children if isinstance(a, dict) else _rebuild(a, list(children.values()))


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Move every tensor to `device`.

    >>> to({"w": torch.zeros(2)}, "cpu")["w"].device
    device(type='cpu')
    """
    return map(lambda leaf: leaf.to(device), tree)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Cast the floating tensors to `dtype`; integers, bools (keys, counts, masks) stay.

    >>> cast({"w": torch.zeros(1), "step": torch.tensor(3)}, torch.float64)
    {'w': tensor([0.], dtype=torch.float64), 'step': tensor(3)}
    """
    return map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def size(tree: Tree) -> int:
    """Count the elements of all tensors.

    >>> size({"weight": torch.zeros(10, 784), "bias": torch.zeros(10)})
    7850
    """
    return sum(leaf.numel() for leaf in leaves(tree))


def summary(tree: Tree) -> str:
    """Tabulate path, shape, dtype, count and bytes of every leaf, with totals, as aligned text.

    >>> print(summary({"fc": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}}))
    path       shape   dtype    count  bytes
    fc.weight  [2, 3]  float32      6     24
    fc.bias    [2]     float32      2      8
    total                           8     32
    """
    rows = [
        (path, str(list(leaf.shape)), _dtype(leaf), leaf.numel(), leaf.nbytes)
        for path, leaf in flatten_dict(tree).items()
    ]
    total = ("total", "", "", sum(row[3] for row in rows), sum(row[4] for row in rows))
    texts = [("path", "shape", "dtype", "count", "bytes")]
    texts += [(p, s, d, f"{count:,}", f"{nbytes:,}") for p, s, d, count, nbytes in [*rows, total]]
    widths = [max(len(text[i]) for text in texts) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(text, widths, strict=True))
        )
        for text in texts
    )


def _dtype(leaf: Tensor) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def _signature(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{_dtype(leaf)}{list(leaf.shape)}"
    return f"{type(leaf).__name__} {leaf!r}"


def diff(
    a: Tree, b: Tree, *, rtol: float = 0.0, atol: float = 0.0, values: bool = True
) -> list[str]:
    """List the paths at which two trees differ in containers, presence, shape, dtype or value.

    Tolerances are for floating numbers, as in `torch.isclose`, in float64; NaN equals NaN, and an
    infinity only itself. Integers, keys of random numbers among them, bools and what is no tensor
    have to be equal.

    Args:
        a: the expected tree.
        b: the tree that came.
        rtol: relative tolerance of floating values.
        atol: absolute tolerance of floating values.
        values: compare values; without, containers, presence, shape and dtype alone.

    >>> diff({"w": torch.zeros(2), "b": torch.zeros(1)}, {"w": torch.ones(2)})
    ['b: expected float32[1], got nothing', 'w: 2 of 2 values differ, by at most 1']
    """
    one, two = flatten_dict(a), flatten_dict(b)
    kinds, others = dict(_containers(a)), dict(_containers(b))
    lines = []
    for path in sorted(one.keys() | two.keys() | kinds.keys() | others.keys()):
        if path in one or path in two:
            expected = _signature(one[path]) if path in one else "nothing"
            got = _signature(two[path]) if path in two else "nothing"
            if expected == got and values and isinstance(one[path], Tensor):
                lines += _differ(path, one[path], two[path].to(one[path].device), rtol, atol)
        else:
            expected, got = kinds.get(path, "nothing"), others.get(path, "nothing")
            if _told_by_leaves(expected, got):
                continue
        if expected != got:
            lines.append(f"{path}: expected {expected}, got {got}")
    return lines


def _told_by_leaves(one: str, two: str) -> bool:
    """Say whether two containers differ in nothing but the leaves in them."""
    kinds = {one.removeprefix("empty "), two.removeprefix("empty ")}
    return len(kinds) == 1 or ("nothing" in kinds and "empty " not in one + two)


def _differ(path: str, x: Tensor, y: Tensor, rtol: float, atol: float) -> list[str]:
    """Say how many values differ, and by how much, in a list of one line or none."""
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
    """Name the kind of every container by its path: dict, tuple, empty list, ..."""
    if pytree.tree_is_leaf(tree):
        return
    pairs, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    kind = "dict" if isinstance(tree, dict) else type(tree).__name__
    yield path, kind if pairs else f"empty {kind}"
    for entries, child in pairs:
        yield from _containers(child, ".".join(filter(None, [path, dotted(entries)])))


def allclose(a: Tree, b: Tree, *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Say whether two trees are of one form, with values within tolerance: `diff` lists nothing.

    Args:
        a: the expected tree.
        b: the tree that came.
        rtol: relative tolerance of floating values, as in `torch.isclose`.
        atol: absolute tolerance of floating values: numbers of a size of `atol` and below are all
            close to each other.

    >>> allclose({"w": torch.ones(2)}, {"w": torch.ones(2) + 1e-9})
    True
    """
    return not diff(a, b, rtol=rtol, atol=atol)
