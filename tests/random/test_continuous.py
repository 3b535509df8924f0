"""Draws that invert a distribution function: their laws, and their extremes in every dtype."""

import math

import pytest
import torch

from fdl import random
from fdl.random import _arithmetic
from tests.random.test_samplers import FLOATS, kolmogorov_smirnov

LIMIT = 2.23  # of the statistic of Kolmogorov and Smirnov, which exceeds it in 1 of 10,000

CDFS = {
    "exponential": lambda x: -torch.expm1(-x),
    "gumbel": lambda x: torch.exp(-torch.exp(-x)),
    "laplace": lambda x: torch.where(x < 0, torch.exp(x) / 2, 1 - torch.exp(-x) / 2),
    "logistic": torch.sigmoid,
    "cauchy": lambda x: 0.5 + torch.atan(x) / math.pi,
}
each = pytest.mark.parametrize("name", CDFS)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_their_distribution(name, dtype):
    x = getattr(random, name)(random.key(41), (100_000,), dtype)
    assert x.dtype is dtype and kolmogorov_smirnov(x, CDFS[name]) < LIMIT


def test_gumbel_with_more_random_bits_follows_its_distribution():
    x = random.gumbel(random.key(42), (100_000,), mode="high")
    assert kolmogorov_smirnov(x, CDFS["gumbel"]) < LIMIT
    assert torch.equal(
        random.gumbel(random.key(1), (9,), mode="low"), random.gumbel(random.key(1), (9,))
    )


@pytest.mark.parametrize(
    ("name", "mean", "variance", "fourth"),
    [
        ("exponential", 1, 1, 9),
        ("gumbel", 0.5772156649, math.pi**2 / 6, 14.61),
        ("laplace", 0, 2, 24),
        ("logistic", 0, math.pi**2 / 3, 45.46),
    ],
)
def test_moments(name, mean, variance, fourth):
    n = 100_000
    x = getattr(random, name)(random.key(43), (n,), torch.float64) - mean
    assert abs(x.mean()) < 4 * math.sqrt(variance / n)
    assert abs((x * x).mean() - variance) < 4 * math.sqrt((fourth - variance**2) / n)


@each
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_extremes_of_the_random_numbers_give_finite_draws(name, dtype, monkeypatch):
    high = torch.tensor([0, 0xFFFFFFFF, 0, 0xFFFFFFFF])
    low = torch.tensor([0, 0, 0xFFFFFFFF, 0xFFFFFFFF])
    monkeypatch.setattr("fdl._threefry.encrypted_counters", lambda key, shape: (high, low))
    x = getattr(random, name)(random.key(0), (4,), dtype)
    if (name, dtype) != ("cauchy", torch.float16):
        assert x.isfinite().all()
    assert x.dtype is dtype and (name == "exponential" or x.min() < 0 < x.max())


@each
def test_narrow_draws_are_close_to_the_distribution(name):
    for dtype in (torch.float16, torch.bfloat16):
        x = getattr(random, name)(random.key(44), (4000,), dtype).double()
        grid = 2.0 ** -_arithmetic.FLOATS[dtype][1]  # of the uniform numbers
        assert kolmogorov_smirnov(x, CDFS[name]) < LIMIT + 4 * grid * math.sqrt(4000)


@each
def test_shapes(name):
    for shape in ((), (0,), (2, 0, 3), (2, 3)):
        assert getattr(random, name)(random.key(1), shape).shape == shape
