"""Strict JSON: what this package writes, every reader of JSON takes.

Python's `json` writes NaN and Infinity as bare words, which JSON does not have and other readers
refuse. Here they are the texts "NaN", "Infinity" and "-Infinity", which `float` reads; where the
difference between a text and a number counts, their places are kept beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 100  # containers in each other; well below what Python and its JSON can take
MAX_INTEGER = 10**4000 - 1  # Python reads up to 4,300 digits

Place = list[str | int]  # the keys and indices that lead to a number


def dumps(value: Any, **options: Any) -> str:
    """Write a value as strict JSON, on one line unless `indent` is given.

    Args:
        value: anything that `json.dumps` takes.
        options: of `json.dumps`.

    >>> dumps({"loss": float("nan"), "clip": [float("-inf"), 1.0]})
    '{"loss": "NaN", "clip": ["-Infinity", 1.0]}'
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # a number that is not finite, which is rare; looking for it takes longer
        return json.dumps(as_texts(value)[0], allow_nan=False, **options)


def as_texts(value: Any) -> tuple[Any, list[Place]]:
    """Replace the numbers that are not finite by texts, and list where they stood.

    >>> as_texts({"clip": [float("inf"), 1.0]})
    ({'clip': ['Infinity', 1.0]}, [['clip', 0]])
    """
    if isinstance(value, float):
        if math.isfinite(value):
            return value, []
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity", [[]]
    if isinstance(value, Mapping):
        children: Any = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        return value, []
    made, places = {}, []
    for name, child in children:
        made[name], below = as_texts(child)
        places += [[name, *place] for place in below]
    return (made if isinstance(value, Mapping) else list(made.values())), places


def as_numbers(value: Any, places: Any) -> Any:
    """Undo `as_texts`, in place.

    Args:
        value: what `as_texts` made, perhaps by way of a file.
        places: the places that it listed; whatever else a file may have for them is an error.

    Raises:
        ValueError: there is no such text at one of the places.

    >>> as_numbers({"clip": ["Infinity", 1.0]}, [["clip", 0]])
    {'clip': [inf, 1.0]}
    """
    root = [value]
    try:
        for place in places:
            node: Any = root
            way: list[Any] = [0, *place]
            last = way.pop()
            for name in way:
                node = node[name]
            if node[last] not in ("NaN", "Infinity", "-Infinity"):
                raise ValueError(f"{node[last]!r} is no number"[:200])
            node[last] = float(node[last])
    except (LookupError, TypeError) as error:
        raise ValueError(f"there is no such place: {error}"[:200]) from error
    return root[0]


def check(value: Any, path: str, caller: str, depth: int = 0) -> None:
    """Refuse what would not come back from JSON as it was; NaN and the infinities do.

    Args:
        value: to be written.
        path: of the value, for the error.
        caller: how an error begins.
        depth: containers around it.

    Raises:
        TypeError: something else than a dict, list, str, int, float, bool or None.
        ValueError: an integer of thousands of digits, or too deep a nesting.

    >>> check({"sizes": [8, (2, 3)]}, "metadata", "save")
    Traceback (most recent call last):
    TypeError: save: metadata['sizes'][1]: expected a dict, list, str, int, float, bool or None, \
got tuple; make it a list
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{caller}: {path}: more than {MAX_DEPTH} containers in each other")
    if isinstance(value, dict):
        for name, child in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{caller}: {path}: a key must be a str, got {name!r}")
            check(child, f"{path}[{name!r}]", caller, depth + 1)
    elif type(value) is list:
        for i, child in enumerate(value):
            check(child, f"{path}[{i}]", caller, depth + 1)
    elif type(value) is int:
        if abs(value) > MAX_INTEGER:
            raise ValueError(f"{caller}: {path}: an integer of more than 4,000 digits")
    elif value is not None and type(value) not in (bool, float, str):
        raise TypeError(
            f"{caller}: {path}: expected a dict, list, str, int, float, bool or None, "
            f"got {type(value).__name__}{_remedy(value)}"
        )


def _remedy(value: Any) -> str:
    """Say how to write what people put into a config."""
    if isinstance(value, Mapping):
        return "; make it a dict"
    if isinstance(value, (tuple, set, frozenset)):
        return "; make it a list"
    if hasattr(value, "tolist"):  # of NumPy and torch, single numbers as well
        return "; take its .tolist()"
    if hasattr(value, "__dataclass_fields__"):
        return "; take its dataclasses.asdict"
    return "; make it a str" if hasattr(value, "__fspath__") else ""
