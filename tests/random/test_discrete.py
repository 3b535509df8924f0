"""Signs, choices, Poisson and binomial counts: their laws and their edges."""

import math

import pytest
import torch
from torch.func import vmap

from fdl import random
from tests.random.test_samplers import chi_squared_per_class

TINY = 1e-4  # the probability of a false alarm


def p_value(draws, probabilities):
    """The probability of a larger chi², with rare classes merged from the right and the left."""
    n = draws.numel()
    keep = probabilities * n >= 10
    first, last = int(keep.nonzero()[0]), int(keep.nonzero()[-1])
    expected = probabilities[first : last + 1] * n
    expected[0] += probabilities[:first].sum() * n
    expected[-1] += n - expected.sum()
    counts = torch.bincount(draws.long().clamp(first, last) - first, minlength=len(expected))
    chi = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, chi / 2).item()


def poisson_probabilities(lam):
    k = torch.arange(math.ceil(lam + 12 * math.sqrt(lam) + 30), dtype=torch.float64)
    return torch.exp(k * math.log(lam) - lam - torch.lgamma(k + 1))


def binomial_probabilities(n, p):
    k = torch.arange(n + 1, dtype=torch.float64)
    p = torch.tensor(p).double()  # draws are float32
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return torch.exp(ways + k * p.log() + (n - k) * torch.log1p(-p))


@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0, 9.999, 10.0, 12.5, 80.0, 1000.0])
def test_poisson_follows_its_distribution(lam):
    draws = random.poisson(random.key(61), lam, (100_000,))
    assert draws.dtype is torch.int64
    assert p_value(draws, poisson_probabilities(lam)) > TINY


def test_poisson_of_large_means_follows_its_distribution():
    """JAX 0.10.2 decides in float32, and has a variance of 1.06 and a fourth moment of 4.2."""
    lam = 4e6
    draws = random.poisson(random.key(62), lam, (200_000,)).double()
    z = (draws - lam) / math.sqrt(lam)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(variance / 200_000)


@pytest.mark.parametrize(
    ("n", "p"),
    [
        (1, 0.3),
        (10, 0.5),
        (20, 0.9),
        (100, 0.05),
        (100, 0.11),
        (100, 0.5),
        (1000, 0.98),
        (4000, 0.3),
    ],
)
def test_binomial_follows_its_distribution(n, p):
    draws = random.binomial(random.key(63), n, p, (100_000,))
    assert draws.dtype is torch.float32 and torch.equal(draws, draws.round())
    assert p_value(draws, binomial_probabilities(n, p)) > TINY


def test_certain_counts():
    key = random.key(1)
    assert (random.poisson(key, 0.0, (9,)) == 0).all()
    assert (random.binomial(key, 7, 0.0, (9,)) == 0).all()
    assert (random.binomial(key, 7, 1.0, (9,)) == 7).all()
    assert (random.binomial(key, 0, 0.5, (9,)) == 0).all()
    assert (random.poisson(key, torch.tensor([-1.0, torch.nan])) == -1).all()
    odd = random.binomial(key, torch.tensor([torch.inf, -1, torch.nan, 5]), torch.tensor(0.0))
    assert odd.isinf()[0] and odd.isnan()[1:3].all() and odd[3] == 0


def test_counts_of_tensors_and_dtypes():
    key = random.key(2)
    lam = torch.tensor([[0.5], [50.0]])
    draws = random.poisson(key, lam, (2, 4000), torch.int16)
    assert draws.dtype is torch.int16 and (draws.double().mean(1) - lam[:, 0]).abs().max() < 0.6
    draws = random.binomial(key, torch.tensor([10, 1000]), torch.tensor(0.25), (4000, 2))
    assert (draws.mean(0) - torch.tensor([2.5, 250.0])).abs().max() < 1
    for shape in ((), (0,), (2, 0)):
        assert random.poisson(key, 3.0, shape).shape == shape
        assert random.binomial(key, 30, 0.5, shape, torch.bfloat16).shape == shape


def test_counts_give_no_gradient():
    p = torch.tensor(0.5, requires_grad=True)
    assert not random.binomial(random.key(1), 5, p).requires_grad
    slope = torch.func.grad(lambda p: p * 0 + random.binomial(random.key(1), 5, p))(p.detach())
    assert slope == 0


def test_signs():
    signs = random.rademacher(random.key(64), (100_000,))
    assert signs.dtype is torch.int64 and torch.equal(signs.abs(), torch.ones_like(signs))
    assert abs(signs.double().mean()) < 4 / math.sqrt(100_000)


def test_choices_follow_their_probabilities():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
    for scale in (1, 7):  # they are divided by their sum
        draws = random.choice(random.key(65), 4, (100_000,), p=p * scale)
        assert not (draws == 1).any()
        draws = torch.where(draws > 0, draws - 1, 0)
        assert chi_squared_per_class(draws, p[[0, 2, 3]]) < 9
    draws = random.choice(random.key(66), 5, (100_000,))
    assert chi_squared_per_class(draws, torch.full((5,), 0.2)) < 5


def test_choices_without_replacement_follow_their_probabilities():
    p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    keys = random.split(random.key(67), 60_000)
    draws = vmap(lambda k: random.choice(k, 3, (2,), False, p))(keys)
    assert (draws[:, 0] != draws[:, 1]).all()
    expected = torch.zeros(9, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            expected[3 * i + j] = p[i] * p[j] / (1 - p[i]) * (i != j)
    counts = torch.bincount(draws[:, 0] * 3 + draws[:, 1], minlength=9)
    some = expected > 0
    chi = ((counts - 60_000 * expected)[some] ** 2 / (60_000 * expected[some])).sum()
    assert torch.special.gammaincc(torch.tensor(2.5).double(), chi / 2) > TINY
    every = random.choice(random.key(1), 6, (2, 3), replace=False)
    assert torch.equal(every.flatten().sort().values, torch.arange(6))


def test_choices_of_rows_and_of_nothing():
    x = torch.arange(24.0).reshape(4, 6)
    rows = random.choice(random.key(1), x, (5, 2))
    assert rows.shape == (5, 2, 6) and (rows[..., :1] % 6 == 0).all()
    columns = random.choice(random.key(1), x, (3,), replace=False, axis=-1)
    assert columns.shape == (4, 3) and len(set(columns[0].tolist())) == 3
    assert random.choice(random.key(1), x, (0,)).shape == (0, 6)
    assert random.choice(random.key(1), 0, (2, 0)).shape == (2, 0)
    assert random.choice(random.key(1), x[:0], (0, 3), p=torch.ones(0)).shape == (0, 3, 6)
