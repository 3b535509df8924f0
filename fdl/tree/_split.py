"""Split a tree by its paths, and unite the parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.utils._pytree as pytree

from fdl.tree._paths import Tree, Where, flatten_dict, join, named_children, select


def partition(tree: Tree, where: Where) -> tuple[Tree, Tree]:
    """Split a tree into the leaves that `where` selects and the rest; `merge` undoes it.

    Both parts keep every container; of mappings other than dicts, which may not hold a part alone,
    they have dicts. In place of an absent leaf a dict lacks the key, a list or tuple has `()`.
    Differentiate with respect to one part and close over the other:

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
    """Copy the containers and the kept leaves; `()` replaces the others."""
    if pytree.tree_is_leaf(tree):
        return tree if keep(path) else ()
    whole = _children(tree)
    children = {name: _keep(child, join(path, name), keep) for name, child in whole.items()}
    if isinstance(tree, Mapping):
        gone = [
            name for name in whole if pytree.tree_is_leaf(whole[name]) and _is_hole(children[name])
        ]
        return {name: child for name, child in children.items() if name not in gone}
    return _rebuild(tree, list(children.values()))


def _children(tree: Tree) -> dict[str, Tree]:
    if isinstance(tree, dict):
        return tree
    if isinstance(tree, Mapping):
        return dict(named_children(tree))
    if hasattr(tree, "_fields"):
        return tree._asdict()
    if isinstance(tree, (list, tuple)):
        return {str(i): child for i, child in enumerate(tree)}
    raise TypeError(
        "tree: partition and merge accept mappings, lists, tuples and NamedTuples, got "
        f"{type(tree)}"
    )


def _rebuild(tree: Tree, children: list[Tree]) -> Tree:
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)


def merge(*trees: Tree) -> Tree:
    """Unite trees with leaves at different paths: the inverse of `partition`.

    Raises:
        ValueError: two trees have a leaf at the same path, or containers of different types there
            (each path is listed).

    >>> merge({"a": 1}, {"b": {"c": 2}}, {"b": {"d": 3}})
    {'a': 1, 'b': {'c': 2, 'd': 3}}
    """
    if not trees:
        raise ValueError("tree.merge: expected at least one tree, got none")
    merged = trees[0]
    conflicts: list[str] = []
    for other in trees[1:]:
        merged = _merge(merged, other, "", conflicts)
    if conflicts:
        raise ValueError("tree.merge: cannot unite the trees:\n  " + "\n  ".join(conflicts))
    flatten_dict(merged)  # raises where "a.b" in one tree and "b" below "a" in another meet
    return merged


def _is_hole(tree: Tree) -> bool:
    return isinstance(tree, tuple) and not hasattr(tree, "_fields") and tree == ()


def _merge(a: Tree, b: Tree, path: str, conflicts: list[str]) -> Tree:
    """Unite two trees; append the paths where that is impossible to `conflicts`."""
    if _is_hole(a):
        return b
    if _is_hole(b):
        return a
    if pytree.tree_is_leaf(a) or pytree.tree_is_leaf(b):
        conflicts.append(f"{path!r}: in two trees, at least once as a leaf")
        return a
    are_mappings = isinstance(a, Mapping) and isinstance(b, Mapping)
    if not are_mappings and (type(a) is not type(b) or len(a) != len(b)):
        kinds = [f"{type(t).__name__}[{len(t)}]" for t in (a, b)]
        conflicts.append(f"{path!r}: {kinds[0]} in one tree, {kinds[1]} in another")
        return a
    one, two = _children(a), _children(b)
    children = {
        name: _merge(one.get(name, ()), two.get(name, ()), join(path, name), conflicts)
        for name in one | two
    }
    return children if are_mappings else _rebuild(a, list(children.values()))
