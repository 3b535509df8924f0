"""Nets of linear layers and attention that are computed block by block equal eager torch.

Oracle: eager torch in float64. The kernels of regions are compiled, the rest of a graph runs in
eager torch (`tests.support.blocks`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch.func import grad, grad_and_value, hessian, jvp, vmap

from fdl import jit, tree
from fdl._compiler import _block_pass
from fdl._compiler._block_product_cost import products_pay
from tests.support.blocks import EVERY, Regions, check
from tests.support.random_sequences import Net, loss_of, nets, problem
from tests.support.soak import repeats

Case = tuple[int, Callable[..., Any], tuple[Any, ...]]  # how many regions at least


def some(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def transformer(params: dict[str, Tensor], x: Tensor, y: Tensor, heads: int = 2) -> Tensor:
    """Return the loss of a layer of attention and one of two linear layers."""
    images, tokens, features = x.shape
    z = F.layer_norm(x, (features,), params["scale"], params["shift"])
    q, k, v = F.linear(z, params["qkv"]).view(images, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    z = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
    x = x + F.linear(z.transpose(1, 2).reshape(x.shape), params["out"])
    z = F.layer_norm(x, (features,))
    x = x + F.linear(F.gelu(F.linear(z, params["up"], params["bias"])), params["down"])
    return F.cross_entropy(F.linear(x.mean(1), params["head"]), y)


def parameters(features: int) -> dict[str, Tensor]:
    shapes = {
        "scale": (features,), "shift": (features,), "qkv": (3 * features, features),
        "out": (features, features), "up": (2 * features, features), "bias": (2 * features,),
        "down": (features, 2 * features), "head": (5, features),
    }  # fmt: skip
    return {name: some(*shape) * 0.3 for name, shape in shapes.items()}


def classes(images: int) -> Tensor:
    return torch.arange(images) % 5


def linear(w: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w).tanh().square().sum()


def recurrent(w: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.transpose(0, 1), w).tanh().sum(0).square().sum()


P, X, Y = parameters(8), some(17, 6, 8), classes(17)
W = some(5, 8)
CASES: dict[str, Case] = {
    "a transformer": (1, grad_and_value(transformer), (P, X, Y)),
    "values of a transformer": (1, transformer, (P, X, Y)),
    "a batch of 10": (1, grad(transformer), (P, X[:10], Y[:10])),
    "a batch of 33": (1, grad(transformer), (P, some(33, 6, 8), classes(33))),
    "one sequence": (0, grad(transformer), (P, X[:1], Y[:1])),
    "no sequence": (0, grad(linear, (0, 1)), (W, X[:0])),
    "one token": (0, grad(transformer), (P, X[:, :1], Y)),
    "one feature": (1, grad(linear, (0, 1)), (W[:, :1], X[..., :1])),
    "one output": (1, grad(linear, (0, 1)), (W[:1], X)),
    "as many sequences as features": (1, grad(linear, (0, 1)), (some(17, 17), some(17, 6, 17))),
    "tokens first": (1, grad(recurrent, (0, 1)), (W, X)),
    "images of patches": (1, grad(linear, (0, 1)), (W, some(11, 2, 3, 8))),
    "a weight that depends on images": (
        1,
        grad(lambda w, x: linear(F.linear(x, w)[:, 0].T @ x[:, 1], x), (0, 1)),
        (W, X),
    ),
    "a weight of each image": (
        1,
        grad(lambda w, x: (F.linear(x, w) @ x[:, :5]).square().sum(), (0, 1)),
        (W, X),
    ),
    "tied weights": (
        1,
        grad(lambda w, x: (F.linear(x, w).relu() @ w).square().sum(), (0, 1)),
        (W, X),
    ),
    "convolution and attention": (
        1,
        grad(lambda w, v, x: linear(w, F.conv1d(x, v, padding=1).relu().transpose(1, 2)), (0, 1)),
        (some(3, 8), some(8, 6, 3), X),
    ),
    "a stack of experts": (
        0,
        grad(lambda w, x: torch.einsum("btd,hdo->bhto", x, w).tanh().square().sum(), (0, 1)),
        (some(3, 8, 5), X),
    ),
    "a population": (0, lambda p, x, y: vmap(grad(transformer), (0, None, None))(p, x, y), (
        tree.map(lambda z: torch.stack([z, z * 0.9, -z]), P), X, Y)),
    "a population with its own batches": (
        0,
        lambda w, x: vmap(grad(linear, (0, 1)))(w, x),
        (some(3, 5, 8), some(3, 17, 6, 8)),
    ),
    "per-sample gradients": (
        0,
        lambda w, x: vmap(lambda x: grad(linear)(w, x[None]))(x),
        (W, X),
    ),
    "jvp": (1, lambda w, x, v: jvp(lambda w: linear(w, x), (w,), (v,)), (W, X, some(5, 8))),
    "hvp": (
        1,
        lambda p, x, y: jvp(lambda p: grad(transformer)(p, x, y), (p,), (p,)),
        (P, X, Y),
    ),
    "hessian": (0, hessian(linear), (W[:2, :3], X[..., :3])),
    "NaN and inf": (
        1,
        lambda w, x: F.softmax(F.linear(x, w), -1) + F.layer_norm(F.linear(x, w), (5,)),
        (W, torch.where(X > 2, torch.nan, torch.where(X < -2, -torch.inf, X))),
    ),
    "float32": (
        1,
        grad_and_value(lambda p, x, y: transformer(tree.map(Tensor.float, p), x.float(), y)),
        (tree.map(Tensor.float, P), X.float(), Y),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_programs(name: str) -> None:
    least, fn, args = CASES[name]
    check(least, fn, *args)


def test_a_step_is_one_region() -> None:
    assert len(check(1, grad(transformer), P, X, Y).sources) == 1


def test_equal_bits_on_repetition() -> None:
    with Regions().used():
        compiled = jit(grad(transformer), strict=True)
        first, again = compiled(P, X, Y), compiled(P, X, Y)
    assert all(torch.equal(first[name], again[name]) for name in first)


# ------------------------------------------------------------------------- what pays


class Counted(Regions):
    """Regions that compute nothing."""

    def run(self, source: str, reads: list[Tensor], *, writes: list[Tensor]) -> None:
        pass


def chosen(fn: Callable[..., Any], *args: Any) -> int:
    """Return how many regions the estimate chooses."""
    with Counted().used() as regions, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_block_pass, "pays", products_pay)
        jit(fn, strict=True)(*args)
    return len(regions.sources)


def mlp(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, w).relu(), v).square().sum()


def attention(images: int) -> int:
    """Return how many regions the estimate chooses for a transformer of 32 features."""
    params = tree.map(Tensor.float, parameters(32))
    fn = grad(lambda p, x, y: transformer(p, x, y, 4))
    return chosen(fn, params, some(images, 24, 32).float(), classes(images))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_small_products_of_sequences_pay(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert attention(128) == 1


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_few_images_do_not_pay(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert attention(6) == 0


@pytest.mark.parametrize("shape", [(64, 784), (64, 24, 512)])
def test_wide_products_do_not_pay(shape: tuple[int, ...]) -> None:
    args = some(256, shape[-1]), some(10, 256), some(*shape)
    assert not chosen(grad(mlp, (0, 1)), *tree.map(Tensor.float, args))


# ------------------------------------------------------------------------- random nets


def check_net(net: Net) -> None:
    check(1, loss_of(net), *problem(net))


@given(nets(4))
@settings(max_examples=3, **EVERY)
def test_a_few_random_nets(net: Net) -> None:
    check_net(net)


@pytest.mark.slow
@given(nets())
@settings(max_examples=repeats(20, 400), **EVERY)
def test_random_nets(net: Net) -> None:
    check_net(net)
