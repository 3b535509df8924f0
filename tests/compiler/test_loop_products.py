"""Products that do not depend on the step before are computed once for all steps of a loop.

Oracle: eager scans in float64, and the rewritten graph itself, run by torch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.nn import functional as F

import fdl
from fdl import jit
from fdl._compiler import _loop_products
from fdl._compiler._decompose import decompose
from fdl._compiler._graph import LOOP, results_of
from fdl._compiler._loop_products import move_products_out
from fdl._compiler._passes import rewrite
from fdl._compiler._products import PRODUCT
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace

STEPS, BATCH, INPUTS, UNITS = 12, 16, 6, 20
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) / 2


PARAMS = {
    "wi": randn(3 * UNITS, INPUTS, seed=1),
    "bi": randn(3 * UNITS, seed=2),
    "wh": randn(3 * UNITS, UNITS, seed=3),
    "bh": randn(3 * UNITS, seed=4),
}
X = randn(STEPS, BATCH, INPUTS, seed=5)
H = randn(BATCH, UNITS, seed=6)


def gru(params: dict[str, Tensor], x: Tensor, h: Tensor) -> Any:
    def cell(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        r, z, n = F.linear(row, params["wi"], params["bi"]).chunk(3, 1)
        hr, hz, hn = F.linear(h, params["wh"], params["bh"]).chunk(3, 1)
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + r * hn) + z * h
        return h, h

    return fdl.scan(cell, h, x)


def loss(params: dict[str, Tensor], x: Tensor, h: Tensor) -> Tensor:
    last, all_h = gru(params, x, h)
    return (last**2).sum() + all_h.sin().sum()


def products(module: Any, operations: tuple[Any, ...] = PRODUCTS) -> tuple[int, int]:
    """Count the products of a graph, and those in the bodies of its loops."""
    outside = [z for z in module.graph.nodes if z.target in operations]
    loops = module.graph.find_nodes(op="call_function", target=LOOP)
    bodies = [module.get_submodule(loop.args[0].target) for loop in loops]
    return len(outside), sum(z.target in operations for body in bodies for z in body.graph.nodes)


def rewritten(fn: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Rewrite the traced graph, run it, and count its products."""
    leaves, spec = flatten((args, {}))
    traced = decompose(trace(fn, leaves, spec, unroll=False))
    move_products_out(traced.graph)
    traced.graph.recompile()
    traced.graph.graph.lint()
    for loop in traced.graph.graph.find_nodes(op="call_function", target=LOOP):
        body = traced.graph.get_submodule(loop.args[0].target)
        body.graph.lint()
        given = [z.meta["val"].shape for z in results_of(body.graph)]
        n = len(loop.args[1])
        steps = loop.args[2][0].meta["val"].shape[0]
        known = [x.shape for x in loop.meta["val"]]
        assert known == given[:n] + [torch.Size([steps, *shape]) for shape in given[n:]]
    results = traced.graph(*leaves, *traced.constants)
    expected = [x for x in pytree.tree_leaves(fn(*args)) if x is not None]
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-12)
    return products(traced.graph)


def every_gradient(params: dict[str, Tensor], x: Tensor, h: Tensor) -> Any:
    return grad(loss, argnums=(0, 1, 2))(params, x, h)


def twice_used(w: Tensor, x: Tensor, h: Tensor) -> Any:
    """The product is the carry, a y, and is read in the body."""

    def body(h: Tensor, row: Tensor) -> tuple[Tensor, Any]:
        y = row @ w
        return y, (y, (h * y).sum())

    return fdl.scan(body, h, x)


def columns(w: Tensor, x: Tensor) -> Any:
    """Each step multiplies the transpose of its row."""

    def body(carry: Any, row: Tensor) -> tuple[Any, Tensor]:
        total, h = carry
        return (total + row.T @ row, h.sin()), row.T @ w

    return fdl.scan(body, (torch.zeros(INPUTS, INPUTS, dtype=x.dtype), x[0]), x)


