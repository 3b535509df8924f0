"""Compare the tree in a file with `like`, path by path."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fdl.io._schema import Node, as_container, walk
from fdl.tree._summary import shape_dtype

_CONTAINERS = ("dict", "OrderedDict", "list", "tuple", "NamedTuple")
_WITH_SLOTS = ("fdl.State", "fdl.LBFGSState")


def describe_paths(structure: Node, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Describe the container or leaf at each path of a structure.

    Args:
        structure: structure of a tree.
        tensors: its tensors by path; they may be on the device `meta`.

    >>> describe_paths({"w": 1, "v": ["list"]}, {})
    {'': 'dict', 'w': 'int', 'v': 'empty list'}
    """
    described = {}
    for path, node in walk(structure):
        container = as_container(node, path)
        if container is not None:
            kind = "NamedTuple" if "." in container[0] else container[0]
            kind = "dict" if kind == "mapping" else kind
            described[path] = kind if container[1] else f"empty {kind}"
        elif path in tensors:
            leaf = tensors[path]
            described[path] = shape_dtype(leaf)
        else:
            described[path] = "float" if isinstance(node, list) else type(node).__name__
    return described


def without_containers(described: Mapping[str, str]) -> dict[str, str]:
    """Keep the leaves alone, for files without a structure.

    >>> without_containers({"": "dict", "w": "int", "v": "empty list"})
    {'w': 'int'}
    """
    return {
        path: text
        for path, text in described.items()
        if text.removeprefix("empty ") not in _CONTAINERS
    }


def narrow_slots(structure: Node, wanted: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """List the paths of optimizer slots with 32 bits that older files have in 16 bits.

    Args:
        structure: expected structure.
        wanted: expected container or leaf at each path.
        got: container or leaf of the file at each path.

    >>> wanted, got = {"slots.m": "float32[2]"}, {"slots.m": "bfloat16[2]"}
    >>> narrow_slots(["namedtuple", "fdl.State", {"slots": {"m": ["tensor"]}}], wanted, got)
    ['slots.m']
    """
    return [
        at
        for path, node in walk(structure)
        if (container := as_container(node, path)) and container[0] in _WITH_SLOTS
        for at, _ in walk(node, path)
        if wanted.get(at, "").startswith("float32")
        and got.get(at, "").removeprefix("b") == wanted[at].replace("32", "16", 1)
    ]


def differences(wanted: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """List the paths at which two trees differ, a line each.

    Containers whose children are listed are not listed themselves.

    Args:
        wanted: expected container or leaf at each path.
        got: container or leaf at each path.

    >>> differences({"": "dict", "w": "int", "v": "list", "v.0": "str"}, {"": "tuple", "w": "int"})
    [': expected dict, got tuple', 'v.0: expected str, got nothing']
    """
    lines = []
    for path in sorted(wanted.keys() | got.keys()):
        old, new = wanted.get(path), got.get(path)
        if old is None or new is None:
            if (old or new) not in _CONTAINERS:
                lines.append(f"{path}: expected {old or 'nothing'}, got {new or 'nothing'}")
        elif old.removeprefix("empty ") != new.removeprefix("empty "):
            lines.append(f"{path}: expected {old}, got {new}")
    return lines
