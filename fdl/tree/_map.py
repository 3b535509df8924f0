"""Map over the leaves of trees, matched by path; stack, move and cast them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from fdl._checks import as_tuple, check_function, describe
from fdl.tree._checks import check_tensors
from fdl.tree._compare import diff
from fdl.tree._paths import Tree, as_dicts, flatten_dict
from fdl.tree._structure import flatten, unflatten
from fdl.tree._summary import describe_leaf


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `f` to each leaf of `tree`, with the leaves of `rest` at the same paths.

    The result has the structure of `tree`, key order included.

    Args:
        f: function of one leaf of each tree.
        tree: any tree.
        rest: further trees of the same structure.

    Raises:
        ValueError: a tree of `rest` has another structure (every differing path is listed).

    >>> map(lambda p, g: p - 0.1 * g, {"w": 1.0, "b": 2.0}, {"b": 10.0, "w": 20.0})
    {'w': -1.0, 'b': 1.0}
    """
    check_function("tree.map", "f", f)
    first, structure = flatten(tree)
    columns = [match(tree, other, "tree.map", structure) for other in rest]
    return unflatten([f(*row) for row in zip(first, *columns, strict=True)], structure)


def match(like: Tree, tree: Tree, caller: str, structure: Any = None) -> list[Any]:
    """List the leaves of `tree` in the order of `like`, which must have the same structure.

    Args:
        like: the expected structure.
        tree: the actual tree.
        caller: prefix of error messages.
        structure: that of `like`, if `flatten` has returned it already.

    Raises:
        ValueError: the structures differ; the message starts with `caller` and lists every path.

    >>> match({"w": 0, "b": 0}, {"b": 1, "w": 2}, "caller")
    [2, 1]
    """
    if not torch.compiler.is_compiling():
        leaves, own = flatten(tree)
        if own == (flatten(like)[1] if structure is None else structure):
            return leaves
    subtrees = _up_to(like, tree)  # dicts may have their keys in another order
    if subtrees is None:
        subtrees = _up_to(as_dicts(like), as_dicts(tree))
    # Where `like` has a leaf, `tree` must not have a container.
    if subtrees is None or any(not pytree.tree_is_leaf(subtree) for subtree in subtrees):
        raise ValueError(_mismatch(caller, like, tree))
    return subtrees


def _up_to(like: Tree, tree: Tree) -> list[Any] | None:
    """List what `tree` has where `like` has leaves; None if a container of `like` is another."""
    try:
        return pytree.tree_structure(like).flatten_up_to(tree)
    except ValueError:
        return None


def _mismatch(caller: str, like: Tree, tree: Tree) -> str:
    expected, got = _describe(like), _describe(tree)
    lines = [f"{p}: missing (expected {expected[p]})" for p in expected if p not in got]
    lines += [f"{p}: unexpected (got {got[p]})" for p in got if p not in expected]
    lines = lines or [
        "a container is of another type (list, tuple, dict or NamedTuple), or keys with dots stand "
        "for nested ones (tree.unflatten_dict nests them)"
    ]
    return f"{caller}: the trees have different structures:\n  " + "\n  ".join(sorted(lines))


def _describe(tree: Tree) -> dict[str, str]:
    return {path: describe_leaf(leaf) for path, leaf in flatten_dict(tree).items()}


def leaves(tree: Tree) -> list[Any]:
    """List the leaves, depth first, dicts in their own order.

    >>> leaves({"a": [1, 2], "b": (3, {})})
    [1, 2, 3]
    """
    return flatten(tree)[0]


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack trees of the same structure leaf by leaf along a new first axis, as for `vmap`.

    Raises:
        ValueError: there are no trees, or one differs from the first in structure, shape or dtype.

    >>> stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])["w"].shape
    torch.Size([2, 3])
    """
    trees = as_tuple("tree.stack", "trees", trees, "a list of trees")
    if not trees:
        raise ValueError("tree.stack: expected at least one tree, got none")
    for index, other in enumerate(trees[1:], start=1):
        lines = diff(trees[0], other, values=False)
        if lines:
            raise ValueError(
                f"tree.stack: tree {index} differs from tree 0:\n  " + "\n  ".join(lines)
            )
    check_tensors(leaves(trees[0]), trees[0], "tree.stack: every leaf")
    return map(lambda *rows: torch.stack(rows), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """Split every leaf along its first axis: the inverse of `stack`. Leaves are copies.

    Raises:
        ValueError: there are no leaves, one is 0-d, or first axes differ in length.

    >>> unstack({"w": torch.arange(2)})
    [{'w': tensor(0)}, {'w': tensor(1)}]
    """
    check_tensors(leaves(tree), tree, "tree.unstack: every leaf")
    flat = flatten_dict(tree)
    lengths = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in flat.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"tree.unstack: first axes must have the same length, got {lengths}")
    (length,) = set(lengths.values())
    return [map(lambda leaf, i=i: leaf[i].clone(), tree) for i in range(length or 0)]


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Move every tensor to `device`.

    >>> to({"w": torch.zeros(2)}, "cpu")["w"].device
    device(type='cpu')
    """
    return _map_tensors("tree.to", lambda leaf: leaf.to(device), tree)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Cast floating tensors to `dtype`; leave integers and bools (keys, counts, masks) unchanged.

    >>> cast({"w": torch.zeros(1), "step": torch.tensor(3)}, torch.float64)
    {'w': tensor([0.], dtype=torch.float64), 'step': tensor(3)}
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"tree.cast: dtype must be a torch.dtype, got {describe(dtype)}")
    return _map_tensors(
        "tree.cast", lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree
    )


def _map_tensors(caller: str, f: Callable[[torch.Tensor], torch.Tensor], tree: Tree) -> Tree:
    found, structure = flatten(tree)
    check_tensors(found, tree, f"{caller}: every leaf")
    return unflatten([f(leaf) for leaf in found], structure)


def size(tree: Tree) -> int:
    """Return the number of elements of all tensors together.

    >>> size({"weight": torch.zeros(10, 784), "bias": torch.zeros(10)})
    7850
    """
    found = leaves(tree)
    check_tensors(found, tree, "tree.size: every leaf")
    return sum(leaf.numel() for leaf in found)
