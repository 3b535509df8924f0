"""What a tree is apart from its tensors, as JSON: so that a file can give it back.

A dict is an object, and numbers, texts, booleans and None are themselves; everything else is an
array that begins with its kind:

    {"fc": {"weight": ["tensor"]}, "steps": ["list", 1, 2.5, "three", null], "empty": ["tuple"]}
    ["namedtuple", "fdl.TrainState", {"params": {}, ...}]      ["float", "7ff8000000000000"]

A file only names its NamedTuples. A name is looked up in a table of fdl's own; nothing that stands
in a file is ever imported or called.
"""

from __future__ import annotations

import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from fdl._kinds import KINDS, NAMES
from fdl.io._json import MAX_DEPTH, MAX_INTEGER
from fdl.tree import Tree
from fdl.tree._paths import check_key, join

Node = Any  # of the JSON


def describe(tree: Tree, caller: str) -> tuple[Node, dict[str, Tensor]]:
    """Take a tree apart: its structure as JSON, and its tensors by dotted path.

    Args:
        tree: any tree.
        caller: how an error begins.

    Raises:
        TypeError: a container or a leaf of a kind that has no place in a file.
        ValueError: a dict key that is empty or holds a dot, too deep a nesting, or an integer of
            thousands of digits.

    >>> from fdl.metrics import Mean
    >>> describe({"w": Mean(1, None)}, "here")
    ({'w': ['namedtuple', 'fdl.Mean', {'total': 1, 'count': None}]}, {})
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Tree, path: str, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise ValueError(
                f"{caller}: more than {MAX_DEPTH} containers in each other at {path!r}"
            )

        def below(children: dict[Any, Tree]) -> dict[str, Node]:
            return {
                _checked(name, path, caller): visit(child, join(path, name), depth + 1)
                for name, child in children.items()
            }

        if isinstance(node, Tensor):
            tensors[path] = node
            return ["tensor"]
        if type(node) is int and abs(node) > MAX_INTEGER:
            raise ValueError(f"{caller}: an integer of more than 4,000 digits at {path!r}")
        if node is None or type(node) in (bool, int, str):
            return node
        if type(node) is float:
            return node if math.isfinite(node) else ["float", struct.pack(">d", node).hex()]
        if type(node) is dict:
            return below(node)
        if type(node) is OrderedDict:
            return ["OrderedDict", below(node)]
        if type(node) in (list, tuple):
            return [type(node).__name__, *below({str(i): x for i, x in enumerate(node)}).values()]
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            kind = type(node)
            name = NAMES.get(kind, f"{kind.__module__}.{kind.__qualname__}")
            return ["namedtuple", name, below(dict(zip(node._fields, node, strict=True)))]
        raise TypeError(
            f"{caller}: expected a dict, list, tuple, NamedTuple, tensor, None, bool, int, float "
            f"or str, got {type(node).__name__} at {path!r}"
            + ("; make it a dict" if isinstance(node, Mapping) else "")
        )

    return visit(tree, "", 0), tensors


def _checked(name: Any, path: str, caller: str) -> str:
    at = f" at {path!r}" if path else " at the top"
    check_key(caller, name, at)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(f"{caller}: a dict key must be valid Unicode, got {name!r}{at}")
    return name


def opened(node: Node, path: str) -> tuple[str, dict[str, Node]] | None:
    """Give the kind and the children of a container, None for a leaf.

    Args:
        node: a structure.
        path: of the node, for the error.

    Raises:
        ValueError: no structure looks like this.

    >>> opened(["list", 1, ["tensor"]], "")
    ('list', {'0': 1, '1': ['tensor']})
    """
    children: Any
    match node:
        case ["tensor"] | None | bool() | int() | float() | str():
            return None
        case ["float", str() as bits] if re.fullmatch("[0-9a-f]{16}", bits):
            return None
        case ["list" | "tuple" as kind, *items]:
            return kind, {str(i): item for i, item in enumerate(items)}
        case dict() as children:
            kind = "dict"
        case ["OrderedDict" as kind, dict() as children]:
            pass
        case ["namedtuple", str() as kind, dict() as children] if "." in kind:
            pass
        case _:
            raise ValueError(f"the structure is malformed at {path!r}: {str(node)[:80]}")
    for name in children:
        _checked(name, path, "the structure is malformed")
    return kind, children


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Yield every node of a structure with its dotted path, a container before its children.

    Args:
        node: a structure.
        path: where it is.

    Raises:
        ValueError: no structure looks like this, or it is too deep.

    >>> list(walk({"w": ["tensor"]}))
    [('', {'w': ['tensor']}), ('w', ['tensor'])]
    """
    if path.count(".") >= MAX_DEPTH:
        raise ValueError(f"the structure has more than {MAX_DEPTH} containers in each other")
    yield path, node
    found = opened(node, path)
    for name, child in (found[1] if found else {}).items():
        yield from walk(child, join(path, name))


def later_fields(structure: Node) -> dict[str, Tensor]:
    """Give the tensors that files of earlier versions lack, by path: fields with a default.

    >>> later_fields(["namedtuple", "fdl.AccumulateState", {}])
    {'surplus': tensor(0., dtype=torch.float64)}
    """
    return {
        join(path, name): default.clone()
        for path, node in walk(structure)
        if (found := opened(node, path)) and found[0] in KINDS
        for name, default in KINDS[found[0]]._field_defaults.items()  # type: ignore[attr-defined]
        if isinstance(default, Tensor)
    }


def rebuild(node: Node, tensor: Callable[[str], Tensor], path: str = "") -> Tree:
    """Put a tree together again.

    Args:
        node: its structure.
        tensor: gives the tensor of a path.
        path: where the node is.

    Raises:
        ValueError: a NamedTuple that is not in the table, or has other fields than there.

    >>> rebuild(["list", ["tensor"], ["float", "8000000000000000"]], lambda path: path + "!")
    ['0!', -0.0]
    """
    found = opened(node, path)
    if found is None:
        return tensor(path) if node == ["tensor"] else leaf_value(node)
    kind, nodes = found
    children = {name: rebuild(child, tensor, join(path, name)) for name, child in nodes.items()}
    if kind == "dict":
        return children
    if kind == "OrderedDict":
        return OrderedDict(children)
    if kind in ("list", "tuple"):
        return list(children.values()) if kind == "list" else tuple(children.values())
    if kind not in KINDS:
        raise ValueError(
            f"{path!r} is a NamedTuple {kind!r}, which fdl does not know: "
            "pass like=, a tree with that NamedTuple in its place"
        )
    fields = KINDS[kind]._fields  # type: ignore[attr-defined]
    for name, default in KINDS[kind]._field_defaults.items():  # type: ignore[attr-defined]
        if name not in children:  # a file of an earlier version
            children[name] = default.clone() if isinstance(default, Tensor) else default
    if fields != tuple(children):
        raise ValueError(
            f"{path!r} is a {kind} with fields {list(children)}, here it has {list(fields)}: "
            "pass like=, a tree of today's structure, and strict=False"
        )
    return KINDS[kind](*children.values())


def leaf_value(node: Node) -> bool | int | float | str | None:
    """Give the Python leaf that a node stands for.

    >>> leaf_value(5), leaf_value(["float", "fff0000000000000"])
    (5, -inf)
    """
    return struct.unpack(">d", bytes.fromhex(node[1]))[0] if isinstance(node, list) else node
