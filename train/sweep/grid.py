"""The grid of a sweep: parse `lr=0.1:1.6:8log` to an axis, and combine axes to points."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

from train.config import Recipe, check

__all__ = ["SWEPT", "Axis", "at", "parse", "points"]

SWEPT = ("lr", "momentum", "weight_decay", "seed")  # stored in the state, or its key
FORMS = "a:b:8log, a:b:8lin, 0:8 (integers 0 to 7) or 0.1,0.3,1.0"
MOST = 10_000  # values of an axis

Value = float | int


class Axis(NamedTuple):
    """An option and the values it takes.

    >>> parse(["seed=0:3"])
    [Axis(name='seed', values=(0, 1, 2))]
    """

    name: str
    values: tuple[Value, ...]


def parse(grid: Sequence[str]) -> list[Axis]:
    """Parse the arguments of `--grid`.

    Raises:
        ValueError: there is no argument, or one is malformed, names an option that cannot be swept
            or was named before, or has no or equal values.

    >>> parse(["lr=0.1:1.6:5log", "weight-decay=0,0.001"])[0].values
    (0.1, 0.2, 0.4, 0.8, 1.6)
    """
    if not grid:
        raise ValueError(f"--grid must be given, as in --grid lr=0.1:1.6:8log; forms: {FORMS}")
    axes: list[Axis] = []
    for text in grid:
        name, equals, values_text = text.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"--grid {text}: expected NAME=VALUES, with values {FORMS}")
        if name not in SWEPT:
            raise ValueError(
                f"--grid {text}: {name!r} cannot be swept, because it is not in the state; "
                f"sweep one of: {', '.join(SWEPT)}"
            )
        if name in [axis.name for axis in axes]:
            raise ValueError(f"--grid {text}: {name} is given twice")
        values = _values(text, values_text)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--grid {text}: expected at least one value and none twice")
        if name == "seed" and not all(isinstance(value, int) for value in values):
            raise ValueError(f"--grid {text}: seeds must be integers")
        axes.append(Axis(name, values))
    return axes


def _values(text: str, values: str) -> tuple[Value, ...]:
    try:
        if between := re.fullmatch(r"([^:,]+):([^:,]+):(\d+)(log|lin)", values):
            first, last, count = float(between[1]), float(between[2]), int(between[3])
            if count < 2 or count > MOST or not (math.isfinite(first) and math.isfinite(last)):
                raise ValueError
            shares = [i / (count - 1) for i in range(count)]
            if between[4] == "lin":
                return tuple(_round(first + (last - first) * share) for share in shares)
            if min(first, last) <= 0:
                raise ValueError
            return tuple(_round(first * (last / first) ** share) for share in shares)
        if whole := re.fullmatch(r"(\d+):(\d+)", values):
            if int(whole[2]) - int(whole[1]) > MOST:
                raise ValueError
            return tuple(range(int(whole[1]), int(whole[2])))
        return tuple(int(v) if v.strip().isdigit() else float(v) for v in values.split(","))
    except ValueError:
        raise ValueError(
            f"--grid {text}: expected values like {FORMS}, got {values!r}; "
            f"log needs positive ends, and an axis has 2 to {MOST} values"
        ) from None


def _round(value: float) -> float:
    """Round to 10 digits: 0.2, not 0.20000000000000004."""
    return float(f"{value:.10g}")


def points(axes: Sequence[Axis]) -> list[dict[str, Value]]:
    """List all combinations; the last axis varies fastest.

    >>> points([Axis("lr", (0.1, 0.2)), Axis("seed", (0, 1))])[:2]
    [{'lr': 0.1, 'seed': 0}, {'lr': 0.1, 'seed': 1}]
    """
    names = [axis.name for axis in axes]
    rows = itertools.product(*(axis.values for axis in axes))
    return [dict(zip(names, row, strict=True)) for row in rows]


def at(config: Recipe, point: dict[str, Value]) -> Recipe:
    """Return the options of the ordinary run that a point equals.

    Raises:
        ValueError: a value is out of its range.

    >>> at(Recipe(), {"lr": 1, "seed": 3}).lr
    1.0
    """
    rates = {field.name for field in fields(Recipe) if isinstance(field.default, float)}
    values = {name: float(v) if name in rates else v for name, v in point.items()}
    chosen = replace(config, **values)  # type: ignore[arg-type]
    check(chosen)
    return chosen
