"""Norms and sums of outer products are computed without the products.

Oracle: the function itself, in float64.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fdl import jit, transforms
from fdl._compiler._outer_products import reduce_outer_products

N, ROWS, COLUMNS = 5, 3, 4


def arguments() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, ROWS, 1), (N, 1, COLUMNS), (N, 1, 1)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def largest(module: GraphModule) -> int:
    """Return the numbers of the largest value that is computed."""
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return max(node.meta["val"].numel() for node in nodes)


def norm(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    outer = a * b
    return (outer * outer).sum((1, 2))


def norm_in_other_dtype(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    convert = torch.ops.prims.convert_element_type.default
    outer = convert(a * b, torch.float32).view(N, ROWS, COLUMNS)
    return (outer * outer).sum((2, 1))


def norm_with_axes(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    outer = a * b
    return (outer * outer).sum((-2, -1), keepdim=True)


def clipped(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    outer = b * a
    scale = 1 / (outer * outer).sum((1, 2)).sqrt()
    return (torch.where(w > 0, outer, 0) * scale.view(-1, 1, 1)).sum(0)


REDUCED: dict[str, Callable[..., Tensor]] = {
    "norm": norm,
    "norm, rounded first": norm_in_other_dtype,
    "norm, axes kept": norm_with_axes,
    "sum": lambda a, b, w: (a * b).sum(0),
    "weighted": lambda a, b, w: (w * (a * b)).sum(0),
    "masked": lambda a, b, w: torch.where(w > 0, a * b, 0).sum(0),
    "weighted, then masked": lambda a, b, w: torch.where(w > 0, a * b * w, 0).sum(0),
    "clipped": clipped,
}
KEPT: dict[str, Callable[..., Tensor]] = {
    "the product is a result": lambda a, b, w: a * b,
    "a function of it": lambda a, b, w: (a * b).exp().sum(0),
    "other squares": lambda a, b, w: ((a * b) * (a * b + 1)).sum((1, 2)),
    "sum of some axes": lambda a, b, w: (a * b).sum((0, 1)),
    "weights of its entries": lambda a, b, w: ((a * b) * a).sum(0),
    "another value where masked": lambda a, b, w: torch.where(w > 0, a * b, 1).sum(0),
    "masked by its entries": lambda a, b, w: torch.where(b > 0, a * b, 0).sum(0),
}


def rewritten(fn: Callable[..., Tensor], args: list[Tensor]) -> GraphModule:
    module = make_fx(fn, tracing_mode="fake")(*args)
    with module.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode:
        reduce_outer_products(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@pytest.mark.parametrize("name", REDUCED)
def test_a_product_is_not_computed(name: str) -> None:
    args = arguments()
    module = rewritten(REDUCED[name], args)
    tolerance = 1e-6 if "rounded" in name else 1e-13
    expected = REDUCED[name](*args)
    torch.testing.assert_close(module(*args).double(), expected.double(), rtol=tolerance, atol=1e-6)
    assert module(*args).shape == expected.shape
    assert largest(module) < N * ROWS * COLUMNS


@pytest.mark.parametrize("name", KEPT)
def test_a_product_that_is_read_stays(name: str) -> None:
    args = arguments()
    module = rewritten(KEPT[name], args)
    assert torch.equal(module(*args), KEPT[name](*args))


def test_a_masked_example_may_be_nan() -> None:
    a, b, w = arguments()
    a[1], b[2], w[1], w[2] = torch.nan, torch.inf, -1, -1
    for name in ("masked", "weighted, then masked"):
        total = rewritten(REDUCED[name], [a, b, w])(a, b, w)
        torch.testing.assert_close(total, REDUCED[name](a, b, w), rtol=1e-13, atol=1e-13)
        assert total.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_clipped_gradients_of_a_program(bad: float) -> None:
    generator = torch.Generator().manual_seed(1)
    params = {
        "w": torch.randn(6, 5, generator=generator),
        "b": torch.randn(5, generator=generator),
        "v": torch.randn(5, 3, generator=generator),
    }
    x, y = torch.randn(8, 6, generator=generator), torch.arange(8) % 3
    x[3] = bad

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, ...], **_: object) -> Tensor:
        hidden = torch.tanh(batch[0] @ params["w"] + params["b"])
        return torch.nn.functional.cross_entropy(hidden @ params["v"], batch[1])

    clip = transforms.clipped_grad_sum(loss, max_norm=0.1)
    norms = transforms.per_sample_norms(loss)
    got = jit(lambda *args: (clip(*args), norms(*args)), strict=True)(params, (x, y))
    expected = clip(params, (x, y)), norms(params, (x, y))
    for name, g in expected[0].items():
        torch.testing.assert_close(got[0][name], g, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-7, equal_nan=True)
