"""Losses of embeddings against torch.nn.functional, in float64."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, grad_and_value, hessian, jvp, vmap

import fdl
from fdl import losses, random
from tests.support.asserts import close, draw
from tests.support.losses import WEIGHTS, compare, weights_of

SEEDS = st.integers(0, 99)
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 5))


def signs(seed, n, dtype=torch.int64):
    return 2 * random.randint(random.key(seed), (n,), 0, 2).to(dtype) - 1


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, WEIGHTS, st.sampled_from([0.0, 0.3, -0.2]), st.booleans())
def test_cosine_embedding_equals_torch(size, seed, weights, margin, integers):
    x, y, target = draw(seed, *size), draw(seed + 1, *size), signs(seed, size[0])
    target = target if integers else target.double()

    def ours(x, y, w):
        return losses.cosine_embedding(x, y, target, w, margin=margin)

    def theirs(x, y, reduction):
        return F.cosine_embedding_loss(x, y, target, margin, reduction=reduction)

    compare(ours, theirs, (x, y), weights)


@settings(deadline=None, max_examples=80)
@given(
    *(SIZES, SEEDS, WEIGHTS, st.sampled_from([0.2, 1.0, 5.0])),
    *(st.sampled_from([1, 1.5, 2, 2.0, 3, math.inf]), st.booleans()),
)
def test_triplet_margin_equals_torch(size, seed, weights, margin, p, swap):
    inputs = tuple(draw(seed + i, *size) for i in range(3))
    options = {"margin": margin, "p": p, "swap": swap}
    ours = functools.partial(losses.triplet_margin, **options)
    compare(ours, functools.partial(F.triplet_margin_loss, **options), inputs, weights)


def test_further_axes_are_averaged():
    inputs = tuple(draw(i, 4, 3, 5) for i in range(3))
    compare(losses.triplet_margin, F.triplet_margin_loss, inputs, "numbers")


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_equal_vectors_have_finite_derivatives(p):
    x, y = draw(0, 3, 4), draw(1, 3, 4)
    f = functools.partial(losses.triplet_margin, p=p)
    for inputs in ((x, x, y), (x, x, x), (x, y, x), (x, x + 1e-6, y)):
        for found in grad(f, (0, 1, 2))(*inputs):
            assert found.isfinite().all()
    if p == 2:
        assert hessian(f)(x, x + 1e-6, y).isfinite().all()


def test_vectors_of_zeros_have_the_cosine_0():
    zero, x, target = torch.zeros(2, 3).double(), draw(0, 2, 3), torch.tensor([1, -1])
    close(losses.cosine_embedding(zero, x, target), torch.tensor(0.5).double())
    for second in (x, zero):
        found = hessian(losses.cosine_embedding)(zero, second, target)
        assert found.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e15, 1e30])
def test_long_and_short_vectors_of_float32(scale):
    x, y = draw(0, 4, 3).float() * scale, draw(1, 4, 3).float() * scale
    target = torch.tensor([1, -1, 1, -1])
    found, value = grad_and_value(losses.cosine_embedding)(x, y, target)
    exact, expected = grad_and_value(losses.cosine_embedding)(x.double(), y.double(), target)
    close(value.double(), expected, rtol=1e-6)
    close(found.double() * scale, exact * scale, rtol=1e-5, atol=1e-7)
    for p in (1, 1.5, 2, 3, 30, math.inf):
        f = functools.partial(losses.triplet_margin, p=p)
        found, value = grad_and_value(f)(x, y, x.flip(0))
        assert value.isfinite() and found.isfinite().all()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_masked_row_may_hold_anything_in_one_of_its_vectors(place, poison):
    w = weights_of("numbers", 5)
    inputs = [draw(i, 5, 3) for i in range(3)]
    bad = list(inputs)
    bad[place] = torch.where((w == 0)[:, None], poison, inputs[place])
    target = torch.tensor([1, 0, -1, 1, 0])
    for f in (
        lambda x, y, z: losses.triplet_margin(x, y, z, w, swap=True),
        lambda x, y, z: losses.triplet_margin(x, y, z, w, p=3),
        lambda x, y, z: losses.cosine_embedding(x, y + 0 * z.nan_to_num(), target, w),
    ):
        expected, found = (grad_and_value(f, (0, 1, 2))(*each) for each in (inputs, bad))
        close(found[1], expected[1])
        for gradient, same in zip(found[0], expected[0], strict=True):
            close(gradient[w != 0], same[w != 0])
            assert gradient.isfinite().all()


def test_under_vmap_jvp_jit_and_scan(plain_backend):
    inputs = tuple(draw(i, 3, 4, 2) for i in range(3))
    target = torch.stack([signs(i, 4) for i in range(3)])
    w = torch.tensor([[True, False, True, True]] * 3)

    def f(x, y, z, target, w):
        margins = losses.triplet_margin(x, y, z, w, p=3, swap=True)
        return margins + losses.triplet_margin(x, y, z) + losses.cosine_embedding(x, y, target, w)

    each = [grad_and_value(f)(*row) for row in zip(*inputs, target, w, strict=True)]
    grads, values = (torch.stack(part) for part in zip(*each, strict=True))
    close(vmap(grad_and_value(f))(*inputs, target, w), (grads, values))
    close(fdl.jit(vmap(grad_and_value(f)))(*inputs, target, w), (grads, values))

    def epoch(*rows):
        return fdl.scan(lambda c, row: (c, grad_and_value(f)(*row)), (), rows)[1]

    close(fdl.jit(epoch)(*inputs, target, w), (grads, values))
    first = [x[0] for x in (*inputs, target, w)]
    _, tangent = jvp(lambda x: f(x, *first[1:]), (first[0],), (first[1],))
    close(tangent, (grads[0] * first[1]).sum())


X, T = torch.ones(4, 3), torch.tensor([1, -1, 1, -1])
BAD = {
    "three shapes": (
        lambda: losses.triplet_margin(X, X[:, :1], X),
        r"anchor \[4, 3\], positive \[4, 1\] and negative \[4, 3\] must have the same shape",
    ),
    "one axis": (
        lambda: losses.triplet_margin(X[0], X[0], X[0]),
        r"triplet_margin: anchor must be \[batch, ..., features\], got \[3\]",
    ),
    "margin": (lambda: losses.triplet_margin(X, X, X, margin=0), "margin must be positive, got 0"),
    "p": (lambda: losses.triplet_margin(X, X, X, p=0.5), "p must be at least 1, got 0.5"),
    "weights of triplets": (
        lambda: losses.triplet_margin(X, X, X, X),
        r"triplet_margin: weights must have the shape \[4\], .* got \[4, 3\]",
    ),
    "two shapes": (
        lambda: losses.cosine_embedding(X, X[:1], T),
        r"cosine_embedding: first \[4, 3\] and second \[1, 3\] must have the same shape",
    ),
    "target": (
        lambda: losses.cosine_embedding(X, X, T[:, None]),
        r"and target \[batch\], got \[4, 3\] and \[4, 1\]",
    ),
    "labels 0 and 1": (
        lambda: losses.cosine_embedding(X, X, (T > 0).long()),
        "cosine_embedding: target must be 1 or -1, got 0",
    ),
    "margin of cosines": (
        lambda: losses.cosine_embedding(X, X, T, margin=2),
        r"margin must be in \[-1, 1\], got 2",
    ),
}


@pytest.mark.parametrize(("call", "text"), BAD.values(), ids=BAD)
def test_bad_input_raises(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_targets_that_do_not_count_are_not_checked():
    mask = torch.tensor([True, False, True, False])
    target = torch.tensor([1, 7, -1, -100])
    expected = losses.cosine_embedding(X[mask], X[mask], target[mask])
    for weights in (mask, mask.double()):
        close(losses.cosine_embedding(X, X, target, weights), expected)
