"""Divisions of integers: by 0 an error as in eager torch, and never the end of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fdl import jit, scan
from fdl._compiler._divisors import NONZERO
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace

DIVISIONS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "//": lambda x, y: x // y,
    "%": lambda x, y: x % y,
    "fmod": torch.fmod,
    "floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "in place": lambda x, y: x.clone().remainder_(y),
}
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """70 dividends and divisors of each sign, none of which is 0."""
    x = torch.arange(-35, 35)
    x = x.abs() if dtype == torch.uint8 else x
    y = torch.arange(70) % 7 + 1
    return x.to(dtype), (y if dtype == torch.uint8 else y * (1 - 2 * (y % 2))).to(dtype)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_quotients_and_rests_are_those_of_eager_torch(dtype: torch.dtype) -> None:
    x, y = pairs(dtype)
    other = y.to(torch.int64)  # another dtype, and another number of axes

    def fn(x: Tensor, y: Tensor, other: Tensor) -> list[Tensor]:
        both = [f(x, y) for f in DIVISIONS.values()]
        return both + [f(x[:, None].long().expand(70, 3), other[:3]) for f in DIVISIONS.values()]

    for a, b in zip(jit(fn, strict=True)(x, y, other), fn(x, y, other), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", DIVISIONS)
def test_a_divisor_of_zero_is_an_error(name: str) -> None:
    x, y = pairs(torch.int64)
    fn = DIVISIONS[name]
    jitted = jit(fn, strict=True)
    assert torch.equal(jitted(x, y), fn(x, y))
    y[69] = 0
    for f in (fn, jitted):
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            f(x, y)
    y[69] = 3
    assert torch.equal(jitted(x, y), fn(x, y))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        jit(lambda x: fn(x, 0))(x)


def test_in_loops_batches_and_of_what_is_closed_over() -> None:
    x, y = pairs(torch.int64)
    rows = y.view(10, 7)

    def loop(x: Tensor, rows: Tensor) -> Tensor:
        return scan(lambda total, row: (total + x[:7] // row, total), x[:7], rows)[0]

    def batched(x: Tensor, rows: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: x[:7] % row)(rows)

    def closed(x: Tensor, _: Tensor) -> Tensor:
        return x % y

    for fn in (loop, batched, closed):
        jitted = jit(fn, strict=True)
        assert torch.equal(jitted(x, rows), fn(x, rows))
        with torch.no_grad():
            y[33] = 0
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            jitted(x, rows)
        y[33] = 2


def test_only_divisors_of_integers_that_may_be_zero_are_checked() -> None:
    x, y = pairs(torch.int64)
    cases: list[tuple[Callable[[Tensor, Tensor], Tensor], int]] = [
        (lambda x, y: x % 7 + x // -2, 0),
        (lambda x, y: x / y, 0),
        (lambda x, y: x % y.double(), 0),
        (lambda x, y: torch.div(x.float(), y, rounding_mode="floor"), 0),
        (lambda x, y: x % y, 1),
    ]
    for fn, count in cases:
        leaves, spec = flatten(((x, y), {}))
        graph = trace(fn, leaves, spec).graph.graph
        assert len(graph.find_nodes(op="call_function", target=NONZERO)) == count
