"""Compare derivatives with central differences in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from fdl import random, tree
from fdl._checks import check_at_least_0, check_function, check_positive
from fdl.testing._trees import largest_of, listed
from fdl.tree import Tree
from fdl.tree._summary import describe_leaf

Leaves = dict[str, Tensor]  # by dotted path
OnLeaves = Callable[[Leaves], Leaves]
ROUNDING = 100 * torch.finfo(torch.float64).eps  # of a function's values, relative


class Comparison(NamedTuple):
    """A derivative along one direction, by differences and by a transformation."""

    where: str
    expected: Tensor
    got: Tensor
    tolerance: float
    noise: float  # the part of the tolerance that is rounding


def check_grads(
    f: Callable[..., Tree],
    *args: Tree,
    order: int = 2,
    modes: Sequence[str] = ("fwd", "rev"),
    rtol: float = 1e-6,
    eps: float = 1e-4,
) -> None:
    """Raise unless the derivatives of `f` equal central differences.

    The name and the modes are those of `jax.test_util.check_grads`. For each floating leaf of the
    arguments, the derivative along a random direction of norm 1 is compared with
    [f(x − 2h) − 8 f(x − h) + 8 f(x + h) − f(x + 2h)] / 12h, h = `eps`, whose error is of the order
    of h⁴. Forward mode is compared for each result, reverse mode for a random sum of all results.
    Second order does the same with the derivatives of each mode: four compositions. Other leaves,
    such as keys and labels, are constants. At a kink, such as relu's at 0, derivatives rightly
    differ from differences: keep 2h away.

    Args:
        f: a pure function of trees that returns a tree. Its floating results are differentiated.
        *args: its arguments, floating leaves in float64.
        order: the highest order of derivatives; 2 is all that most training needs.
        modes: `"fwd"` (`jvp`), `"rev"` (`grad`) or both.
        rtol: relative tolerance.
        eps: the step of the differences.

    Raises:
        AssertionError: a derivative differs (each is named), or all derivatives and all differences
            are 0, so that nothing has been compared.
        TypeError: `f` is not a function; a floating leaf of the arguments or of the result is not
            in float64.
        ValueError: there is no floating leaf, or an option is out of range.

    >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    >>> check_grads(lambda x: x.sin(), x)
    >>> check_grads(lambda x: x.sin() * x.detach(), x, order=1, modes=("rev",))
    Traceback (most recent call last):
    AssertionError: check_grads: 1 of 1 derivatives differ from central differences
      rev by 0: expected -0.2347813, got -0.1232108, relative gap 0.48
    """
    _check_options(f, order, modes, rtol, eps)
    x, g = on_leaves("check_grads", f, args)
    _check_floating("an argument", x)
    _check_floating("the result", g(x))
    first = list(_compare(g, x, modes, "", rtol, eps))
    if all(((c.expected.abs() <= c.noise) & (c.got.abs() <= c.noise)).all() for c in first):
        raise AssertionError(
            "check_grads: all derivatives and all differences are 0, so nothing has been compared; "
            "does the result depend on the floating arguments?"
        )
    found = first + list(_higher(g, x, order - 1, modes, "", rtol, eps))
    lines = [_line(c) for c in found if not ((c.expected - c.got).abs() <= c.tolerance).all()]
    if lines:
        raise AssertionError(
            f"check_grads: {len(lines)} of {len(found)} derivatives differ from central differences"
            + listed(lines)
        )


def on_leaves(
    caller: str, f: Callable[..., Tree], args: tuple[Tree, ...]
) -> tuple[Leaves, OnLeaves]:
    """Return the floating leaves of arguments, and `f` from them to its floating results.

    Args:
        caller: first word of error messages.
        f: the function.
        args: its arguments.

    Raises:
        TypeError: a leaf of the arguments or of the result is complex.

    >>> x, g = on_leaves("here", lambda a, n: {"y": a + n}, (torch.ones(2), torch.tensor(3)))
    >>> x, g(x)
    ({'0': tensor([1., 1.])}, {'y': tensor([4., 4.])})
    """

    def floating(values: Tree) -> Leaves:
        flat = {p: x for p, x in tree.flatten_dict(values).items() if isinstance(x, Tensor)}
        if found := [path for path, x in flat.items() if x.is_complex()]:
            raise TypeError(
                f"{caller}: complex leaves are not differentiated ({', '.join(found)}); pass and "
                "return torch.view_as_real of them"
            )
        return {path: x for path, x in flat.items() if x.is_floating_point()}

    whole = tree.flatten_dict(args)
    x = {path: leaf.detach().clone() for path, leaf in floating(args).items()}
    return x, lambda x: floating(f(*tree.unflatten_dict({**whole, **x}, like=args)))


def directions(like: Leaves, seed: int) -> Leaves:
    """Draw standard normal numbers for each leaf, and divide them by their norm.

    >>> directions({"b": torch.ones(3)}, 0)["b"].norm()
    tensor(1.)
    """
    drawn = {
        path: random.normal(random.fold_in(random.key(seed), i), leaf.shape, torch.float64)
        for i, (path, leaf) in enumerate(like.items())
    }
    return {
        path: (z / z.norm().clamp_min(1e-300)).to(like[path].device, like[path].dtype)
        for path, z in drawn.items()
    }


def weighted_sum(values: Leaves, weights: Leaves) -> Tensor:
    """Return Σ w · y over all leaves.

    >>> weighted_sum({"y": torch.ones(2)}, {"y": torch.tensor([1.0, 2.0])})
    tensor(3.)
    """
    return torch.stack([(values[path] * w).sum() for path, w in weights.items()]).sum()


def _compare(
    g: OnLeaves, x: Leaves, modes: Sequence[str], of: str, rtol: float, eps: float
) -> Iterator[Comparison]:
    """Yield the derivatives of `g` along a direction of each leaf; `of` says what `g` is."""
    y, steps = g(x), directions(x, 1)
    weights = directions(y, 2)
    # By rounding alone a difference is wrong by about this; derivatives are rounded as the largest
    # of them are, since small ones may be sums that cancel.
    sizes = {path: largest_of(y if of else leaf) for path, leaf in y.items()}
    noise = {path: ROUNDING * size / eps for path, size in sizes.items()}
    of_sum = sum(noise[path] * float(w.abs().sum()) for path, w in weights.items())
    grads = grad(lambda x: weighted_sum(g(x), weights))(x) if "rev" in modes else {}
    for path, v in steps.items():
        slopes = _difference(g, x, path, v, eps)
        if "fwd" in modes:
            tangents = {p: v if p == path else torch.zeros_like(leaf) for p, leaf in x.items()}
            found = jvp(g, (x,), (tangents,))[1]
            for out, slope in slopes.items():
                tolerance = rtol * largest_of([slope, found[out]]) + noise[out]
                where = f"fwd{of} by {path}" + (f", result {out}" if out else "")
                yield Comparison(where, slope, found[out], tolerance, noise[out])
        if "rev" in modes:
            parts = {out: slope * weights[out] for out, slope in slopes.items()}
            size = float(sum(part.abs().sum() for part in parts.values()))
            total, got = weighted_sum(slopes, weights), (grads[path] * v).sum()
            yield Comparison(f"rev{of} by {path}", total, got, rtol * size + of_sum, of_sum)


def _higher(
    g: OnLeaves, x: Leaves, orders: int, modes: Sequence[str], of: str, rtol: float, eps: float
) -> Iterator[Comparison]:
    """Yield the same for the derivatives of `g`, to further orders."""
    if not orders:
        return
    tangents, weights = directions(x, 3), directions(g(x), 4)
    derivatives: dict[str, OnLeaves] = {
        "fwd": lambda x: jvp(g, (x,), (tangents,))[1],
        "rev": grad(lambda x: weighted_sum(g(x), weights)),
    }
    for mode in modes:
        inner = f" of {mode}{of}"
        yield from _compare(derivatives[mode], x, modes, inner, rtol, eps)
        yield from _higher(derivatives[mode], x, orders - 1, modes, inner, rtol, eps)


def _difference(g: OnLeaves, x: Leaves, path: str, v: Tensor, eps: float) -> Leaves:
    """Return the derivative of all results along `v` in one leaf, by the five-point stencil."""
    one, two = (
        {out: y - below[out] for out, y in g({**x, path: x[path] + h * v}).items()}
        for h in (eps, 2 * eps)
        for below in [g({**x, path: x[path] - h * v})]
    )
    return {out: (8 * one[out] - two[out]) / (12 * eps) for out in one}


def _line(c: Comparison) -> str:
    """Describe a comparison by its worst value."""
    gaps = (c.expected - c.got).abs().nan_to_num(torch.inf).flatten()
    worst = int(gaps.argmax())
    expected, got = (float(z.flatten()[worst]) for z in (c.expected, c.got))
    relative = float(gaps[worst]) / max(abs(expected), abs(got), 1e-300)
    return f"{c.where}: expected {expected:.7g}, got {got:.7g}, relative gap {relative:.2g}"


def _check_options(f: Any, order: Any, modes: Any, rtol: Any, eps: Any) -> None:
    check_function("check_grads", "f", f)
    check_positive("check_grads", "order", order)
    several = isinstance(modes, Collection) and not isinstance(modes, str)
    if not several or not modes or not {"fwd", "rev"}.issuperset(modes):
        raise ValueError(f"check_grads: modes must be 'fwd', 'rev' or both, got {modes!r}")
    check_at_least_0("check_grads", rtol=rtol, eps=eps)
    if not eps:
        raise ValueError("check_grads: eps must be positive, got 0")


def _check_floating(what: str, leaves: Leaves) -> None:
    """Raise unless there is a floating leaf, and all are in float64."""
    if not any(leaf.numel() for leaf in leaves.values()):
        raise ValueError(
            f"check_grads: {what} must have floating values, got none to differentiate"
        )
    lines = [
        f"{path or 'the value'}: {describe_leaf(leaf)}"
        for path, leaf in leaves.items()
        if leaf.dtype != torch.float64
    ]
    if lines:
        raise TypeError(
            f"check_grads: {what} must be in float64, for differences to be exact enough; cast "
            f"with fdl.tree.cast, constants too:{listed(lines)}"
        )
