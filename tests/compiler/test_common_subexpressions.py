"""Equal values are computed once, and nothing else changes. Oracle: eager torch."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from fdl import jit, scan, tree
from fdl._compiler._decompose import decompose
from fdl._compiler._graph import copy_graph
from fdl._compiler._passes import rewrite
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace
from fdl._torch_compat import RELEASE
from fdl.transforms import checkpoint

aten = torch.ops.aten
X, W = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4), torch.eye(4).double() + 0.5


def operations(fn: Any, *args: Any) -> Counter[Any]:
    """Count the operations of the program for `fn`, by their names."""
    leaves, spec = flatten((args, {}))
    traced = decompose(trace(fn, leaves, spec))
    graph = copy_graph(traced.graph)
    rewrite(graph, on_cpu=False)
    graph.graph.lint()
    result = graph(*leaves, *traced.constants)
    for got, expected in zip(result, tree.leaves(fn(*args)), strict=True):
        torch.testing.assert_close(got, expected)
    return Counter(getattr(node.target, "_opname", "") for node in graph.graph.nodes)


def test_derivatives_share_the_products_of_the_function() -> None:
    def layer(x: Tensor) -> Tensor:
        return torch.tanh(x @ W)

    def slopes(x: Tensor) -> Any:
        ones = torch.ones_like(x)
        first = jvp(layer, (x,), (ones,))
        second = jvp(lambda x: jvp(layer, (x,), (ones,))[1], (x,), (x,))[1]
        return layer(x), first, second, grad(lambda x: layer(x).sum())(x)

    # x W; the tangents 1 W and x W, which is the first; and the gradient.
    count = operations(slopes, X)
    assert count["mm"] == 3 and count["tanh"] == 1

    def residual(w: Tensor, x: Tensor) -> Tensor:
        u = lambda x: torch.tanh(torch.tanh(x @ w) @ w).sum()  # noqa: E731
        return u(x) + jvp(u, (x,), (torch.ones_like(x),))[1]

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return vmap(residual, (None, 0))(w, x).square().mean()

    assert operations(grad(loss), W, X)["tanh"] == 2


def test_numbers_of_another_type_or_sign_differ() -> None:
    def products(x: Tensor) -> Any:
        whole = x.to(torch.int64)
        return x * 0.0, x * -0.0, whole * 1, whole * True, whole * 1.0, x * float("nan"), x / -0.0

    for got, expected in zip(jit(products)(X), products(X), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit(), expected.signbit()) and got.dtype == expected.dtype


def equal_results(x: Tensor) -> Any:
    def halves() -> Any:
        return (x + 1).split(2, -1)

    return x + 1, x + 1, (x + 1)[1:], (x + 1).T, halves()[0], halves()[0], halves()[1], x * 1, x * 1


def memory(leaves: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(leaves)}


@pytest.mark.slow
def test_results_do_not_share_memory() -> None:
    def both(x: Tensor) -> Any:
        return equal_results(x), scan(lambda c, _: (c * 2, (c * 2, equal_results(c))), x, length=3)

    results = jit(both, strict=True)(X)
    torch.testing.assert_close(results, both(X))
    of_function, (carry, (ys, _)) = results
    assert len(memory([X, of_function, carry, ys])) == 1 + len(of_function) + 2


@torch.library.custom_op("fdl_tests::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    CALLS.append(1)
    return x.clone()


@counted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


CALLS: list[int] = []


def test_operations_of_users_run_as_often_as_they_are_called() -> None:
    assert operations(lambda x: counted(x) + counted(x), X)["counted"] == 2


def test_a_checkpoint_is_computed_again() -> None:
    def block(x: Tensor) -> Tensor:
        return torch.sin(torch.sin(x))

    def twice(f: Any) -> Any:
        return grad(lambda x: f(f(x)).sum())

    # Without it the derivatives read the first three values; with it, each block has its inner one
    # computed again, and the first block has been computed whole.
    assert operations(twice(block), X)["sin"] == 3
    assert operations(twice(checkpoint(block)), X)["sin"] == 2 + 1 + 1


def test_indices_are_checked_once_and_constant_ones_while_compiling() -> None:
    rows, labels = torch.arange(3), torch.tensor([1, 0, 3])

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(x, labels) + F.cross_entropy(x, torch.arange(3))
        return each - x[torch.arange(3), labels].sum() + x[torch.arange(3) - 3].sum()

    # Labels of the loss and of its derivative; labels as an index, which may be negative.
    count = operations(lambda x, labels: (loss(x, labels), grad(loss)(x, labels)), X, labels)
    if RELEASE >= (2, 12):  # whose derivative of cross entropy is made of other operations
        assert count["in_range"] == 2
    # Closed-over indices may have other values at the next call; others are wrong at each.
    assert operations(lambda x: x[rows], X)["in_range"] == 1
    with pytest.raises(IndexError, match="-3 <= index < 3"):
        jit(lambda x: x[torch.arange(4)])(X)
