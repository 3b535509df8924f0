"""Zero tangents and products with zeros: NaN, ∞ and −0 as in eager torch, without the products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from fdl import jit, tree
from fdl._compiler._decompose import decompose
from fdl._compiler._graph import copy_graph
from fdl._compiler._passes import rewrite
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace

INF, NAN = float("inf"), float("nan")
C = torch.tensor([[INF, 1.0, -0.0], [2.0, NAN, 3.0], [-INF, 0.0, -1.0]])  # has no tangent
W = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.0, 3.0], [1.0, 1.0, 1.0]])

# Functions of x, where the others are constants.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "x * c": lambda x: x * C,
    "c * x": lambda x: C * x,
    "x / c": lambda x: x / C,
    "c / x": lambda x: C / x,
    "x + c": lambda x: -x + C,
    "c - x": lambda x: C - x,
    "x - c": lambda x: x - C,
    "scaled sum": lambda x: torch.add(x, C, alpha=3) - torch.sub(C, x, alpha=2),
    "broadcast": lambda x: x[:1] * C[:, :1] + C[0],
    "number": lambda x: x * 2 + 1 - x / 3,
    "integer": lambda x: x * torch.arange(3) + torch.arange(3),
    "float64": lambda x: x * C.double(),
    "product": lambda x: x @ W,
    "c product": lambda x: x @ C,
    "product c": lambda x: C @ x,
    "addmm": lambda x: torch.addmm(C[0], x, W),
    "linear": lambda x: F.linear(x, C, W[0]),
    "batched": lambda x: torch.bmm(x.expand(2, 3, 3), torch.stack([W, C])),
    "vector": lambda x: C @ x[0] + x @ C[0],
    "einsum": lambda x: torch.einsum("ij,jk->ki", x, C),
    "views": lambda x: (torch.stack([x.T, C])[:, 1:] * C[1]).flatten(1),
    "layers": lambda x: torch.tanh(torch.tanh(x @ W + W[0]) @ W) @ C,
}


def first(f: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda x, t: jvp(f, (x,), (t,))


def second(f: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda x, t: jvp(lambda x: jvp(f, (x,), (t,))[1], (x,), (t,))


def batched(f: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda x, t: vmap(second(f))(torch.stack([x, x + 1]), torch.stack([t, t]))


def backward(f: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda x, t: grad(lambda x: second(f)(x, t)[1].sum())(x)


WAYS = {"first": first, "second": second, "batched": batched, "backward": backward}


def everything(way: str) -> Callable[..., Any]:
    return lambda x, t: {name: WAYS[way](f)(x, t) for name, f in FUNCTIONS.items()}


X = torch.tensor([[1.0, -2.0, INF], [0.0, -0.0, 4.0], [NAN, 1.0, 0.5]])
TANGENTS = torch.tensor([[1.0, -0.0, 2.0], [-0.0, 0.0, 1.0], [1.0, 1.0, -1.0]])


def check(way: str) -> None:
    fn = everything(way)
    got, expected = jit(fn, strict=True)(X, TANGENTS), fn(X, TANGENTS)
    for name in FUNCTIONS:
        for a, b in zip(tree.leaves(got[name]), tree.leaves(expected[name]), strict=True):
            torch.testing.assert_close(
                a, b, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
            )
            zero = b == 0
            if way == "first" and name not in PRODUCTS:  # of a sum of zeros the sign may differ
                assert torch.equal(a.signbit()[zero], b.signbit()[zero]), name


PRODUCTS = ("product", "c product", "product c", "addmm", "linear", "batched", "vector", "einsum")
PRODUCTS += ("layers",)


@pytest.mark.parametrize("way", WAYS)
def test_traced(way: str, plain_backend: None) -> None:
    check(way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_compiled(way: str) -> None:
    check(way)


def test_no_product_with_zeros_is_left() -> None:
    def tangent(x: Tensor, w: Tensor) -> Tensor:
        return jvp(lambda x: torch.tanh(torch.tanh(x @ w) @ w), (x,), (x,))[1]

    leaves, spec = flatten(((X, W), {}))
    traced = decompose(trace(tangent, leaves, spec))
    graph = copy_graph(traced.graph)
    rewrite(graph, on_cpu=False)
    # x w, which is also its tangent; h w; and its tangent.
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 3


def test_a_product_with_zeros_has_memory_of_its_own():
    for fn in (lambda a: torch.zeros(3, 2) @ a, lambda a: a @ torch.zeros(4, 3)):
        result = jit(fn)(torch.ones(2, 4))
        assert result.is_contiguous() and result.add_(1).unique().tolist() == [1.0]
