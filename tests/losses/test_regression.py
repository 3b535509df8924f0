"""Losses of real predictions against torch.nn.functional, in float64."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jvp, vmap

from fdl import losses
from tests.support.asserts import close, draw
from tests.support.losses import SHAPES, WEIGHTS, compare

DELTAS = st.sampled_from([0.01, 0.3, 1.0, 1.7, 50.0])
PAIRS = {
    "mse": (losses.mse, F.mse_loss),
    "l1": (losses.l1, F.l1_loss),
    "huber": (losses.huber, F.huber_loss),
    "smooth_l1": (losses.smooth_l1, F.smooth_l1_loss),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(deadline=None, max_examples=40)
@given(SHAPES, WEIGHTS, st.integers(0, 99), DELTAS)
def test_equals_torch(name, shape, weights, seed, delta):
    options = {"huber": {"delta": delta}, "smooth_l1": {"beta": delta}}.get(name, {})
    ours, theirs = (functools.partial(f, **options) for f in PAIRS[name])
    x, y = draw(seed, *shape), draw(seed + 100, *shape)
    compare(ours, theirs, (x, y), weights)


def test_smooth_l1_of_no_width_is_l1():
    x, y = draw(0, 5, 2), draw(1, 5, 2)
    for beta in (0, 0.0):
        compare(
            functools.partial(losses.smooth_l1, beta=beta),
            functools.partial(F.smooth_l1_loss, beta=beta),
            (x, y),
            "mask",
        )
    close(losses.smooth_l1(x, y, beta=0), losses.l1(x, y))
    close(losses.huber(x, y, delta=math.inf), losses.mse(x, y) / 2)


@pytest.mark.parametrize("f", [losses.huber, losses.smooth_l1], ids=["huber", "smooth_l1"])
def test_the_second_derivative_at_an_error_of_0_is_1(f):
    """That of torch's smooth_l1_loss written with |e| is 0 there."""
    y = torch.tensor([0.5, -2.0], dtype=torch.float64)
    for x in (y, y + 0.3):
        close(hessian(f)(x, y), torch.eye(2, dtype=torch.float64) / 2)
    close(hessian(f)(y + 3, y), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", PAIRS)
def test_large_errors_keep_their_derivatives(name):
    ours, theirs = PAIRS[name]
    x = torch.tensor([1e18, -1e18, 0.0, 1e-30], requires_grad=True)
    y = torch.zeros(4)
    theirs(x, y).backward()
    found, value = torch.func.grad_and_value(ours)(x.detach(), y)
    close(found, x.grad, rtol=1e-6)
    close(value, theirs(x.detach(), y), rtol=1e-6)
    if name != "mse":
        assert grad(ours)(torch.tensor([torch.inf]), torch.zeros(1)) == 1


@pytest.mark.parametrize("name", PAIRS)
def test_under_vmap_and_jvp(name):
    f = PAIRS[name][0]
    x, y, v = draw(0, 3, 4, 2), draw(1, 3, 4, 2), draw(2, 3, 4, 2)
    mask = torch.tensor([[True, False, True, True]] * 3)
    rows = zip(x, y, mask, strict=True)
    close(vmap(grad(f))(x, y, mask), torch.stack([grad(f)(*row) for row in rows]))
    _, tangent = jvp(lambda x: f(x, y[0]), (x[0],), (v[0],))
    close(tangent, (grad(f)(x[0], y[0]) * v[0]).sum())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: losses.huber(x, x, delta=0.0), ValueError, "huber: delta must be positive, got"),
        (lambda x: losses.huber(x, x, delta=-1), ValueError, "delta must be positive, got -1"),
        (lambda x: losses.huber(x, x, delta=math.nan), ValueError, "positive, got nan"),
        (lambda x: losses.smooth_l1(x, x, beta=-0.1), ValueError, "beta must be at least 0, got"),
        (
            lambda x: losses.l1(x, x[:, :1]),
            ValueError,
            r"l1: prediction \[3, 2\] and target \[3, 1\] must have the same shape",
        ),
        (
            lambda x: losses.huber(x, x, torch.ones(3, 2)),
            ValueError,
            r"huber: weights must have the shape \[3\], .* got \[3, 2\]",
        ),
        (
            lambda x: losses.mse(x + 1j, x),
            TypeError,
            r"mse: prediction must be a tensor of real numbers, got a tensor complex64\[3, 2\]",
        ),
        (
            lambda x: losses.smooth_l1(x, x.numpy()),
            TypeError,
            r"smooth_l1: target must be a tensor of real numbers, got numpy float32\[3, 2\]",
        ),
    ],
)
def test_bad_input_raises(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(3, 2))
