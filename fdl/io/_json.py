"""Strict JSON, which every reader accepts.

Python's `json` writes NaN and Infinity as bare words, which JSON does not have and other readers
reject. Here they are the strings "NaN", "Infinity" and "-Infinity", which `float` parses. Where
numbers must be distinguished from strings, their places are stored beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 100  # of nested containers; well below the limits of Python and its JSON
MAX_INTEGER = 10**4000 - 1  # Python parses up to 4,300 digits

Place = list[str | int]  # the keys and indices that lead to a number


def dumps(value: Any, **options: Any) -> str:
    """Convert a value to strict JSON, on one line unless `indent` is given.

    Args:
        value: anything that `json.dumps` accepts.
        options: options of `json.dumps`.

    >>> dumps({"loss": float("nan"), "clip": [float("-inf"), 1.0]})
    '{"loss": "NaN", "clip": ["-Infinity", 1.0]}'
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # a number is not finite: rare, and slower
        return json.dumps(as_texts(value)[0], allow_nan=False, **options)


def as_texts(value: Any) -> tuple[Any, list[Place]]:
    """Replace the numbers that are not finite by strings, and list their places.

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
    converted, places = {}, []
    for name, child in children:
        converted[name], below = as_texts(child)
        places += [[name, *place] for place in below]
    return (converted if isinstance(value, Mapping) else list(converted.values())), places


def as_numbers(value: Any, places: Any) -> Any:
    """Undo `as_texts`, in place.

    Args:
        value: the value that `as_texts` returned, perhaps read from a file.
        places: the places that `as_texts` returned; anything else is an error.

    Raises:
        ValueError: there is no such string at one of the places.

    >>> as_numbers({"clip": ["Infinity", 1.0]}, [["clip", 0]])
    {'clip': [inf, 1.0]}
    """
    root = [value]
    try:
        for place in places:
            node: Any = root
            parents: list[Any] = [0, *place]
            last = parents.pop()
            for name in parents:
                node = node[name]
            if node[last] not in ("NaN", "Infinity", "-Infinity"):
                raise ValueError(f"{node[last]!r} is not a number"[:200])
            node[last] = float(node[last])
    except (LookupError, TypeError) as error:
        raise ValueError(f"there is no such place: {error}"[:200]) from error
    return root[0]


def check(value: Any, path: str, caller: str, depth: int = 0) -> None:
    """Raise unless a value comes back from JSON unchanged; NaN and the infinities do.

    Args:
        value: the value to write.
        path: path of the value, used in error messages.
        caller: first words of error messages.
        depth: number of containers around the value.

    Raises:
        TypeError: a leaf is not a dict, list, str, int, float, bool or None.
        ValueError: an integer has thousands of digits, or the nesting is too deep.

    >>> check({"sizes": [8, (2, 3)]}, "metadata", "save")
    Traceback (most recent call last):
    TypeError: save: metadata['sizes'][1]: expected a dict, list, str, int, float, bool or None, \
got tuple; make it a list
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{caller}: {path}: nested more than {MAX_DEPTH} deep")
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
            raise ValueError(f"{caller}: {path}: an integer with more than 4,000 digits")
    elif value is not None and type(value) not in (bool, float, str):
        raise TypeError(
            f"{caller}: {path}: expected a dict, list, str, int, float, bool or None, "
            f"got {type(value).__name__}{_remedy(value)}"
        )


def _remedy(value: Any) -> str:
    """Suggest a JSON type for values that are common in configurations."""
    if isinstance(value, Mapping):
        return "; make it a dict"
    if isinstance(value, (tuple, set, frozenset)):
        return "; make it a list"
    if hasattr(value, "tolist"):  # NumPy and torch, single numbers too
        return "; use its .tolist()"
    if hasattr(value, "__dataclass_fields__"):
        return "; use dataclasses.asdict"
    return "; make it a str" if hasattr(value, "__fspath__") else ""
