"""The NamedTuples that files of trees refer to by name."""

from __future__ import annotations

from typing import TypeVar

KINDS: dict[str, type] = {}  # the names are in files: add some, change none
NAMES: dict[type, str] = {}

Kind = TypeVar("Kind", bound=type)


def register(kind: Kind) -> Kind:
    """Let files refer to a NamedTuple as `fdl.` and its name, wherever it is defined (a decorator).

    A reader of files looks names up here, and imports nothing.

    >>> from fdl.metrics import Mean
    >>> KINDS["fdl.Mean"] is Mean, NAMES[Mean]
    (True, 'fdl.Mean')
    """
    name = f"fdl.{kind.__name__}"
    KINDS[name], NAMES[kind] = kind, name
    return kind
