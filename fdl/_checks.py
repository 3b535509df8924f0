"""Argument checks shared by several packages."""

from __future__ import annotations


def check_positive(caller: str, name: str, value: int) -> None:
    """Raise unless `value` is an int of at least 1."""
    if not isinstance(value, int):
        raise TypeError(f"{caller}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{caller}: {name} must be at least 1, got {value}")
