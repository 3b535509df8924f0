"""`debug.nans` names the result, the operation, the line and the step."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from fdl import debug, jit, scan

pytestmark = pytest.mark.usefixtures("plain_backend", "real_loops")

X = torch.ones(3)


def descend(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    c = c - x
    return c, c.sqrt()


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "an operation": (
        lambda x: (x - 2).log(),
        (X,),
        r"the result has NaN; the first NaN is made by log at test_nans\.py:\d+: lambda x: \(x - 2",
    ),
    "inf": (
        lambda x: {"a": {"b": (x * 100).exp()}, "c": x},
        (X,),
        r"the result a\.b has inf; the first inf is made by exp at test_nans\.py:",
    ),
    "a step of a scan": (
        lambda c, xs: scan(descend, c, xs),
        (X * 17.5, torch.ones(40)),
        r"the result 1 has NaN; .* by sqrt at test_nans\.py:\d+: return c, c\.sqrt\(\), in step 17",
    ),
    "a step of a scan in a scan": (
        lambda c, xs: scan(lambda c, x: scan(descend, c, xs[:5]), c, xs),
        (X * 17.5, torch.ones(40)),
        "by sqrt .*, in step 3, 2 of the scan",
    ),
    "NaN after inf": (
        lambda x: (x / 0 - x / 0, x / 0),
        (X,),
        "the result 0 has NaN; the first NaN is made by sub",
    ),
    "a derivative": (
        grad(lambda x: (x * 0).sqrt().sum() * 0),
        (X,),
        r"the result has NaN; the first NaN is made by \w+ at test_nans",
    ),
    "NaN of inf": (lambda x: x - x, (X * torch.inf,), "the first NaN is made by sub"),
}
QUIET: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "finite": (lambda x: x.log(), (X,)),
    "integers": (lambda x: x.long() // 2, (X,)),
    "inf on the way": (lambda x: torch.where(x > 2, x, -torch.inf).exp(), (X,)),
    "NaN given": (lambda x: x + 1, (X * torch.nan,)),
    "inf given": (lambda x: x + 1, (X * torch.inf,)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("donate", [(), 0], ids=["", "donated"])
def test_the_first_one_is_named(name: str, donate: Any) -> None:
    fn, args, text = CASES[name]
    jitted = jit(fn, donate_argnums=donate)
    copies = [x.clone() for x in args]
    with debug.nans():
        for _ in range(2):
            with pytest.raises(FloatingPointError, match=text):
                jitted(*copies)
    for x, copy in zip(args, copies, strict=True):
        torch.testing.assert_close(x, copy, equal_nan=True)
    jitted(*copies)  # outside of the block nothing is checked


@pytest.mark.parametrize("name", QUIET)
def test_what_has_none_or_was_given_some_does_not_raise(name: str) -> None:
    fn, args = QUIET[name]
    with debug.nans():
        result = jit(fn)(*args)
    torch.testing.assert_close(result, fn(*args), equal_nan=True)


def test_backward_is_checked() -> None:
    x = torch.zeros(3, requires_grad=True)
    with debug.nans(), pytest.raises(FloatingPointError, match=r"the first (NaN|inf) is made by"):
        (jit(lambda x: x.sqrt())(x) * 0).sum().backward()


def test_what_eager_torch_does_not_show_is_said_to_come_from_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []

    def fn(x: Tensor) -> Tensor:
        runs.append(1)
        return x.log() if len(runs) > 1 else (x - 2).log()

    text = "the result has NaN; eagerly no operation makes one"
    with debug.nans(), pytest.raises(FloatingPointError, match=re.escape(text)):
        jit(fn)(X)
