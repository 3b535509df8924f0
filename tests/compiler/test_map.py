"""`map` equals `jax.lax.map` with and without `batch_size`, and its derivatives those of `vmap`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import fdl
from fdl import jit, tree


def dynamo(f: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, backend="eager", fullgraph=True)


RUNS: dict[str, Callable[..., Any]] = {"eager": lambda f: f, "jit": jit, "torch.compile": dynamo}
SIZES = (None, 1, 2, 3, 7, 10)
sizes = pytest.mark.parametrize("batch_size", SIZES)

# From a row to a tree, with the operations that torch and JAX share.
FORMS: dict[str, Callable[[Any], Any]] = {
    "tree": lambda x: {"a": x["a"] @ x["a"].T, "b": (x["b"] * 2, x["a"].sum())},
    "None": lambda x: (x["b"] + 1, None, {"y": None}),
    "the row": lambda x: x,
}


def inputs(rows: int) -> dict[str, Any]:
    a = np.linspace(-1, 1, rows * 6, dtype=np.float32).reshape(rows, 2, 3)
    return {"a": a, "b": np.arange(rows, dtype=np.int32), "none": None}


def as_torch(xs: dict[str, Any]) -> dict[str, Any]:
    return {name: None if x is None else torch.from_numpy(x) for name, x in xs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@sizes
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("name", FORMS)
def test_equals_jax(
    name: str, rows: int, batch_size: int | None, run: str, plain_backend: None
) -> None:
    jax = pytest.importorskip("jax")
    xs = inputs(rows)
    expected = jax.lax.map(FORMS[name], xs, batch_size=batch_size)
    got = RUNS[run](lambda xs: fdl.map(FORMS[name], xs, batch_size=batch_size))(as_torch(xs))
    expected_leaves, structure = jax.tree.flatten(expected)
    got_leaves, got_structure = jax.tree.flatten(got, is_leaf=lambda x: isinstance(x, Tensor))
    assert got_structure == structure
    for x, y in zip(got_leaves, expected_leaves, strict=True):
        assert x.numpy().dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-6, atol=1e-6)


X = torch.linspace(-1, 2, 14, dtype=torch.float64).view(7, 2)
W = torch.tensor([0.3, -0.7], dtype=torch.float64)


@sizes
def test_derivatives_equal_those_of_vmap(batch_size: int | None) -> None:
    def total(mapped: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda x, w: (mapped(lambda r: (r * w).sin().sum(), x) ** 2).sum()

    def by_map(f: Callable[..., Any], xs: Tensor) -> Any:
        return fdl.map(f, xs, batch_size=batch_size)

    def by_vmap(f: Callable[..., Any], xs: Tensor) -> Any:
        return vmap(f)(xs)

    for transformation in (
        lambda f: grad(f, (0, 1))(X, W),
        lambda f: jvp(f, (X, W), (X.cos(), W.cos())),
        lambda f: vmap(f, (None, 0))(X, torch.stack([W, -W, 2 * W])),
        lambda f: vmap(grad(f), (None, 0))(X, torch.stack([W, -W, 2 * W])),
    ):
        got, expected = transformation(total(by_map)), transformation(total(by_vmap))
        assert tree.diff(expected, got, rtol=1e-12, atol=1e-14) == []


def test_an_infinite_derivative_of_the_last_row_stays_infinite() -> None:
    """The copies that fill the last batch have none."""
    x = torch.tensor([1.0, 4.0, 0.0])
    got = grad(lambda x: fdl.map(torch.sqrt, x, batch_size=2).sum())(x)
    assert torch.equal(got, torch.tensor([0.5, 0.25, torch.inf]))


@pytest.mark.parametrize("batch_size, seen", [(None, [()] * 7), (3, [(3,)] * 3), (9, [(7,)])])
def test_no_more_rows_at_once_than_asked_for(
    batch_size: int | None, seen: list[tuple[int, ...]]
) -> None:
    shapes = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
            return Square.forward(x), 0

    xs = torch.arange(7.0)
    got = fdl.map(lambda x: Square.apply(x), xs, batch_size=batch_size)
    assert torch.equal(got, xs**2) and shapes == seen


@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_a_function_that_closes_over_the_rows_compiles_to_one_program(
    batch_size: int | None,
) -> None:
    def f(x: Tensor) -> Tensor:
        return fdl.map(lambda row: (x.sum(0) * row).sin().sum(), x, batch_size=batch_size)

    x = torch.linspace(-1, 1, 6000).view(6, 1000)
    jitted = jit(f, strict=True)
    torch.testing.assert_close(jitted(x), vmap(lambda row: (x.sum(0) * row).sin().sum())(x))
    (report,) = jitted.report()
    assert report.route == "one program"


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "batch_size 0": (lambda: fdl.map(torch.sin, X, batch_size=0), ValueError, "batch_size must be"),
    "a float": (lambda: fdl.map(torch.sin, X, batch_size=2.0), TypeError, "batch_size must be an"),  # type: ignore[arg-type]
    "two lengths": (
        lambda: fdl.map(lambda x: x, {"a": X, "b": X[:2]}),
        ValueError,
        r"xs needs one common first axis, got shapes \{'a': \[7, 2\], 'b': \[2, 2\]\}",
    ),
    "a scalar": (lambda: fdl.map(torch.sin, X[0, 0]), ValueError, "one common first axis"),
    "no leaves": (lambda: fdl.map(lambda x: W, None), ValueError, r"first axis, got shapes \{\}"),
    "a list": (lambda: fdl.map(torch.sin, {"a": 1.0}), TypeError, "(?s)every leaf of xs.*a: 1.0"),
    "no tensor": (
        lambda: fdl.map(lambda x: {"a": 1.0}, X),
        TypeError,
        "(?s)every leaf of the result of f.*a: 1.0",
    ),
    "no tensor, in batches": (
        lambda: fdl.map(lambda x: {"a": 1.0}, X, batch_size=2),
        TypeError,
        "(?s)every leaf of the result of f.*a: 1.0",
    ),
}


@pytest.mark.parametrize("call, error, text", ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=rf"^map: .*{text}" if "(?s)" not in text else text):
        call()
