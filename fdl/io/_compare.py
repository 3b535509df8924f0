"""Whether what a file holds is what somebody expects, place by place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fdl.io._schema import Node, opened, walk
from fdl.tree._summary import shape_dtype

_CONTAINERS = ("dict", "OrderedDict", "list", "tuple", "NamedTuple")


def places(structure: Node, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Say what stands at each path of a structure.

    Args:
        structure: of the tree.
        tensors: the tensors in it; those on `meta` will do.

    >>> places({"w": 1, "v": ["list"]}, {})
    {'': 'dict', 'w': 'int', 'v': 'empty list'}
    """
    found = {}
    for path, node in walk(structure):
        inner = opened(node, path)
        if inner is not None:
            kind = "NamedTuple" if "." in inner[0] else inner[0]
            found[path] = kind if inner[1] else f"empty {kind}"
        elif path in tensors:
            leaf = tensors[path]
            found[path] = shape_dtype(leaf)
        else:
            found[path] = "float" if isinstance(node, list) else type(node).__name__
    return found


def without_containers(found: Mapping[str, str]) -> dict[str, str]:
    """Leave the leaves: for files that say nothing of containers.

    >>> without_containers({"": "dict", "w": "int", "v": "empty list"})
    {'w': 'int'}
    """
    return {p: what for p, what in found.items() if what.removeprefix("empty ") not in _CONTAINERS}


def narrow_slots(structure: Node, wanted: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """List slots of optimizers that a file of an earlier version has in 16 bits, today in 32.

    Args:
        structure: what is expected.
        wanted: what is expected at each path.
        got: what is there.

    >>> wanted, got = {"slots.m": "float32[2]"}, {"slots.m": "bfloat16[2]"}
    >>> narrow_slots(["namedtuple", "fdl.State", {"slots": {"m": ["tensor"]}}], wanted, got)
    ['slots.m']
    """
    return [
        at
        for path, node in walk(structure)
        if (inner := opened(node, path)) and inner[0] in ("fdl.State", "fdl.LBFGSState")
        for at, _ in walk(node, path)
        if wanted.get(at, "").startswith("float32")
        and got.get(at, "").removeprefix("b") == wanted[at].replace("32", "16", 1)
    ]


def differences(wanted: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """List the paths where two trees differ; what only contains other lines is left out.

    Args:
        wanted: what is expected at each path.
        got: what is there.

    >>> differences({"": "dict", "w": "int", "v": "list", "v.0": "str"}, {"": "tuple", "w": "int"})
    [': expected dict, got tuple', 'v.0: expected str, got nothing']
    """
    lines = []
    for path in sorted(wanted.keys() | got.keys()):
        one, two = wanted.get(path), got.get(path)
        if one is None or two is None:
            if (one or two) not in _CONTAINERS:
                lines.append(f"{path}: expected {one or 'nothing'}, got {two or 'nothing'}")
        elif one.removeprefix("empty ") != two.removeprefix("empty "):
            lines.append(f"{path}: expected {one}, got {two}")
    return lines
