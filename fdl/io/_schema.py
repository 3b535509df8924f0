"""The structure of a tree as JSON: everything but the values of its tensors.

A dict is an object, whose keys may have dots; numbers, strings, booleans and None are themselves;
everything else is an array that begins with its kind:

    {"fc": {"weight": ["tensor"]}, "steps": ["list", 1, 2.5, "three", null], "empty": ["tuple"]}
    ["namedtuple", "fdl.TrainState", {"params": {}, ...}]      ["float", "7ff8000000000000"]
    ["mapping", "tensordict.TensorDict", {"w": ["tensor"]}]

NamedTuples are stored by name, and looked up in a table of fdl; other mappings by name too, as what
`like` has to supply. A file never makes Python import or call anything.
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
from fdl.tree._paths import check_key, is_mapping, join, named_children

Node = Any  # a value in the JSON


def describe(tree: Tree, caller: str) -> tuple[Node, dict[str, Tensor]]:
    """Split a tree into its structure, as JSON, and its tensors by dotted path.

    Args:
        tree: any tree.
        caller: first words of error messages.

    Raises:
        TypeError: a container or leaf has a type that files do not support.
        ValueError: a dict key is empty or has an empty part, two places have one path, the nesting
            is too deep, or an integer has thousands of digits.

    >>> from fdl.metrics import Mean
    >>> describe({"w": Mean(1, None)}, "here")
    ({'w': ['namedtuple', 'fdl.Mean', {'total': 1, 'count': None}]}, {})
    """
    tensors: dict[str, Tensor] = {}
    places: set[str] = set()

    def visit(node: Tree, path: str, depth: int) -> Node:
        if path in places:
            raise ValueError(
                f"{caller}: two places have the path {path!r}, as a key with dots beside nested "
                "keys; rename one"
            )
        places.add(path)
        if depth > MAX_DEPTH:
            raise ValueError(f"{caller}: nested more than {MAX_DEPTH} deep at {path!r}")

        def below(children: dict[Any, Tree]) -> dict[str, Node]:
            return {
                _checked(name, path, caller): visit(child, join(path, name), depth + 1)
                for name, child in children.items()
            }

        if isinstance(node, Tensor):
            tensors[path] = node
            return ["tensor"]
        if type(node) is int and abs(node) > MAX_INTEGER:
            raise ValueError(f"{caller}: an integer with more than 4,000 digits at {path!r}")
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
            name = NAMES.get(type(node), _name(type(node)))
            return ["namedtuple", name, below(dict(zip(node._fields, node, strict=True)))]
        if is_mapping(node):
            return ["mapping", _name(type(node)), below(dict(named_children(node)))]
        raise TypeError(
            f"{caller}: expected a dict, list, tuple, NamedTuple, tensor, None, bool, int, float "
            f"or str, got {type(node).__name__} at {path!r}"
            + ("; make it a dict" if isinstance(node, Mapping) else "")
        )

    return visit(tree, "", 0), tensors


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _checked(name: Any, path: str, caller: str) -> str:
    at = f" at {path!r}" if path else " at the top"
    check_key(caller, name, at)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ValueError(f"{caller}: a dict key must be valid Unicode, got {name!r}{at}")
    return name


def as_container(node: Node, path: str) -> tuple[str, dict[str, Node]] | None:
    """Return the kind and the children of a container, None for a leaf.

    Args:
        node: a structure.
        path: path of the node, used in error messages.

    Raises:
        ValueError: the structure is malformed.

    >>> as_container(["list", 1, ["tensor"]], "")
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
        case ["mapping" as kind, str(), dict() as children]:
            pass
        case _:
            raise ValueError(f"the structure is malformed at {path!r}: {str(node)[:80]}")
    for name in children:
        _checked(name, path, "the structure is malformed")
    return kind, children


def walk(node: Node, path: str = "", depth: int = 0) -> Iterator[tuple[str, Node]]:
    """Yield every node of a structure with its dotted path, a container before its children.

    Args:
        node: a structure.
        path: path of the node.
        depth: number of containers around the node.

    Raises:
        ValueError: the structure is malformed or too deep.

    >>> list(walk({"w": ["tensor"]}))
    [('', {'w': ['tensor']}), ('w', ['tensor'])]
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"the structure is nested more than {MAX_DEPTH} deep")
    yield path, node
    container = as_container(node, path)
    for name, child in (container[1] if container else {}).items():
        yield from walk(child, join(path, name), depth + 1)


def later_fields(structure: Node) -> dict[str, Tensor]:
    """Return the tensors that older files may lack, by path: defaults of NamedTuple fields.

    >>> later_fields(["namedtuple", "fdl.AccumulateState", {}])
    {'surplus': tensor(0., dtype=torch.float64)}
    """
    return {
        join(path, name): default.clone()
        for path, node in walk(structure)
        if (container := as_container(node, path)) and container[0] in KINDS
        for name, default in KINDS[container[0]]._field_defaults.items()  # type: ignore[attr-defined]
        if isinstance(default, Tensor)
    }


def rebuild(
    node: Node,
    tensor: Callable[[str], Tensor],
    path: str = "",
    kinds: Mapping[str, type] = KINDS,
) -> Tree:
    """Rebuild a tree from its structure.

    Args:
        node: the structure.
        tensor: function that returns the tensor at a path.
        path: path of the node.
        kinds: the NamedTuples by name.

    Raises:
        ValueError: a NamedTuple is not in the table, or has other fields; or there is a mapping of
            another kind than dict and OrderedDict.

    >>> rebuild(["list", ["tensor"], ["float", "8000000000000000"]], lambda path: path + "!")
    ['0!', -0.0]
    """
    container = as_container(node, path)
    if container is None:
        return tensor(path) if node == ["tensor"] else leaf_value(node)
    kind, nodes = container
    if kind == "mapping":
        raise ValueError(
            f"{path!r} is a mapping {node[1]!r}, which a file cannot make; pass like=, a tree with "
            "this mapping, or with a dict, at the same path"
        )
    children = {
        name: rebuild(child, tensor, join(path, name), kinds) for name, child in nodes.items()
    }
    if kind == "dict":
        return children
    if kind == "OrderedDict":
        return OrderedDict(children)
    if kind in ("list", "tuple"):
        return list(children.values()) if kind == "list" else tuple(children.values())
    if kind not in kinds:
        raise ValueError(
            f"{path!r} is a NamedTuple {kind!r}, which fdl does not know; "
            "pass like=, a tree with this NamedTuple at the same path"
        )
    fields = kinds[kind]._fields  # type: ignore[attr-defined]
    for name, default in kinds[kind]._field_defaults.items():  # type: ignore[attr-defined]
        if name not in children:  # an older file
            children[name] = default.clone() if isinstance(default, Tensor) else default
    if fields != tuple(children):
        raise ValueError(
            f"{path!r} is a {kind} with fields {list(children)}, expected {list(fields)}; "
            "use load_matching with a tree of the current structure"
        )
    return kinds[kind](*children.values())


def leaf_value(node: Node) -> bool | int | float | str | None:
    """Return the Python leaf of a node.

    >>> leaf_value(5), leaf_value(["float", "fff0000000000000"])
    (5, -inf)
    """
    return struct.unpack(">d", bytes.fromhex(node[1]))[0] if isinstance(node, list) else node
