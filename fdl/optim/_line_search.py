"""The strong-Wolfe line search of `lbfgs`, one trial at a time and without a branch.

Algorithms 3.5 (bracketing) and 3.6 (zooming) of Nocedal & Wright, Numerical Optimization, 2nd ed.,
2006, with the safeguards of `torch.optim.LBFGS`, so that the trials are the same. `torch.where`
takes the place of branches, so that a batch of searches can be at different stages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdl.optim._helpers import tree_where

C1, C2 = 1e-4, 0.9  # for sufficient decrease and for curvature (Nocedal & Wright, p. 62)
NARROWEST = 1e-9  # width of a bracket in its largest component; as in torch, not tolerance_change


class Point(NamedTuple):
    """A point on the line: its value, slope and gradient."""

    t: Tensor  # float64 [], the step that leads to it
    f: Tensor  # float64 [], the value; infinite outside the domain of the function
    slope: Tensor  # float64 [], g · d
    g: Tensor  # [n], the gradient


class Search(NamedTuple):
    """A line search in progress."""

    origin: Point  # at t = 0
    a: Point  # one end of the bracket; until there is a bracket, the trial before this one
    b: Point  # the other end, once there is a bracket
    low_is_b: Tensor  # bool [], the end with the lower value; `a` if they tie when compared
    zooming: Tensor  # bool [], there is a bracket
    near_end: Tensor  # bool [], the trial in progress was allowed to lie close to an end
    trials: Tensor  # int64 [], trials judged


class Verdict(NamedTuple):
    """The result of judging a trial."""

    search: Search  # with the trial included
    ended: Tensor  # bool []
    best: Point  # where the search ends, if it has ended
    t: Tensor  # float64 [], the next trial, if it has not


def start(f: Tensor, slope: Tensor, g: Tensor) -> Search:
    """Begin a search from the value, slope and gradient at its origin.

    >>> minus_one = torch.tensor(-1.0, dtype=torch.float64)
    >>> start(minus_one, minus_one, torch.ones(1)).trials
    tensor(0)
    """
    origin = Point(torch.zeros_like(f), f, slope, g)
    no = torch.zeros_like(f, dtype=torch.bool)
    return Search(origin, origin, origin, no, no, no, torch.zeros_like(f, dtype=torch.int64))


def judge(search: Search, trial: Point, *, width: Tensor, last: Tensor) -> Verdict:
    """Include a trial in a search, and decide if it ends there or where to look next.

    Args:
        search: the search up to this trial.
        trial: the trial, evaluated.
        width: float64 [], the largest component of the direction.
        last: bool [], no evaluation is left after this one.
    """
    trial = _infinite_outside_domain(trial)
    rises = _rises(search, trial)
    accepted = ~rises & (trial.slope.abs() <= -C2 * search.origin.slope)
    new = _replace_end(search, trial, rises, last)

    too_narrow = new.zooming & ((new.b.t - new.a.t).abs() * width < NARROWEST)
    ended = accepted | last | too_narrow
    best = tree_where(accepted, trial, tree_where(new.low_is_b, new.b, new.a))

    t, near_end = _next_trial(new, trial, previous=search.a)
    return Verdict(new._replace(near_end=near_end), ended, best, t)


def _ends(search: Search) -> tuple[Point, Point]:
    """Return the ends of the bracket, the one with the lower value first."""
    return tree_where(search.low_is_b, (search.b, search.a), (search.a, search.b))


def _rises(search: Search, trial: Point) -> Tensor:
    """Test if a trial decreases the value too little, or is not below the best one so far."""
    origin, (low, _) = search.origin, _ends(search)
    too_high = (trial.f > origin.f + C1 * trial.t * origin.slope) | trial.f.isposinf()
    return too_high | ((trial.f >= low.f) & (search.zooming | (search.trials > 1)))


def _replace_end(search: Search, trial: Point, rises: Tensor, last: Tensor) -> Search:
    """Let a trial replace an end of the bracket or, while there is none, extend or close it."""
    zooming, (low, high) = search.zooming, _ends(search)
    closes = ~zooming & (rises | (trial.slope >= 0))  # the minimum is between `a` and the trial
    # A bracket that is closed too late to be divided begins at the origin.
    left = tree_where(last & ~zooming, search.origin, search.a)

    # Without a bracket the trial becomes `a`, or `b` if it closes one. In a bracket it replaces the
    # higher end if it rises. Else it replaces the lower end, which then becomes the other end if
    # the minimum is between the two.
    becomes_b = torch.where(zooming, rises ^ search.low_is_b, closes)
    low_stays = zooming & ~rises & (trial.slope * (high.t - low.t) >= 0)
    a = tree_where(becomes_b, tree_where(low_stays, low, left), trial)
    b = tree_where(becomes_b, trial, tree_where(low_stays, low, search.b))
    low_is_b = torch.where(closes | (zooming & rises), ~(a.f <= b.f), search.low_is_b)
    return Search(
        search.origin, a, b, low_is_b, zooming | closes, search.near_end, search.trials + 1
    )


def _next_trial(search: Search, trial: Point, previous: Point) -> tuple[Tensor, Tensor]:
    """Return the next trial within the bracket, or further out, and its `near_end`."""
    a, b, zooming = search.a, search.b, search.zooming
    # Without a bracket, at most ten times as far out.
    least = torch.where(zooming, torch.minimum(a.t, b.t), trial.t + 0.01 * (trial.t - previous.t))
    most = torch.where(zooming, torch.maximum(a.t, b.t), 10 * trial.t)
    t = _cubic_minimum(a, tree_where(zooming, b, previous), least, most)
    inside, near_end = _off_the_ends(t, least, most, search.near_end)
    return torch.where(zooming, inside, t), zooming & near_end


def _infinite_outside_domain(point: Point) -> Point:
    """Set the value to infinity where it, or a derivative, is not finite.

    Such a point lies outside the domain of the function, or on its edge, where no direction is
    known that leads back.
    """
    finite = torch.isfinite(point.f) & torch.isfinite(point.slope) & torch.isfinite(point.g).all()
    f, slope = torch.where(finite, point.f, torch.inf), torch.where(finite, point.slope, 0.0)
    return Point(point.t, f, slope, point.g)


def _cubic_minimum(a: Point, b: Point, least: Tensor, most: Tensor) -> Tensor:
    """Minimize the cubic through two values and slopes, within bounds (Nocedal & Wright, 3.59).

    If a value is infinite there is no cubic, and the middle is returned.
    """
    finite = ~(a.f.isinf() | b.f.isinf())
    p, q = ((x.t, torch.where(finite, x.f, 0.0), x.slope) for x in (a, b))
    (t1, f1, slope1), (t2, f2, slope2) = tree_where(a.t <= b.t, (p, q), (q, p))
    # Under `grad` values that are not selected must be finite too: never divide by zero.
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


def _off_the_ends(
    t: Tensor, least: Tensor, most: Tensor, near_end: Tensor
) -> tuple[Tensor, Tensor]:
    """Allow a trial in the outer tenths of the bracket once, not twice, and never on its ends."""
    tenth = 0.1 * (most - least)
    close = torch.minimum(most - t, t - least) < tenth
    moves = close & (near_end | (t >= most) | (t <= least))
    nearer_most = (t - most).abs() < (t - least).abs()
    inner = torch.where(nearer_most, most - tenth, least + tenth)
    return torch.where(moves, inner, t), close & ~moves
