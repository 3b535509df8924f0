"""Checks of arguments that the transformations share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fdl._checks import check_positive


def check_scalar(caller: str, name: str, value: Any) -> Tensor:
    """Return `value` if it is a 0-d tensor, raise otherwise."""
    if not isinstance(value, Tensor) or value.ndim:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{caller}: {name} must return a scalar, a 0-d tensor, got {got}")
    return value


def check_chunk(caller: str, chunk: int | None) -> None:
    """Raise unless `chunk` is None or an int of at least 1."""
    if chunk is not None:
        check_positive(caller, "chunk", chunk)
