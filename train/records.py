"""Read and write strict JSON, which has no NaN and no infinities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LABELS", "MONITORED", "best_epoch", "from_json", "numbers", "to_json"]

MONITORED = "validation_loss"  # what --patience waits for
LABELS = {
    "loss": "loss",
    "accuracy": "train acc",
    "validation_loss": "val loss",
    "validation_accuracy": "val acc",
    "test_loss": "test loss",
    "test_accuracy": "test acc",
}
"""The metrics of an epoch, and what they are called in a table."""


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


def best_epoch(records: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of the epoch with the lowest validation loss; 0 if there is none.

    >>> losses = [0.5, 0.3, math.nan, 0.4]
    >>> best_epoch([{"epoch": i, MONITORED: loss} for i, loss in enumerate(losses, 1)])
    2
    """
    known = [r for r in records if math.isfinite(r.get(MONITORED, math.nan))]
    return min(known, key=lambda record: record[MONITORED])["epoch"] if known else 0
