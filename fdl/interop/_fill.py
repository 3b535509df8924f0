"""Place converted layers where a model of fdl has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fdl.tree import Tree, flatten_dict, unflatten_dict
from fdl.tree._paths import join

Layers = Mapping[str, Mapping[str, Tensor]]  # leaves by name, by the path of their layer


def renamed(path: str, names: Mapping[str, str]) -> str:
    """Return the path with its longest beginning that `names` has replaced.

    >>> renamed("encoder.Dense_0", {"encoder": "0", "encoder.Dense_1": "1"})
    '0.Dense_0'
    """
    for old in sorted(names, key=len, reverse=True):
        if path == old or not old or path.startswith(old + "."):
            return join(names[old], path[len(old) :].lstrip("."))
    return path


def fill(
    caller: str, collections: Mapping[str, Layers], like: Tree, names: Mapping[str, str]
) -> Tree:
    """Return the layers of each collection under their new names, in the structure of `like`.

    Raises:
        ValueError: a name is that of no layer, two leaves have one path, or paths and shapes are
            not those of `like` (each is listed).
    """
    paths = [path for layers in collections.values() for path in layers]
    unknown = [old for old in names if all(renamed(path, {old: "*"}) == path for path in paths)]
    if unknown:
        raise ValueError(f"{caller}: names={unknown} are not in the tree, which has {paths}")
    flat: dict[str, Tensor] = {}
    for collection, layers in collections.items():
        for path, leaves in layers.items():
            target = renamed(path, names)
            for name, leaf in leaves.items():
                place = join(join(collection if like is None else "", target), name)
                if place in flat:
                    raise ValueError(f"{caller}: two layers would have the path {place!r}")
                flat[place] = leaf
    return unflatten_dict(flat) if like is None else _in(caller, flat, like)


def _in(caller: str, flat: dict[str, Tensor], like: Tree) -> Tree:
    wanted: dict[str, Any] = flatten_dict(like)
    skip = isinstance(like, tuple)  # (params, buffers): the first part of a path is an index
    values, lines = {}, []
    for path, value in wanted.items():
        place = path.partition(".")[2] if skip else path
        if place not in flat and place.endswith("num_batches_tracked"):
            values[path] = value
        elif place not in flat:
            lines.append(f"{place}: missing (expected {list(value.shape)})")
        else:
            values[path] = found = flat.pop(place)
            if found.shape != value.shape:
                lines.append(f"{place}: expected {list(value.shape)}, got {list(found.shape)}")
    lines += [f"{place}: unexpected (got {list(x.shape)})" for place, x in flat.items()]
    if lines:
        raise ValueError(f"{caller}: not what `like` has:\n  " + "\n  ".join(sorted(lines)))
    return unflatten_dict(values, like=like)
