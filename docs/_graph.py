"""Draws which units of `fdl` import which: the storeys of tests/laws/test_layers.py, as SVG."""

from __future__ import annotations

import html
import random
from collections.abc import Iterable
from functools import cache
from itertools import combinations, pairwise
from typing import NamedTuple

from tests.laws.test_layers import FILES, LEVEL, STOREYS, imports, unit_of

ROW, HEIGHT, GAP = 62, 26, 12


class Point(NamedTuple):
    """A unit, or, on a storey between, where the arrows to a unit pass by."""

    unit: str
    level: int


def width(point: Point) -> float:
    return 7.4 * len(name(point.unit)) + 14 if LEVEL[point.unit] == point.level else 4


def name(unit: str) -> str:
    return "fdl" if unit == "__init__" else unit


@cache
def direct() -> dict[str, set[str]]:
    """The units that each unit imports."""
    found: dict[str, set[str]] = {unit: set() for unit in LEVEL}
    for path in FILES:
        targets = {module.split(".")[0] for module, _ in imports(path)} & LEVEL.keys()
        found[unit_of(path)] |= targets - {unit_of(path)}
    return found


def below(unit: str) -> set[str]:
    """All units that a unit needs."""
    return direct()[unit].union(*map(below, direct()[unit]))


def arrows() -> list[tuple[str, str]]:
    """The imports that do not follow from others."""
    return [
        (unit, target)
        for unit, targets in direct().items()
        for target in sorted(targets)
        if not any(target in below(other) for other in targets)
    ]


def segments() -> set[tuple[Point, Point]]:
    """Cut the arrows at each storey; those to one unit are one line from where they meet."""
    return {
        (Point(unit if upper == LEVEL[unit] else target, upper), Point(target, upper - 1))
        for unit, target in arrows()
        for upper in range(LEVEL[unit], LEVEL[target], -1)
    }


def crossings(rows: list[list[Point]], lines: set[tuple[Point, Point]]) -> int:
    place = {point: i for row in rows for i, point in enumerate(row)}
    return sum(
        a.level == c.level and (place[a] - place[c]) * (place[b] - place[d]) < 0
        for (a, b), (c, d) in combinations(sorted(lines), 2)
    )


def mean(values: Iterable[float], default: float) -> float:
    values = list(values)
    return sum(values) / len(values) if values else default


def ordered(lines: set[tuple[Point, Point]]) -> list[list[Point]]:
    """Order each storey such that few lines cross: the best of many random starts."""
    points = {Point(*unit) for unit in LEVEL.items()} | {p for line in lines for p in line}
    draw, best = random.Random(0), (10**9, [])
    near: dict[Point, list[Point]] = {point: [] for point in points}
    for a, b in sorted(lines):
        near[a].append(b)
        near[b].append(a)
    for _ in range(60):
        rows = [sorted(p for p in points if p.level == i) for i in range(len(STOREYS))]
        for row in rows:
            draw.shuffle(row)
        for sweep in range(8):
            for row in rows if sweep % 2 else rows[::-1]:
                place = {p: i / len(r) for r in rows for i, p in enumerate(r)}
                side = -1 if sweep % 2 else 1
                row.sort(
                    key=lambda p, place=place, side=side: mean(
                        (place[q] for q in near[p] if q.level == p.level + side), place[p]
                    )
                )
        best = min(best, (crossings(rows, lines), [list(row) for row in rows]))
    return best[1]


def placed(rows: list[list[Point]], lines: set[tuple[Point, Point]]) -> dict[Point, float]:
    """Move each point towards those it is connected with, apart from its neighbours."""
    x = {point: 60.0 * i for row in rows for i, point in enumerate(row)}
    for _ in range(200):
        for row in rows:
            for p in row:
                ends = [b if a == p else a for a, b in lines if p in (a, b)]
                x[p] += 0.5 * (mean((x[q] for q in ends), x[p]) - x[p])
            for _ in range(20):
                for p, q in pairwise(row):
                    overlap = (width(p) + width(q)) / 2 + GAP - (x[q] - x[p])
                    if overlap > 0:
                        x[p], x[q] = x[p] - overlap / 2, x[q] + overlap / 2
    return x


def svg(links: dict[str, str]) -> str:
    """Draw the units, those with a link in colour; the colours of text and lines are the page's."""
    lines = segments()
    rows = ordered(lines)
    x = placed(rows, lines)
    left = min(x[p] - width(p) / 2 for p in x) - 4
    wide = max(x[p] + width(p) / 2 for p in x) + 4 - left
    high = ROW * len(STOREYS) - ROW + HEIGHT + 8

    def middle(p: Point) -> float:
        return ROW * (len(STOREYS) - 1 - p.level) + HEIGHT / 2 + 4

    def line(a: Point, b: Point) -> str:
        from_unit, to_unit = LEVEL[a.unit] == a.level, LEVEL[b.unit] == b.level
        top = middle(a) + (HEIGHT / 2 if from_unit else 0)
        end = middle(b) - (HEIGHT / 2 + 5 if to_unit else 0)
        half = (top + end) / 2
        xa, xb = x[a] - left, x[b] - left
        head = ' marker-end="url(#head)"' if to_unit else ""
        return (
            f'<path d="M{xa:.1f} {top:.1f}C{xa:.1f} {half:.1f} {xb:.1f} {half:.1f} '
            f'{xb:.1f} {end:.1f}"{head}/>'
        )

    def box(unit: str) -> str:
        p = Point(unit, LEVEL[unit])
        label, kind = html.escape(name(unit)), "public" if unit in links else "private"
        drawn = (
            f'<g class="{kind}"><rect x="{x[p] - left - width(p) / 2:.1f}" '
            f'y="{middle(p) - HEIGHT / 2:.1f}" width="{width(p):.1f}" height="{HEIGHT}" rx="6"/>'
            f'<text x="{x[p] - left:.1f}" y="{middle(p) + 4.5:.1f}">{label}</text></g>'
        )
        return f'<a href="{links[unit]}">{drawn}</a>' if unit in links else drawn

    return "\n".join(
        [
            f'<svg class="modules" viewBox="0 0 {wide:.0f} {high}" width="{wide:.0f}" role="img">',
            "<title>The units of fdl and what each imports</title>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="6" refY="5" markerWidth="5" '
            'markerHeight="5" orient="auto"><path d="M0 0L10 5L0 10z"/></marker></defs>',
            *(line(a, b) for a, b in sorted(lines)),
            *(box(unit) for unit in sorted(LEVEL)),
            "</svg>",
        ]
    )
