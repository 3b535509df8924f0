"""Read and write strict JSON, which has no NaN and no infinities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["from_json", "numbers", "to_json"]


def to_json(record: Any, **layout: Any) -> str:
    """Convert to JSON that every reader accepts: null stands for NaN and the infinities.

    Args:
        record: dicts, lists, strings and numbers.
        layout: further arguments of `json.dumps`, such as `indent`.

    >>> to_json({"loss": math.nan, "history": [1.5, math.inf]})
    '{"loss": null, "history": [1.5, null]}'
    """
    return json.dumps(_finite(record), allow_nan=False, **layout)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(part) for name, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
    return value


def from_json(text: str) -> dict[str, Any]:
    """Read a record of numbers, a line of `metrics.jsonl`.

    >>> from_json('{"epoch": 1, "loss": null}'), from_json('{"loss": NaN}')  # from an older file
    ({'epoch': 1, 'loss': nan}, {'loss': nan})
    """
    return numbers(json.loads(text))


def numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace null by NaN in a record of numbers.

    >>> numbers({"epoch": 1, "loss": None})
    {'epoch': 1, 'loss': nan}
    """
    return {name: math.nan if value is None else value for name, value in record.items()}
