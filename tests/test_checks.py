"""Checks of arguments: what counts as a number, a function, a path; also where code is traced."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fdl
from fdl import losses, nn, tree
from fdl._checks import check_number


def check(value: Any) -> None:
    check_number("here", "rate", value, "in [0, 1)", lambda rate: 0 <= rate < 1)


NUMBERS = [0, 0.5, np.float32(0.5), np.int64(0), Fraction(1, 2), torch.tensor(0.5)]


@pytest.mark.parametrize("value", NUMBERS, ids=map(repr, NUMBERS))
def test_numbers(value: Any) -> None:
    check(value)
    with pytest.raises(ValueError, match=r"^here: rate must be in \[0, 1\), got"):
        check(value + 1)


@pytest.mark.parametrize("value", [math.nan, -math.inf, np.float32("nan"), torch.tensor(math.nan)])
def test_nan_is_in_no_range(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^here: rate must be in \[0, 1\), got (tensor\()?(nan|-inf)"
    ):
        check(value)


@pytest.mark.parametrize("value", [None, "0.5", True, [], 0.5j, torch.zeros(1), torch.tensor(0j)])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^here: rate must be a number, got a "):
        check(value)


def traced(pred: Tensor, x: Tensor) -> Tensor:
    branch = fdl.cond(pred, torch.sqrt, torch.zeros_like, x)  # of which Dynamo knows no `callable`
    moved = tree.map(torch.add, {"x": x}, {"x": tree.cast(branch, torch.float32)})
    y = nn.linear(3, 3).apply({"weight": torch.eye(3), "bias": torch.zeros(3)}, moved["x"])
    last, _ = fdl.scan(lambda carry, _: (carry * 2, None), y, None, length=2)
    return losses.huber(last, x, delta=0.5)


def test_checks_do_not_break_a_graph() -> None:
    x = torch.arange(6.0).view(2, 3)
    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.tensor(True), x), traced(torch.tensor(True), x))


def test_checks_under_vmap_and_grad() -> None:
    x = torch.arange(6.0).view(2, 1, 3) + 1
    preds = torch.tensor([True, False])
    slopes = torch.func.vmap(torch.func.grad(traced, argnums=1))(preds, x)
    each = [torch.func.grad(traced, argnums=1)(*row) for row in zip(preds, x, strict=True)]
    torch.testing.assert_close(slopes, torch.stack(each))


@pytest.mark.parametrize("save", [fdl.io.save, fdl.io.save_torch])
def test_a_tree_before_the_path(save: Any, tmp_path: Path) -> None:
    params = {"w": torch.ones(1)}
    name = save.__name__
    with pytest.raises(TypeError, match=f"^{name}: path must be .* a dict; .* first argument$"):
        save(params, tmp_path / "it")
    with pytest.raises(TypeError, match=f"^{name}: path must be a str or a Path, got a NoneType$"):
        save(None, params)


def test_leaves_that_are_no_tensors_are_named() -> None:
    params = {"w": torch.ones(1), "rate": 0.1}
    for f in (tree.size, tree.summary, tree.unstack, losses.l2_penalty, fdl.population.size):
        with pytest.raises(
            TypeError, match=r"every leaf .*must be a tensor;(.|\n)*\n  rate: 0\.1$"
        ):
            f(params)
