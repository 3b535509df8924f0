"""Pools against torch over all shapes, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn as oo

from fdl import nn
from tests.support.asserts import close, draw, result_or_none

POOLS = {
    nn.max_pool1d: (oo.MaxPool1d, 1),
    nn.max_pool2d: (oo.MaxPool2d, 2),
    nn.avg_pool1d: (oo.AvgPool1d, 1),
    nn.avg_pool2d: (oo.AvgPool2d, 2),
}
ADAPTIVE = {
    nn.adaptive_avg_pool1d: (oo.AdaptiveAvgPool1d, 1),
    nn.adaptive_avg_pool2d: (oo.AdaptiveAvgPool2d, 2),
    nn.adaptive_max_pool2d: (oo.AdaptiveMaxPool2d, 2),
}
BATCHES = st.sampled_from([(), (0,), (1,), (2,)])


def check(pool, module, shape):
    """The pool gives the module's output and gradient, or refuses an x that torch refuses."""
    x = draw(0, *shape)
    leaf = x.clone().requires_grad_()
    y = result_or_none(module, leaf)
    if y is None:
        with pytest.raises(ValueError, match="smaller than the window"):
            pool(x)
        return
    close(pool(x), y.detach())
    weights = draw(1, *y.shape)
    (y * weights).sum().backward()
    close(torch.func.grad(lambda x: (pool(x) * weights).sum())(x), leaf.grad)


def of_axes(axes, each):
    return each | st.tuples(*[each] * axes)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*POOLS]), BATCHES, st.data())
def test_pool_equals_the_module(function, batch, data):
    module, axes = POOLS[function]
    window = data.draw(of_axes(axes, st.integers(1, 4)))
    stride = data.draw(st.none() | of_axes(axes, st.integers(1, 3)))
    least = min(window) if isinstance(window, tuple) else window
    padding = data.draw(of_axes(axes, st.integers(0, least // 2)))
    image = data.draw(st.tuples(*[st.integers(1, 6)] * axes))
    args = (window, stride, padding)
    check(function(*args), module(*args), (*batch, 2, *image))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*ADAPTIVE]), BATCHES, st.data())
def test_adaptive_pool_equals_the_module(function, batch, data):
    module, axes = ADAPTIVE[function]
    size = data.draw(of_axes(axes, st.integers(1, 7)))
    image = data.draw(st.tuples(*[st.integers(1, 6)] * axes))
    check(function(size), module(size), (*batch, 2, *image))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.max_pool1d(0), r"max_pool1d: kernel_size .*\(length,\), at least 1, got 0"),
        (lambda: nn.avg_pool1d((2, 2)), r"avg_pool1d: kernel_size .* got \(2, 2\)"),
        (lambda: nn.max_pool1d(2, 0), "max_pool1d: stride .* got 0"),
        (
            lambda: nn.avg_pool1d(2, padding=2),
            "avg_pool1d: padding 2 is more than half the window 2",
        ),
        (lambda: nn.adaptive_avg_pool1d(0), "adaptive_avg_pool1d: output_size .* got 0"),
        (lambda: nn.adaptive_avg_pool2d((1, 2, 3)), r"\(height, width\), .* got \(1, 2, 3\)"),
        (lambda: nn.adaptive_max_pool2d(torch.ones(2)), r"got a tensor float32\[2\]"),
    ],
    ids=range(7),
)
def test_bad_arguments_raise_when_the_layer_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("pool", "x", "error", "text"),
    [
        (
            nn.max_pool1d(2),
            torch.ones(4),
            ValueError,
            r"max_pool1d: expected x .*length\], got \[4",
        ),
        (nn.max_pool2d(2), torch.ones(1, 1, 1, 4, 4), ValueError, "max_pool2d: expected x"),
        (nn.avg_pool2d(3), torch.ones(1, 1, 2, 4), ValueError, "avg_pool2d: x .* is smaller than"),
        (nn.adaptive_avg_pool2d(1), torch.ones(2, 0, 4)[None], ValueError, "above 0, got"),
        (nn.adaptive_avg_pool1d(1), torch.ones(2), ValueError, "adaptive_avg_pool1d: expected x"),
        (nn.max_pool1d(2), [1.0], TypeError, "max_pool1d: x must be a tensor, got a list"),
    ],
    ids=range(6),
)
def test_a_bad_x_names_the_layer(pool, x, error, text):
    with pytest.raises(error, match=text):
        pool(x)
