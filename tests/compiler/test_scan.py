"""`scan` as users of `jax.lax.scan` write it: with None, without steps; and in `torch.compile`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

import fdl
from fdl import jit, scan, tree

X = torch.arange(6.0).view(3, 2)


def dynamo(f: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, backend="eager", fullgraph=True)


RUNS: dict[str, Callable[..., Any]] = {"eager": lambda f: f, "jit": jit, "torch.compile": dynamo}
runs = pytest.mark.parametrize("run", RUNS)

# (carry, x) -> (carry, y), init, and whether there are xs; written for torch and JAX alike.
FORMS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any], bool]] = {
    "no y": (lambda c, x: (c + x.sum(), None), lambda one: one, True),
    "no xs": (lambda c, x: (c * 2, c), lambda one: one, False),
    "no xs, no y": (lambda c, x: (c * 2, None), lambda one: one, False),
    "no carry": (lambda c, x: (None, x * 2), lambda one: None, True),
    "None inside": (
        lambda c, x: ({"a": c["a"] + x.sum(), "b": None}, (x, None, {"y": None})),
        lambda one: {"a": one, "b": None},
        True,
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("real_loops")
@runs
@pytest.mark.parametrize("steps", [0, 1, 3, 20])
@pytest.mark.parametrize("name", FORMS)
def test_none_stands_where_it_does_in_jax(
    name: str, steps: int, run: str, plain_backend: None
) -> None:
    jax = pytest.importorskip("jax")
    f, make, has_xs = FORMS[name]
    rows = np.arange(2.0 * steps, dtype=np.float32).reshape(steps, 2)
    expected = jax.lax.scan(
        f, make(jax.numpy.float32(1)), jax.numpy.asarray(rows) if has_xs else None, length=steps
    )

    def fn(one: Tensor, xs: Tensor) -> Any:
        return scan(f, make(one), xs if has_xs else None, length=steps)

    got = RUNS[run](fn)(torch.tensor(1.0), torch.from_numpy(rows))
    expected_leaves, structure = jax.tree.flatten(expected)
    got_leaves, got_structure = jax.tree.flatten(got, is_leaf=lambda x: isinstance(x, Tensor))
    assert got_structure == structure
    for x, y in zip(got_leaves, expected_leaves, strict=True):
        np.testing.assert_array_equal(x.numpy(), np.asarray(y))


def body(c: Tensor, x: dict[str, Tensor]) -> Any:
    return c * x["a"].sum(), {"y": (c, x["b"] > 0), "row": x["a"].double()}


@pytest.mark.slow
@runs
def test_a_scan_of_no_steps_returns_the_first_carry_and_empty_leaves(
    run: str, plain_backend: None
) -> None:
    xs = {"a": torch.ones(0, 2), "b": torch.ones(0, 3, dtype=torch.int64)}
    empty = {
        "y": (torch.ones(0), torch.ones(0, 3, dtype=torch.bool)),
        "row": torch.ones(0, 2, dtype=torch.float64),
    }
    two, way = torch.tensor(2.0), RUNS[run]
    assert tree.diff((two, empty), way(lambda c, xs: scan(body, c, xs))(two, xs)) == []
    got = way(lambda c, xs: grad(lambda c: scan(body, c * c, xs)[0])(c))(two, xs)
    assert got == 4
    got = way(lambda c, xs: vmap(lambda c: scan(body, c, xs))(c))(torch.ones(5), xs)
    expected = tree.map(lambda leaf: leaf.expand(5, *leaf.shape), empty)
    assert tree.diff((torch.ones(5), expected), got) == []
    got = way(lambda c, xs: jvp(lambda c: scan(body, c * c, xs)[0], (c,), (c,)))(two, xs)
    assert got == (4, 8)


def test_a_scan_of_no_steps_has_no_derivative_through_its_row_of_zeros() -> None:
    """The body has no derivative at zero, but it never runs."""
    w = torch.tensor(1.0, requires_grad=True)
    carry, ys = scan(lambda c, x: (c, (w * x).log() / x), w * 3, torch.ones(0))
    carry.backward()
    assert w.grad == 3 and ys.shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("needs", ["", "w", "c", "x", "wcx"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_torch_compile_of_a_scan_with_its_backward_pass(fullgraph: bool, needs: str) -> None:
    """Inductor's gradients of torch's operator are wrong, and without fullgraph it refuses it."""
    torch._dynamo.reset()
    args = [torch.tensor([0.5, -1.5]), torch.tensor([0.3, 0.2]), X.clone()]
    wanted = [arg.requires_grad_() for name, arg in zip("wcx", args, strict=True) if name in needs]

    def f(w: Tensor, c: Tensor, x: Tensor) -> Tensor:
        last, ys = scan(lambda c, row: ((c * w + row).sin(), c * 2), c, x)
        return last.sum() + ys.sum()

    got = torch.compile(f, fullgraph=fullgraph)(*args)
    torch.testing.assert_close(got, f(*args))
    if wanted:
        expected = torch.autograd.grad(f(*args), wanted)
        torch.testing.assert_close(torch.autograd.grad(got, wanted), expected)


@pytest.mark.slow
def test_without_gradients_torch_compile_has_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of steps; with gradients the steps are unrolled."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    for w in (torch.ones(2), torch.ones(2, requires_grad=True)):
        torch._dynamo.reset()
        f = torch.compile(
            lambda x, w=w: scan(lambda c, row: (c + row * w, None), x[0], x),
            backend=backend,
            fullgraph=True,
        )
        f(torch.ones(50, 2))
    sizes = [len(graph.graph.nodes) for graph in graphs]
    assert sizes[0] < 20 and sizes[1] > 100


@runs
def test_reverse_starts_from_the_last_row(run: str, plain_backend: None) -> None:
    jax = pytest.importorskip("jax")

    def f(c: Any, x: Any) -> Any:
        return c * 2 + x.sum(), (c, x * c)

    expected = jax.lax.scan(f, jax.numpy.float32(1), jax.numpy.asarray(X), reverse=True)
    actual = RUNS[run](lambda c, xs: scan(f, c, xs, reverse=True))(torch.tensor(1.0), X)
    for a, b in zip(tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a.numpy(), np.asarray(b))


def test_unrolled_steps_may_return_a_carry_of_another_layout(plain_backend: None) -> None:
    fn = jit(lambda c, xs: scan(lambda c, x: (c.T * x, c.reshape(4)), c, xs), strict=True)
    args = torch.arange(4.0).view(2, 2), torch.linspace(0.5, 1, 20)
    with fdl.disable_jit():
        expected = fn(*args)
    for a, b in zip(tree.leaves(fn(*args)), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_a_pullback_in_torch_compile() -> None:
    """Made in the body it is right; made outside, Dynamo refuses it (as docs/compiling.md says)."""
    x = torch.linspace(0, 1, 3)

    def made_outside(x: Tensor) -> Any:
        _, pull = vjp(torch.sin, x)
        return scan(lambda c, _: (pull(c)[0], c.sum()), torch.ones_like(x), length=3)

    def made_inside(x: Tensor) -> Any:
        return scan(
            lambda c, _: (vjp(torch.sin, x)[1](c)[0], c.sum()), torch.ones_like(x), length=3
        )

    expected = x.cos() ** 3
    torch.testing.assert_close(made_outside(x)[0], expected)
    torch.testing.assert_close(dynamo(made_inside)(x)[0], expected)
    with pytest.raises(AssertionError, match="Expected FakeTensor"):
        dynamo(made_outside)(x)