def sums_that_are_read(w: Tensor, x: Tensor) -> Any:
    """The sum cannot wait for the end."""

    def body(total: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return total + (row @ w).sum(0), total.sin()

    return fdl.scan(body, torch.zeros(UNITS, dtype=x.dtype), x)


def sum_of_constants(w: Tensor, x: Tensor) -> Any:
    def body(carry: Any, row: Tensor) -> Any:
        total, other = carry
        return (total + w.T @ w, other + row.sum()), None

    return fdl.scan(body, (torch.zeros(UNITS, UNITS, dtype=x.dtype), x[0, 0, 0]), x)


def sums_of_numbers(x: Tensor) -> Any:
    def body(carry: Any, row: Tensor) -> Any:
        total, same, count = carry
        return (total + row.sum(0), same + row.sum(-1, keepdim=True), count + 1), None

    return fdl.scan(body, (x[0], x[1], x[2]), x)


def layer_of_gru(x: Tensor) -> Any:
    """The gradient of torch's linear layer adds in place, outside of the loop."""
    layer = fdl.nn.gru(INPUTS, UNITS)
    params = {k: v.to(x.dtype) for k, v in layer.init(fdl.random.key(0)).items()}
    return grad(lambda p, x: layer.apply(p, x)[0].square().sum())(params, x)


W = randn(INPUTS, UNITS, seed=7)
# name: function, arguments, products outside and inside of loops
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, int]]] = {
    "a forward pass": (gru, (PARAMS, X, H), (1, 1)),
    "every gradient": (every_gradient, (PARAMS, X, H), (4, 2)),
    "gradients of weights": (grad(loss), (PARAMS, X, H), (3, 2)),
    "a product with other uses": (twice_used, (W, X, H), (1, 0)),
    "transposed rows": (columns, (randn(BATCH, 2, seed=8), X), (2, 0)),
    "a sum that is read": (sums_that_are_read, (W, X), (1, 0)),
    "a layer": (layer_of_gru, (X,), (3, 2)),
    "sums of numbers": (sums_of_numbers, (X[:, 0, 0],), (0, 0)),
    "a sum of constants": (sum_of_constants, (W, X), (0, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_case(name: str) -> None:
    fn, args, expected = CASES[name]
    assert rewritten(fn, *args) == expected


OPERATIONS = (*PRODUCTS, PRODUCT, torch.ops.fdl.linear.default)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["a forward pass", "every gradient", "a layer"])
def test_all_passes_together(name: str, dtype: torch.dtype) -> None:
    """No other pass hides the products of a body from this one."""
    fn, args, (_, inside) = CASES[name]
    leaves, spec = flatten((fdl.tree.map(lambda x: x.to(dtype), args), {}))
    module = decompose(trace(fn, leaves, spec, unroll=False)).graph
    rewrite(module, on_cpu=True)
    assert products(module, OPERATIONS)[1] == inside


TRANSFORMED: dict[str, Callable[..., Any]] = {
    "second derivatives": lambda p, x, h: grad(
        lambda p: (grad(lambda h: loss(p, x, h))(h) ** 2).sum()
    )(p),
    "jvp of grad": lambda p, x, h: jvp(lambda x: grad(loss)(p, x, h), (x,), (x,)),
    "vmap over inputs": lambda p, x, h: vmap(grad(loss), in_dims=(None, 0, None))(
        p, torch.stack([x, 2 * x]), h
    ),
    "a loop of loops": lambda p, x, h: fdl.scan(
        lambda p, x: (fdl.tree.map(lambda p, g: p - 0.01 * g, p, grad(loss)(p, x, h)), x.sum()),
        p,
        torch.stack([x, x + 1, x - 1]),
    ),
    "hessian": lambda p, x, h: hessian(lambda h: loss(p, x[:3, :2], h))(h[:2]),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(name: str) -> None:
    fn = TRANSFORMED[name]
    torch.testing.assert_close(
        jit(fn, strict=True)(PARAMS, X, H), fn(PARAMS, X, H), rtol=1e-10, atol=1e-10
    )


def test_a_large_value_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loop_products, "MOST", 0)
    outside, inside = rewritten(gru, PARAMS, X, H)
    assert (outside, inside) == (0, 2)  # a product is larger than the rows
    # The forward loop returns its products anyway; in the backward loop one sum does not fit.
    assert rewritten(every_gradient, PARAMS, X, H) == (3, 3)


TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "a product": lambda row: row.T @ row,
    "a sum": lambda row: row.sum(0),
}


@pytest.mark.parametrize(
    ("name", "dtype", "number"),
    [
        ("a product", torch.float16, 60),
        ("a sum", torch.float16, 1000),
        ("a product", torch.int8, 2),
        ("a product", torch.float32, 1 / 3),
    ],
)
def test_a_sum_in_a_wider_dtype_stays_in_the_loop(
    name: str, dtype: torch.dtype, number: float
) -> None:
    """The term of a step fits into the narrower dtype, and the total does not."""
    wider = {torch.float16: torch.float32, torch.int8: torch.int32, torch.float32: torch.float64}
    x = torch.full((40, 4, 4), number, dtype=dtype)
    init = torch.zeros_like(TERMS[name](x[0]), dtype=wider[dtype])

    def fn(x: Tensor, init: Tensor) -> Any:
        def body(carry: Any, row: Tensor) -> Any:
            total, count = carry
            return (total + TERMS[name](row), count + 1), None

        return fdl.scan(body, (init, torch.zeros(())), x)

    assert rewritten(fn, x, init) == (0, name == "a product")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled(dtype: torch.dtype) -> None:
    args = fdl.tree.map(lambda x: x.to(dtype), (PARAMS, X, H))
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(
        jit(every_gradient, strict=True)(*args),
        every_gradient(*args),
        rtol=tolerance,
        atol=tolerance,
    )
