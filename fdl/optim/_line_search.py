"""The strong-Wolfe line search of `lbfgs`, one trial at a time and without a branch.

Algorithms 3.5 (bracketing) and 3.6 (zooming) of Nocedal & Wright, Numerical Optimization, 2nd ed.,
2006, with the safeguards of `torch.optim.LBFGS`, whose trials these are. What a branch would
decide, `torch.where` selects, so that a batch of searches can be at different stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fdl import tree
from fdl._modes import is_eager

C1, C2 = 1e-4, 0.9  # of sufficient decrease and of curvature (Nocedal & Wright, p. 62)
NARROWEST = 1e-9  # bracket, in the largest component; torch does not use `tolerance_change` here
T = TypeVar("T")


class Point(NamedTuple):
    """What is known of one point on the line."""

    t: Tensor  # float64 [], the step that leads to it
    f: Tensor  # float64 [], the value
    slope: Tensor  # float64 [], g · d
    g: Tensor  # [n], the gradient


class Search(NamedTuple):
    """A line search under way."""

    origin: Point  # at t = 0
    a: Point  # one end of the bracket; until there is a bracket, the trial before this one
    b: Point  # the other end, once there is a bracket
    low_is_b: Tensor  # bool [], the end with the lower value; `a` if they tie when compared
    zooming: Tensor  # bool [], there is a bracket
    crowded: Tensor  # bool [], this trial was allowed to lie close to an end
    trials: Tensor  # int64 [], trials judged


def choose(mask: Tensor, one: T, other: T) -> T:
    """Select one of two trees of tensors, leaf by leaf.

    >>> choose(torch.tensor(False), (torch.zeros(1),), (torch.ones(1),))
    (tensor([1.]),)
    """
    return tree.map(lambda x, y: x if x is y else torch.where(mask, x, y), one, other)


def when(mask: Tensor, make: Callable[[], T], other: T) -> T:
    """Select `make()`, which an eager call makes only if it is wanted, or the other tree.

    >>> when(torch.tensor(False), lambda: (torch.zeros(1),), (torch.ones(1),))
    (tensor([1.]),)
    """
    if is_eager():
        return make() if mask else other
    return choose(mask, make(), other)


def start(f: Tensor, slope: Tensor, g: Tensor) -> Search:
    """Begin a search where nothing but its origin is known.

    >>> minus_one = torch.tensor(-1.0, dtype=torch.float64)
    >>> start(minus_one, minus_one, torch.ones(1)).trials
    tensor(0)
    """
    origin = Point(torch.zeros_like(f), f, slope, g)
    no = torch.zeros_like(f, dtype=torch.bool)
    return Search(origin, origin, origin, no, no, no, torch.zeros_like(f, dtype=torch.int64))


def judge(
    search: Search, new: Point, *, width: Tensor, last: Tensor
) -> tuple[Search, Tensor, Point, Tensor]:
    """Take in the trial `new`.

    Args:
        search: up to this trial.
        new: the trial, evaluated.
        width: float64 [], the largest component of the direction.
        last: bool [], no evaluation is left after this one.

    Returns:
        The search, whether it has ended (bool []), the point it then ends at, and the next trial
        (float64 []) if it has not.
    """
    new = _known(new)
    origin, before, zooming = search.origin, search.a, search.zooming
    low, high = choose(search.low_is_b, (search.b, search.a), (search.a, search.b))
    too_high = (new.f > origin.f + C1 * new.t * origin.slope) | new.f.isposinf()
    rises = too_high | ((new.f >= low.f) & (zooming | (search.trials > 1)))
    flat = new.slope.abs() <= -C2 * origin.slope
    closes = ~zooming & (rises | (new.slope >= 0))  # the minimum lies between `before` and `new`
    found = ~rises & flat
    # A bracket that comes too late to divide begins at the origin.
    left = choose(last & ~zooming, origin, before)

    # The trial replaces an end: before there is a bracket `a`, or closes it as `b`; then the higher
    # end if it rises, else the lower one, which in turn replaces the higher if it is nearer.
    to_b = torch.where(zooming, rises ^ search.low_is_b, closes)
    turns = zooming & ~rises & (new.slope * (high.t - low.t) >= 0)
    a = choose(to_b, choose(turns, low, left), new)
    b = choose(to_b, new, choose(turns, low, search.b))
    low_is_b = torch.where(closes | (zooming & rises), ~(a.f <= b.f), search.low_is_b)
    zooming = zooming | closes

    ended = found | last | (zooming & ((b.t - a.t).abs() * width < NARROWEST))
    best = choose(found, new, choose(low_is_b, b, a))

    # Without a bracket look further out, at most ten times as far.
    least = torch.where(zooming, torch.minimum(a.t, b.t), new.t + 0.01 * (new.t - before.t))
    most = torch.where(zooming, torch.maximum(a.t, b.t), 10 * new.t)
    t = _cubic_minimum(a, choose(zooming, b, before), least, most)
    inside, crowded = _off_the_ends(t, least, most, search.crowded)
    t, crowded = torch.where(zooming, inside, t), zooming & crowded
    return Search(origin, a, b, low_is_b, zooming, crowded, search.trials + 1), ended, best, t


def _known(new: Point) -> Point:
    """Count a point where the value, or a derivative, is not finite as infinitely high.

    It lies outside of the domain of the function, or in a corner of it from where nothing leads on.
    """
    known = torch.isfinite(new.f) & torch.isfinite(new.slope) & torch.isfinite(new.g).all()
    f, slope = torch.where(known, new.f, torch.inf), torch.where(known, new.slope, 0.0)
    return Point(new.t, f, slope, new.g)


def _cubic_minimum(a: Point, b: Point, least: Tensor, most: Tensor) -> Tensor:
    """Minimise the cubic through two values and slopes, within bounds (Nocedal & Wright, 3.59).

    Where a value is infinite there is no cubic, and the middle is taken.
    """
    finite = ~(a.f.isinf() | b.f.isinf())
    p, q = ((x.t, torch.where(finite, x.f, 0.0), x.slope) for x in (a, b))
    (t1, f1, slope1), (t2, f2, slope2) = choose(a.t <= b.t, (p, q), (q, p))
    # Under `grad` a value that is not selected must be finite as well, so nothing divides by zero.
    mean = slope1 + slope2 - 3 * (f1 - f2) / torch.where(t1 == t2, -1, t1 - t2)
    square = mean**2 - slope1 * slope2
    root = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
    above, below = slope2 + root - mean, slope2 - slope1 + 2 * root
    straight = below == 0  # no curvature: as far downhill as allowed
    t = t2 - (t2 - t1) * (above / torch.where(straight, 1, below))
    t = torch.minimum(torch.maximum(t, least), most)
    middle = (least + most) / 2
    downhill = torch.where(above < 0, most, torch.where(above > 0, least, middle))
    return torch.where(finite & (square >= 0), torch.where(straight, downhill, t), middle)


def _off_the_ends(t: Tensor, least: Tensor, most: Tensor, crowded: Tensor) -> tuple[Tensor, Tensor]:
    """Let a trial lie in the outer tenths of the bracket once, not twice, and never on its ends."""
    tenth = 0.1 * (most - least)
    close = torch.minimum(most - t, t - least) < tenth
    moves = close & (crowded | (t >= most) | (t <= least))
    nearer_most = (t - most).abs() < (t - least).abs()
    inner = torch.where(nearer_most, most - tenth, least + tenth)
    return torch.where(moves, inner, t), close & ~moves
