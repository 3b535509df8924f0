"""Convolutional nets that are computed block by block equal eager torch, values and derivatives.

Oracle: eager torch in float64. The kernels of regions are compiled, the rest of a graph runs in
eager torch (`tests.support.blocks`); `test_blocks_programs.py` has whole programs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev, jvp, vmap

from fdl import tree
from tests.support.blocks import check

Case = tuple[int, Callable[..., Any], tuple[Tensor, ...]]  # how many regions at least


def some(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def on(*argnums: int) -> Callable[[Callable[..., Tensor]], Callable[..., Any]]:
    """Return the gradient and value of the sum of squares."""

    def of(fn: Callable[..., Tensor]) -> Callable[..., Any]:
        return grad_and_value(lambda *args: fn(*args).square().sum(), argnums)

    return of


X, W, V = some(11, 3, 9, 9), some(4, 3, 3, 3), some(5, 4, 3, 3)
B, Z = some(4), some(11, 4, 7, 7)
both = on(0, 1)
conv = F.conv2d


def chain(y: Tensor, length: int = 40) -> Tensor:
    for _ in range(length):
        y = (y - y.relu() * 0.1) + y.clamp(max=0.2) * 0.1
    return y


def polynomial(w: Tensor, x: Tensor) -> Tensor:
    y = conv(x, w)
    for _ in range(400):
        y = y * 0.99 + 0.01 * y * y
    return y.tanh()


def own_scatter(w: Tensor, x: Tensor) -> Tensor:
    y = conv(x, w)
    values, indices = F.max_pool2d(y, 2, return_indices=True)
    into = y.new_zeros(11, 4 * 49)
    return into.scatter_add(1, indices.flatten(1), values.tanh().flatten(1)).view(y.shape)


def activations(w: Tensor, v: Tensor, x: Tensor) -> Any:
    y = conv(x, w)
    z = y.relu()
    more = (F.max_pool2d(y, 2), conv(z, v), y.flatten(1), y[:, 1], y.transpose(2, 3))
    return y, z, z, y > 0, (y > 0).double(), (y > 0).float(), *more


def in_place(w: Tensor, x: Tensor) -> Any:
    y = conv(x, w)
    return y.relu_().add_(1).mul_(y.sigmoid()), y


def deeper(w: Tensor, v: Tensor, b: Tensor, x: Tensor) -> Tensor:
    y = F.max_pool2d(conv(x, w, b, padding=1).relu(), 2)
    y = F.batch_norm(y, None, None, training=True)
    y = torch.cat([y, y.tanh()], 1)[:, 2:6]
    return F.avg_pool2d(conv(y, v).sigmoid(), 2).flatten(1)


def two_dtypes(w: Tensor, v: Tensor, x: Tensor) -> Any:
    fn = on(0, 1)(lambda w, v: conv(conv(x, w).relu().float(), v.float()).double())
    return tree.map(Tensor.float, fn(w, v))  # rounded as float32


def on_mask(fn: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Use a mask that depends on activations."""
    return on(0)(lambda w, x: (lambda y: torch.where(fn(y), y, 0.1 * y))(conv(x, w)))


def moments(axes: Any, **options: Any) -> Callable[..., Any]:
    return lambda w, x: torch.var_mean(conv(x, w), axes, **options)


def population(w: Tensor, x: Tensor) -> Tensor:
    return vmap(grad(lambda w: F.max_pool2d(conv(x, w), 2).relu().square().sum()))(w)


def loss(w: Tensor, x: Tensor) -> Tensor:
    return F.avg_pool2d(conv(x, w), 2).tanh().square().sum()


