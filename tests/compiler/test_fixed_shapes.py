"""Operations whose shape depends on values in eager torch, in a jitted function. Oracle: eager."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from fdl import jit
from fdl._compiler._fixed_shapes import FIXED_SHAPES
from tests.support.asserts import close, draw

aten = torch.ops.aten


def test_the_operations() -> None:
    assert FIXED_SHAPES.keys() == {aten.bincount.default, aten.linalg_lstsq.default}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [None, torch.float32, torch.int64], ids=str)
def test_bincount(plain_backend: None, dtype: torch.dtype, weights: torch.dtype | None) -> None:
    x = torch.tensor([3, 0, 3, 6], dtype=dtype)
    weights = None if weights is None else torch.tensor([1, 2, 3, 4], dtype=weights)

    def count(x: Tensor) -> Tensor:
        return torch.bincount(x, weights, minlength=7)

    torch.testing.assert_close(jit(count)(x), count(x), rtol=0, atol=0)


def test_bincount_of_nothing(plain_backend: None) -> None:
    x = torch.zeros(0, dtype=torch.int64)
    assert jit(lambda x: torch.bincount(x, minlength=3))(x).tolist() == [0, 0, 0]


@pytest.mark.parametrize("x", [[3, 7], [3, -1]])
def test_bincount_raises_for_a_number_without_a_bin(plain_backend: None, x: list[int]) -> None:
    with pytest.raises(IndexError, match="index out of range: expected 0 <= index < 7"):
        jit(lambda x: torch.bincount(x, minlength=7))(torch.tensor(x))


def test_bincount_without_minlength_is_refused(plain_backend: None) -> None:
    with pytest.raises(RuntimeError, match="bincount"):
        jit(torch.bincount)(torch.tensor([1, 2]))


DRIVERS = ["gels", "gelsy", "gelsd", "gelss", None]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("columns", [(), (1,), (2,)], ids=str)
def test_lstsq(plain_backend: None, driver: str, shape: Any, columns: Any) -> None:
    a, b = draw(0, *shape), draw(1, *shape[:-1], *columns)

    def solve(a: Tensor, b: Tensor) -> Any:
        return tuple(torch.linalg.lstsq(a, b, driver=driver))

    actual, expected = jit(solve)(a, b), solve(a, b)
    for x, y in zip(actual, expected, strict=True):
        close(x, y)


@pytest.mark.parametrize("driver", ["gelsy", "gelsd", "gelss"])
def test_lstsq_without_full_rank_gives_the_least_solution(plain_backend, driver: str) -> None:
    a, b = draw(0, 5, 2) @ draw(1, 2, 3), draw(2, 5, 1)

    def solve(a: Tensor, b: Tensor) -> Any:
        return tuple(torch.linalg.lstsq(a, b, driver=driver))

    (x, residuals, rank, singular), expected = jit(solve)(a, b), solve(a, b)
    close(x, expected[0])
    close((rank, singular), (expected[2], expected[3]))
    assert rank == 2 and residuals.isnan().all()  # torch: an empty tensor


def test_lstsq_by_rcond(plain_backend: None) -> None:
    a, b = torch.diag(torch.tensor([1.0, 0.1, 0.01])).double(), torch.ones(3, 1).double()
    run = jit(lambda a, b: torch.linalg.lstsq(a, b, rcond=0.05).solution)
    close(run(a, b), torch.linalg.lstsq(a, b, rcond=0.05).solution)


def test_the_derivative_of_lstsq(plain_backend: None) -> None:
    a, b = draw(0, 5, 3), draw(1, 5, 2)

    def loss(a: Tensor) -> Tensor:
        return torch.linalg.lstsq(a, b).solution.sin().sum()

    close(jit(grad(loss))(a), grad(loss)(a))


@pytest.mark.slow
def test_they_compile() -> None:
    def fn(a: Tensor, b: Tensor, x: Tensor) -> Any:
        return torch.linalg.lstsq(a, b).solution, torch.bincount(x, minlength=4)

    args = draw(0, 5, 3), draw(1, 5, 2), torch.tensor([1, 2, 1])
    close(jit(fn, strict=True)(*args), fn(*args))
