"""Poisson sampling: its law, its padding, and what happens if a batch does not fit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import fdl
from fdl import data, losses, nn, random, transforms, tree
from fdl.data._poisson import OVERFLOW, _enough

stats = pytest.importorskip("scipy.stats")
KEY = random.key(3)


def counts(index, mask, n):
    """How often each example is drawn: [steps, n]."""
    found = torch.zeros(len(index), n + 1, dtype=torch.int64)
    found.scatter_add_(1, torch.where(mask, index, n), torch.ones_like(index))
    return found[:, :n]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 300),
    rate=st.floats(1e-9, 1.0),
    steps=st.integers(1, 5),
)
def test_rows_are_different_examples_and_then_padding(seed, n, rate, steps):
    index, mask = data.poisson_indices(random.key(seed), n, rate, steps)
    assert index.shape == mask.shape == (steps, _enough(n, rate))
    assert index.dtype == torch.int64 and mask.dtype == torch.bool
    assert index.min() >= 0 and index.max() < n and (index[~mask] == 0).all()
    assert counts(index, mask, n).max() <= 1
    sizes = mask.sum(1, keepdim=True)
    assert torch.equal(mask, torch.arange(mask.shape[1]) < sizes)  # no gaps
    if rate == 1:
        assert (sizes == n).all()


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5, 0.97])
def test_examples_are_independent_with_the_rate(rate):
    n, steps = 40, 20_000
    drawn = counts(*data.poisson_indices(KEY, n, rate, steps), n)
    frequency = drawn.double().mean(0)  # of each example
    deviation = math.sqrt(rate * (1 - rate) / steps)
    assert (frequency - rate).abs().max() < 5 * deviation
    sizes = torch.bincount(drawn.sum(1), minlength=n + 1)
    expected = steps * stats.binom(n, rate).pmf(range(n + 1))
    common = expected > 5
    assert stats.chisquare(
        [*sizes.numpy()[common], sizes.numpy()[~common].sum()],
        [*expected[common], expected[~common].sum()],
    ).pvalue > 1e-3  # fmt: skip
    # Pairs: neighbours, far ones, and the same example in the next batch.
    centred = drawn.double() - rate
    for product in (
        centred[:, :-1] * centred[:, 1:],
        centred[:, :20] * centred[:, 20:],
        centred[:-1] * centred[1:],
    ):
        assert product.mean().abs() < 5 * rate * (1 - rate) / math.sqrt(product.numel())


def test_the_rate_is_exact_where_it_is_small():
    """In float32 a rate of 1e-7 would be off by a fifth."""
    n, steps, rate = 10_000_000, 2000, 1e-7
    sizes = data.poisson_indices(KEY, n, rate, steps).mask.sum(1)
    assert abs(sizes.sum().item() - n * steps * rate) < 4 * math.sqrt(n * steps * rate)


@pytest.mark.parametrize("rate", [1e-6, 0.004, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("n", [10, 1000, 60_000])
def test_the_default_capacity_is_exceeded_with_the_probability_it_says(n, rate):
    capacity = _enough(n, rate)
    assert stats.binom(n, rate).sf(capacity) <= OVERFLOW
    assert capacity <= n * rate + 19 + 11 * math.sqrt(n * rate)  # not far too large


def test_a_batch_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"batch \d has more than capacity=5 of the n=100 .* of 61, the d"
    ):
        data.poisson_indices(KEY, 100, 0.2, 3, capacity=5)
    draw = lambda key: data.poisson_indices(key, 100, 0.2, 3, capacity=5)  # noqa: E731
    for index, mask in (vmap(draw)(KEY[None]), torch.compile(draw, backend="eager")(KEY)):
        assert mask.all() and (index.diff() > 0).all()  # the first five
        assert index.double().mean() < 30  # of about twenty in a hundred


def test_the_same_in_every_way():
    draw = lambda key: data.poisson_indices(key, 50, 0.1, 4)  # noqa: E731
    keys = random.split(KEY, 3)
    expected = tree.stack([draw(key) for key in keys])
    assert tree.diff(vmap(draw)(keys), expected) == []
    traced = torch.compile(draw, backend="eager", fullgraph=True)
    assert tree.diff(traced(keys[0]), draw(keys[0])) == []


def test_padding_does_not_enter_the_clipped_sum():
    model = nn.linear(3, 2)
    params = model.init(KEY)
    x, y = random.normal(KEY, (50, 3)), random.normal(random.key(4), (50, 2))
    clipped = transforms.clipped_grad_sum(fdl.supervised(model, losses.mse), 0.5)
    for index, mask in zip(*data.poisson_indices(KEY, 50, 0.2, 5), strict=True):
        found = clipped(params, data.batch((x, y), (index, mask)))
        own = index[mask]
        assert tree.allclose(found, clipped(params, (x[own], y[own])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 5.0}, TypeError, "n must be an int, got 5.0"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"rate": 0.0}, ValueError, "rate must be above 0 and at most 1, got 0.0"),
        ({"rate": 1.5}, ValueError, "rate must be above 0 and at most 1, got 1.5"),
        ({"rate": math.nan}, ValueError, "rate must be above 0 and at most 1, got nan"),
        ({"rate": "0.1"}, TypeError, "rate must be a number, got a str"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"capacity": 2.5}, TypeError, "capacity must be an int, got 2.5"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=f"^poisson_indices: {words}"):
        data.poisson_indices(**{"key": KEY, "n": 9, "rate": 0.1, "steps": 2, **options})
