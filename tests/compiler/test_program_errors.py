"""What fails in a jitted function raises what it raises eagerly: the type and the message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, linalg
from torch.linalg import LinAlgError

import fdl
from fdl._compiler._inductor import HAS_CPP_WRAPPER, raise_python_error
from fdl._compiler._program_errors import check_code, linalg_error, python_error
from tests.support.asserts import assert_equal

GOOD = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
SINGULAR = torch.ones(2, 2, dtype=torch.float64)


def in_loop(x: Tensor) -> Tensor:
    def body(total: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        return total + linalg.cholesky(x - i * torch.eye(2)), i

    return fdl.scan(body, torch.zeros_like(x), torch.arange(3))[0]


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "cholesky": (linalg.cholesky, INDEFINITE),
    "cholesky of a batch": (linalg.cholesky, torch.stack([GOOD, INDEFINITE, INDEFINITE])),
    "cholesky of rows of a batch": (linalg.cholesky, torch.stack([GOOD, INDEFINITE])[:, None]),
    "inv": (linalg.inv, SINGULAR),
    "inv, transposed": (lambda x: linalg.inv(x.T) + 1, SINGULAR),
    "solve": (lambda x: linalg.solve(x, torch.ones_like(x[0])), SINGULAR),
    "vmap": (torch.func.vmap(linalg.cholesky), torch.stack([GOOD, GOOD, INDEFINITE])),
    "grad": (torch.func.grad(lambda x: linalg.cholesky(x).sum()), INDEFINITE),
    "a loop": (in_loop, GOOD),
    "svd, which checks by itself": (linalg.svdvals, torch.full_like(GOOD, torch.nan)),
}


def error_of(fn: Callable[[Tensor], Any], x: Tensor) -> tuple[type, str]:
    with pytest.raises(RuntimeError) as caught:
        fn(x)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_those_of_eager_torch(name: str) -> None:
    """The one of a later call too, whose program is known."""
    fn, bad = FUNCTIONS[name]
    jitted = fdl.jit(fn)
    good = (GOOD + 3 * torch.eye(2)).expand_as(bad).clone()
    assert error_of(jitted, bad) == error_of(fn, bad)
    assert error_of(fn, bad)[0] is LinAlgError
    torch.testing.assert_close(jitted(good), fn(good), rtol=1e-12, atol=1e-12)
    assert error_of(jitted, bad) == error_of(fn, bad)
    assert [report.route for report in jitted.report()] == ["one program"]


def test_an_empty_batch_and_numbers_that_are_not_finite() -> None:
    jitted = fdl.jit(linalg.cholesky)
    assert jitted(torch.ones(0, 2, 2)).shape == (0, 2, 2)
    nan = torch.full([2, 2], torch.nan)
    assert error_of(jitted, nan) == error_of(linalg.cholesky, nan)


def test_a_larger_diagonal_is_tried_where_the_first_fails() -> None:
    """As code for Gaussian processes does."""

    def factor(x: Tensor) -> Tensor:
        for jitter in (0.0, 0.5, 1.5):
            try:
                return cholesky(x + jitter * torch.eye(2))
            except LinAlgError:
                continue
        raise AssertionError

    cholesky = fdl.jit(linalg.cholesky)
    assert_equal(factor(INDEFINITE), linalg.cholesky(INDEFINITE + 1.5 * torch.eye(2)))


def test_an_error_is_made_of_a_message() -> None:
    code = check_code("buf", 3, "linalg.inv", False)
    assert "i < 3" in code and "in linalg.inv" in code
    assert linalg_error("another error") is None
    error = linalg_error("a factorization failed: matrix 2, info 1, one 0, in linalg.inv")
    assert isinstance(error, LinAlgError)
    assert "linalg.inv: (Batch element 2): The diagonal element 1 is zero" in str(error)


KERNELS: dict[str, Callable[[Tensor], Any]] = {
    "masked_scatter": lambda x: x.cos().masked_scatter(x < 9, x[:1]),
    "segment_reduce": lambda x: torch.segment_reduce(x.cos(), "sum", lengths=x[0].long() + 1),
    "histc": lambda x: torch.histc(x / 0, 4),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(x * 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_torch_fails(name: str) -> None:
    fn = KERNELS[name]
    if not HAS_CPP_WRAPPER:  # torch 2.11 calls kernels from Python
        pytest.skip("torch 2.11 prints what is wrong, but does not return it")
    assert error_of(fdl.jit(fn, strict=True), GOOD) == error_of(fn, GOOD)


@pytest.mark.slow
@pytest.mark.parametrize("message", [(), ("numbers must be positive",)], ids=["none", "one"])
def test_an_assertion_fails(message: tuple[str, ...]) -> None:
    def fn(x: Tensor) -> Tensor:
        torch._assert_async((x > 0).all(), *message)
        return x * 2

    jitted = fdl.jit(fn, strict=True)
    assert_equal(jitted(GOOD), fn(GOOD))
    assert error_of(jitted, -GOOD) == error_of(fn, -GOOD)
    in_loop = fdl.jit(lambda x: fdl.scan(lambda c, _: (fn(c - 1), c), x, (), length=3))
    assert error_of(in_loop, GOOD) == error_of(fn, -GOOD)


def test_what_follows_a_message_of_cpp_is_left_out() -> None:
    error = python_error(RuntimeError("too small\nException raised from f at a.cpp:1\nframe #0"))
    assert type(error) is RuntimeError and str(error) == "too small"
    same = ValueError("too small")
    with pytest.raises(ValueError) as caught:
        raise_python_error(same)
    assert caught.value is same


@pytest.mark.slow
def test_a_program_in_a_file_raises_it_too(tmp_path: Path) -> None:
    fdl.export(linalg.cholesky, (GOOD,), tmp_path / "program.pt2")
    program = fdl.load_program(tmp_path / "program.pt2")
    torch.testing.assert_close(program(GOOD), linalg.cholesky(GOOD), rtol=1e-12, atol=0)
    error = error_of(program, INDEFINITE)  # torch 2.11 prints what is wrong, but does not return it
    assert error == error_of(linalg.cholesky, INDEFINITE) or not HAS_CPP_WRAPPER


@pytest.mark.skipif(not HAS_CPP_WRAPPER, reason="torch 2.11 calls kernels from Python")
@pytest.mark.slow
def test_no_headers_of_the_dispatcher_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = GOOD * 1.25
    torch.testing.assert_close(fdl.jit(lambda x: linalg.inv(x) - 0.375)(x), x.inverse() - 0.375)
    (wrapper,) = tmp_path.rglob("*.main.cpp")
    assert "Dispatcher.h" not in wrapper.read_text()
