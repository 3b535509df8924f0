"""The classes that a file of a tree may name."""

from __future__ import annotations

from typing import TypeVar

KINDS: dict[str, type] = {}  # the names stand in files: one may be added, none changed
NAMES: dict[type, str] = {}

Kind = TypeVar("Kind", bound=type)


def register(kind: Kind) -> Kind:
    """Let files name a class, as `fdl.` and its name, wherever the class is defined.

    A decorator for NamedTuples. Reading a file looks a name up here and imports nothing.

    >>> from fdl.metrics import Mean
    >>> KINDS["fdl.Mean"] is Mean, NAMES[Mean]
    (True, 'fdl.Mean')
    """
    name = f"fdl.{kind.__name__}"
    KINDS[name], NAMES[kind] = kind, name
    return kind