LAST = torch.channels_last
CASES: dict[str, Case] = {
    "a deeper net": (2, on(0, 1, 2)(deeper), (W, V, B, X)),
    "only the weights": (1, grad_and_value(lambda w, x: conv(x, w).sum()), (W, X)),
    "only the input": (1, grad_and_value(lambda x, w: conv(x, w).sum()), (X, W)),
    "only the bias": (1, on(0)(lambda b, w, x: conv(x, w, b)), (B, W, X)),
    "a frozen layer": (1, on(0)(lambda v, w, x: conv(conv(x, w).relu(), v)), (V, W, X)),
    "the last is frozen": (1, on(0)(lambda w, v, x: conv(conv(x, w).relu(), v)), (W, V, X)),
    "no image": (0, both(lambda w, x: conv(x, w).relu()), (W, X[:0])),
    "no image in a pool": (0, both(lambda w, x: F.max_pool2d(conv(x, w), 2)), (W, X[:0])),
    "one image": (0, both(lambda w, x: conv(x, w).relu()), (W, X[:1])),
    "two images": (1, both(lambda w, x: conv(x, w).relu()), (W, X[:2])),
    "one image's mean": (
        0,
        both(lambda w, x: (lambda y: y - y.mean(0, keepdim=True))(conv(x, w))),
        (W, X[:1]),
    ),
    "images of one pixel": (
        1,
        both(lambda w, x: conv(x, w).relu()),
        (some(4, 3, 1, 1), X[..., :1, :1]),
    ),
    "batch norm of one pixel": (
        1,
        both(lambda w, x: F.batch_norm(conv(x, w), None, None, training=True)),
        (W, X[..., :3, :3]),
    ),
    "a weight that depends on images": (
        0,
        both(lambda h, x: conv(x, conv(h, V, padding=1).relu()[:, :3, :3, :3])),
        (some(8, 4, 5, 5), some(8, 3, 7, 7)),
    ),
    "a weight for each image": (
        0,
        both(lambda h, x: conv(x, h.sigmoid().view(8, 3, 3, 3))),
        (some(8, 27), some(8, 3, 7, 7)),
    ),
    "images as weights": (1, both(lambda w, x: conv(x, conv(x, w)[:, :3, :3, :3])), (W, X)),
    "as many outputs as images": (1, both(lambda w, x: conv(x, w)), (some(11, 3, 3, 3), X)),
    "a standardised weight": (
        1,
        both(lambda w, x: conv(x, (w - w.mean((1, 2, 3), True)) / w.std((1, 2, 3), keepdim=True))),
        (some(11, 3, 3, 3), X),
    ),
    "tied weights": (1, both(lambda w, x: conv(conv(x, w).relu()[:, :3], w)), (W, X)),
    "an input of two": (
        1,
        on(0, 1, 2)(lambda w, v, x: conv(x, w, padding=1) * conv(x, v, padding=1)),
        (W, some(4, 3, 3, 3), X),
    ),
    "two losses": (
        1,
        lambda w, x: (grad(loss)(w, x), grad(lambda w: conv(x, w).relu().sum())(w)),
        (W, X),
    ),
    "two nets": (
        2,
        lambda w, x, v, y: (grad(loss)(w, x), grad(loss)(v, y)),
        (W, X, V, some(5, 4, 6, 6)),
    ),
    "two nets of two dtypes": (
        2,
        lambda w, x, v, y: (grad(loss)(w, x), grad(loss)(v, y)),
        (W, X, V.float(), some(5, 4, 6, 6).float()),
    ),
    "a net of two dtypes": (3, two_dtypes, (W, V, X)),
    "bfloat16": (0, both(lambda w, x: conv(x.bfloat16(), w.bfloat16()).double()), (W, X)),
    "one weight, three times": (
        3,
        on(0)(lambda w, x: sum(conv(x * i, w).relu() for i in range(3))),
        (W, X),
    ),
    "activations returned": (1, activations, (W, V, X)),
    "a kept value is a result": (
        1,
        grad_and_value(
            lambda w, x: ((y := conv(x, w)).relu().square().sum(), y.relu()), has_aux=True
        ),
        (W, X),
    ),
    "written in place": (1, in_place, (W, X)),
    "a long expression": (1, on(0)(polynomial), (W * 0.01, X)),
    "a wide expression": (
        1,
        on(0)(lambda w, x: (lambda y: y - y.mean(0))(chain(conv(x, w)))),
        (W, X),
    ),
    "an expression of the input": (
        1,
        both(lambda w, x: (lambda y: conv(y - y.mean(0), w))(chain(x))),
        (W, X),
    ),
    "a learned image": (0, both(lambda z, w: conv(z, w).relu()), (some(1, 3, 6, 6), W)),
    "added to a learned image": (
        1,
        on(0, 1)(lambda z, w, x: conv(z + x, w)),
        (some(1, 3, 9, 9), W, X),
    ),
    "a number for each image": (
        1,
        on(0, 1)(lambda z, w, x: conv(z * x, w)),
        (some(11, 1, 1, 1), W, X),
    ),
    "a vector of images": (
        1,
        on(0, 1)(lambda z, w, x: (conv(x, w).flatten(1) ** 2).sum(1) * z),
        (some(11), W, X),
    ),
    "uint8": (
        1,
        on(0)(lambda w, x: conv(x.double() / 255, w)),
        (W, torch.arange(11 * 27).to(torch.uint8).view(11, 3, 3, 3)),
    ),
    "a mask reshaped": (1, on_mask(lambda y: ((y > 0) & (y < 1)).flatten(1).view_as(y)), (W, X)),
    "a mask expanded": (1, on_mask(lambda y: (y[:, :1] > 0).expand_as(y)), (W, X)),
    "masks concatenated": (
        1,
        on_mask(lambda y: torch.cat([y[:, :1] > 0, y[:, 1:] < 1], 1)),
        (W, X),
    ),
    "exclusive or": (1, on_mask(lambda y: torch.logical_xor(y > 0, y < 1)), (W, X)),
    "masks multiplied": (1, on_mask(lambda y: (y > 0) * (y < 1)), (W, X)),
    "where of masks": (1, on_mask(lambda y: torch.where(y > 0, y < 1, y > -1)), (W, X)),
    "no mask": (1, on_mask(lambda y: torch.logical_not(y.relu())), (W, X)),
    "a full mask": (1, on_mask(lambda y: (y > 0) & torch.ones_like(y, dtype=torch.bool)), (W, X)),
    "times a mask": (1, on(0)(lambda w, x: (lambda y: y * (y > 0) + (y > 1))(conv(x, w))), (W, X)),
    "a mask passed": (1, on(0)(lambda w, x, m: conv(x, w) * m), (W, X, Z > 0)),
    "a mask passed to where": (
        1,
        on(0)(lambda w, x, m: torch.where(m, conv(x, w), 0)),
        (W, X, Z > 0),
    ),
    "a mask of all images": (
        1,
        on(0)(lambda w, x, m: torch.where(m, conv(x, w), 0)),
        (W, X, Z[0] > 0),
    ),
    "integers for each image": (
        1,
        on(0)(lambda w, x, n: conv(x, w) * n),
        (W, X, torch.arange(11)[:, None, None, None]),
    ),
    "−0": (
        1,
        lambda w, x, z: 1 / torch.where(conv(x, w) > 0, z, 0.0),
        (W, X, torch.tensor(-0.0, dtype=torch.float64)),
    ),
    "−0 of the function": (1, lambda w, x: 1 / torch.where(conv(x, w) > 0, -0.0, 0.0), (W, X)),
    "a pool of one unbatched": (
        1,
        both(lambda w, x: F.max_pool2d(F.avg_pool2d(conv(x, w)[0], 2), 2)),
        (W, X),
    ),
    "unbatched": (0, both(lambda w, x: F.avg_pool2d(conv(x, w), 2)), (W, X[0])),
    "indices of a pool": (1, lambda w, x: F.max_pool2d(conv(x, w), 2, return_indices=True), (W, X)),
    "indices scattered otherwise": (1, on(0)(own_scatter), (W, X)),
    "variance": (1, moments((0, 2, 3)), (W, X)),
    "variance, axes kept": (1, moments((0, 2, 3), correction=0, keepdim=True), (W, X)),
    "variance of rows": (
        1,
        lambda w, x: torch.var_mean(conv(x, w).flatten(1), 0, correction=5),
        (W, X),
    ),
    "sums": (
        1,
        lambda w, x: (conv(x, w).sum((0, 2), True), conv(x, w).sum((1, 2, 3)), conv(x, w).mean()),
        (W, X),
    ),
    "channels last": (
        1,
        both(lambda w, x: F.max_pool2d(conv(x, w), 2).relu()),
        (W.to(memory_format=LAST), X.to(memory_format=LAST)),
    ),
    "channels last, reshaped": (
        1,
        lambda w, x: conv(x, w).relu().permute(0, 2, 3, 1).reshape(-1, 4) * 2,
        (W.to(memory_format=LAST), X.to(memory_format=LAST)),
    ),
    "strides": (
        1,
        both(lambda w, x: conv(x, w).relu()),
        (some(3, 3, 3, 8).permute(3, 0, 1, 2)[::2], some(22, 3, 18, 9)[::2, :, 1::2]),
    ),
    "an expanded input": (1, both(lambda w, x: conv(x, w)), (W, X[:1].expand(11, -1, -1, -1))),
    "sequences": (
        1,
        both(lambda w, x: F.max_pool1d(F.conv1d(x, w, dilation=2, stride=2, padding=3), 2)),
        (some(4, 3, 3), some(11, 3, 9)),
    ),
    "volumes": (0, both(F.conv3d), (some(5, 3, 5, 5, 5), some(4, 3, 3, 2, 2))),
    "transposed": (0, both(lambda w, x: F.conv_transpose2d(x, w, stride=2)), (some(3, 4, 3, 3), X)),
    "same": (1, both(lambda w, x: conv(x, w, padding="same")), (some(4, 3, 3, 5), X)),
    "reflected": (1, both(lambda w, x: conv(F.pad(x, (1, 1, 2, 2), "reflect"), w)), (W, X)),
    "adaptive pools": (
        1,
        both(
            lambda w, x: (
                F.adaptive_avg_pool2d(conv(x, w), (2, 3))
                + F.adaptive_max_pool2d(conv(x, w), (2, 3))
            )
        ),
        (W, X),
    ),
    "larger images": (1, both(lambda w, x: F.interpolate(conv(x, w), scale_factor=2)), (W, X)),
    "shuffled pixels": (1, both(lambda w, x: F.pixel_shuffle(conv(x, w), 2)), (W, X)),
    "a convolution as correlation": (
        0,
        both(
            lambda w, x: conv(
                conv(x, w).reshape(1, -1, 7, 7), conv(x, w).reshape(-1, 1, 7, 7)[..., :3], groups=44
            )
        ),
        (W, X),
    ),
    "per-sample gradients": (
        0,
        lambda w, x: vmap(grad(lambda w, x: loss(w, x[None])), (None, 0))(w, x),
        (W, X),
    ),
    "hvp": (
        1,
        lambda w, x, v: jvp(lambda w: grad(loss)(w, x), (w,), (v,)),
        (W, X, some(4, 3, 3, 3)),
    ),
    "reverse over reverse": (
        1,
        lambda w, x, v: grad(lambda w: (grad(loss)(w, x) * v).sum())(w),
        (W, X, some(4, 3, 3, 3)),
    ),
    "jvp": (
        1,
        lambda w, x, v: jvp(lambda w: F.max_pool2d(conv(x, w), 2).tanh(), (w,), (v,)),
        (W, X, some(4, 3, 3, 3)),
    ),
    "jacobian": (1, jacrev(lambda w, x: conv(x, w).tanh().sum((0, 2, 3))), (W, X)),
    "a population": (1, population, (some(3, 4, 3, 3, 3), X)),
    "a population with its own batches": (
        1,
        lambda w, x: vmap(grad(loss))(w, x),
        (some(3, 4, 3, 3, 3), some(3, 11, 3, 9, 9)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_programs(name: str) -> None:
    least, fn, args = CASES[name]
    check(least, fn, *args)


@pytest.mark.parametrize("pays", [False, True])
def test_whatever_is_chosen(pays: bool) -> None:
    _, fn, args = CASES["a deeper net"]
    assert bool(check(pays, fn, *args, pays=pays).sources) == pays
