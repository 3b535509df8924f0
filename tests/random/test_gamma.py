"""Gamma, beta, Dirichlet and t draws: laws, derivatives, and the same draws in every way to run."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vmap

from fdl import jit, random
from fdl.random import _marsaglia_tsang
from fdl.random._marsaglia_tsang import slope_of_log
from tests.random.test_continuous import LIMIT
from tests.random.test_samplers import kolmogorov_smirnov

N = (50_000,)


def gamma_cdf(a):
    return lambda x: torch.special.gammainc(torch.tensor(a, dtype=torch.float64), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", [0.05, 0.5, 0.999, 1.0, 3.0, 40.0, 1e4])
def test_gamma_follows_its_distribution(a, dtype):
    x = random.gamma(random.key(71), a, N, dtype)
    assert x.dtype is dtype and (x >= 0).all() and kolmogorov_smirnov(x, gamma_cdf(a)) < LIMIT
    assert abs(x.double().mean() - a) < 4 * math.sqrt(a / N[0])


@pytest.mark.parametrize(
    ("a", "b", "cdf"),
    [
        (0.5, 0.5, lambda x: 2 / math.pi * torch.asin(x.sqrt())),
        (1.0, 3.0, lambda x: 1 - (1 - x) ** 3),
        (2.0, 2.0, lambda x: x * x * (3 - 2 * x)),
        (0.02, 1.0, lambda x: x**0.02),
    ],
)
def test_beta_follows_its_distribution(a, b, cdf):
    x = random.beta(random.key(72), a, b, N, torch.float64)
    assert (x >= 0).all() and (x <= 1).all() and kolmogorov_smirnov(x, cdf) < LIMIT


def test_dirichlet_has_beta_marginals():
    alpha = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    x = random.dirichlet(random.key(73), alpha, N, torch.float64)
    torch.testing.assert_close(x.sum(-1), torch.ones(N, dtype=torch.float64))
    assert kolmogorov_smirnov(x[:, 1], lambda x: 1 - (1 - x) ** 2) < LIMIT
    variance = alpha / 3 * (1 - alpha / 3) / 4
    assert ((x.mean(0) - alpha / 3).abs() < 4 * (variance / N[0]).sqrt()).all()
    small = random.dirichlet(random.key(1), torch.full((5,), 1e-4), (100,))
    torch.testing.assert_close(small.sum(-1), torch.ones(100))


@pytest.mark.parametrize(
    ("df", "cdf"),
    [
        (1.0, lambda x: 0.5 + torch.atan(x) / math.pi),
        (2.0, lambda x: 0.5 + x / (2 * (2 + x * x).sqrt())),
        (4.0, lambda x: 0.5 + 3 / 8 * (s := x / (1 + x * x / 4).sqrt()) * (1 - s * s / 12)),
    ],
)
def test_t_follows_its_distribution(df, cdf):
    x = random.t(random.key(74), df, N, torch.float64)
    assert kolmogorov_smirnov(x, cdf) < LIMIT


def test_dtypes_and_shapes():
    key = random.key(1)
    a = torch.tensor([[0.5], [4.0]])
    for dtype in (torch.float16, torch.bfloat16):
        narrow = random.gamma(key, a, (2, 5), dtype)
        assert torch.equal(narrow, random.gamma(key, a, (2, 5)).to(dtype))
    assert random.gamma(key, a).shape == (2, 1) and random.gamma(key, 2).shape == ()
    assert random.beta(key, a, torch.ones(3)).shape == (2, 3)
    assert random.t(key, a, (4, 2, 0)).shape == (4, 2, 0)
    assert random.dirichlet(key, torch.ones(2, 3)).shape == (2, 3)
    assert random.dirichlet(key, torch.ones(2, 3), (0, 2)).shape == (0, 2, 3)
    assert random.gamma(key, torch.tensor([3, 4])).shape == (2,)  # integers are converted
    odd = random.gamma(key, torch.tensor([-3.0, torch.nan, 0.0, torch.inf, 1e-30]))
    assert odd[:2].isnan().all() and odd[2] == 0 and odd[3] == torch.inf and odd[4] == 0


def test_a_rejected_proposal_is_drawn_again_with_new_keys(monkeypatch):
    """Of 100,000 draws, 5 % are proposed more than once; eagerly only these are drawn again."""
    sizes = []
    original = _marsaglia_tsang.propose

    def propose(state, *args, **kwargs):
        sizes.append(state.accepted.numel())
        return original(state, *args, **kwargs)

    monkeypatch.setattr(_marsaglia_tsang, "propose", propose)
    random.gamma(random.key(75), 1.0, (100_000,))
    assert sizes[0] == 100_000 and 4_000 < sizes[1] < 7_000 and sizes[-1] < 50
    assert len(sizes) < 10


# Derivatives

A = torch.logspace(-3, 4, 22, dtype=torch.float64)


def test_the_slope_is_that_of_the_distribution_function():
    a = A[:, None]
    x = random.gamma(random.key(76), a, (22, 40), torch.float64)
    step = 1e-4 * torch.minimum(a, a.sqrt())
    below = lambda a: torch.special.gammainc(a, x)  # noqa: E731
    density = torch.exp((a - 1) * x.log() - x - torch.lgamma(a))
    expected = -(below(a + step) - below(a - step)) / (2 * step) / density
    usual = (x > 1e-200) & (below(a) > 1e-3) & (below(a) < 0.999)
    slope = x * slope_of_log(a.expand(x.shape), x.log())
    torch.testing.assert_close(slope[usual], expected[usual], rtol=2e-6, atol=0)


@pytest.mark.parametrize("a", [0.1, 1.0, 5.0, 300.0])
def test_gradients_of_expectations(a):
    a = torch.tensor(a, dtype=torch.float64)
    for power, slope in ((1, 1.0), (2, 2 * a + 1)):  # of E x = a and E x² = a (a + 1)
        f = lambda a, n=power: random.gamma(random.key(77), a, N, a.dtype) ** n  # noqa: E731
        slopes = jvp(f, (a,), (torch.ones_like(a),))[1]
        assert abs(slopes.mean() - slope) < 4 * slopes.std() / math.sqrt(N[0])


def test_gradients_of_relatives():
    a = torch.tensor(2.0, dtype=torch.float64)
    n = 20_000
    one = torch.ones_like(a)
    slopes = jvp(lambda a: random.beta(random.key(78), a, 3.0, (n,), a.dtype), (a,), (one,))[1]
    assert abs(slopes.mean() - 3 / 25) < 4 * slopes.std() / math.sqrt(n)  # of a / (a + 3)
    slopes = jvp(lambda b: random.beta(random.key(78), 3.0, b, (n,), a.dtype), (a,), (one,))[1]
    assert abs(slopes.mean() + 3 / 25) < 4 * slopes.std() / math.sqrt(n)
    alpha = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    f = lambda alpha: random.dirichlet(random.key(79), alpha, (n,), a.dtype).mean(0)  # noqa: E731
    expected = torch.eye(3, dtype=torch.float64) / 4 - alpha[:, None] / 16
    assert (jacrev(f)(alpha) - expected).abs().max() < 0.01
    df = torch.tensor(9.0, dtype=torch.float64)
    f = lambda df: random.t(random.key(80), df, (n,), df.dtype) ** 2  # noqa: E731
    slopes = jvp(f, (df,), (one,))[1]
    assert abs(slopes.mean() + 2 / 49) < 4 * slopes.std() / math.sqrt(n)  # of df / (df - 2)


def test_second_derivatives_are_those_along_the_path():
    a = A[3:-3]
    log_x = random.gamma(random.key(81), a, dtype=torch.float64).log()
    slope, step = slope_of_log(a, log_x), 1e-4 * a
    ends = [slope_of_log(a + s, log_x + s * slope) for s in (step, -step)]
    expected = (ends[0] - ends[1]) / (2 * step)
    move = lambda a, x: _marsaglia_tsang.with_derivative(a, x)  # noqa: E731
    second = vmap(grad(grad(move)))(a, log_x)
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-12)
    along = lambda f: lambda a, x: jvp(lambda a: f(a, x), (a,), (torch.ones_like(a),))[1]  # noqa: E731
    torch.testing.assert_close(vmap(along(along(move)))(a, log_x), second)
    torch.testing.assert_close(vmap(along(grad(move)))(a, log_x), second)
    assert vmap(hessian(move))(a, log_x).isfinite().all()


def test_far_out_and_16_bits_have_finite_gradients():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        a = torch.tensor([1e-5, 1e-2, 1.0, 100.0, 6e4], dtype=dtype)
        for f in (
            lambda a: random.gamma(random.key(1), a, (50, 5), a.dtype).float().sum(),
            lambda a: random.beta(random.key(1), a, 2.0, (50, 5), a.dtype).float().sum(),
            lambda a: random.dirichlet(random.key(1), a, (50,), a.dtype).float()[:, 0].sum(),
        ):
            assert grad(f)(a).isfinite().all()
    x = torch.tensor([-700.0, -30.0, 0.0, 5.0, 12.0], dtype=torch.float64)
    slope = slope_of_log(torch.ones_like(x), x)
    assert slope.isfinite().all() and (slope > 0).all()


def test_autograd_as_torch_func():
    a = torch.tensor([0.3, 4.0], dtype=torch.float64)
    f = lambda a: random.gamma(random.key(82), a, (3, 2), a.dtype).square().sum()  # noqa: E731
    a.requires_grad_()
    (first,) = torch.autograd.grad(f(a), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    torch.testing.assert_close(first.detach(), grad(f)(a.detach()))
    torch.testing.assert_close(second, grad(lambda a: grad(f)(a).sum())(a.detach()))


@pytest.mark.slow
def test_jitted_gradients():
    keys = random.split(random.key(83), 3)
    a = torch.tensor([0.3, 1.0, 20.0], dtype=torch.float64)

    def f(key, a):
        x, y = random.beta(key, a, a + 1, dtype=a.dtype), random.t(key, a, dtype=a.dtype)
        return x.sum() + y.sin().sum()

    g = vmap(grad(f, argnums=1), (0, None))
    compiled = jit(g)
    torch.testing.assert_close(compiled(keys, a), g(keys, a), rtol=1e-9, atol=1e-12)
    assert [(r.route, r.fallbacks) for r in compiled.report()] == [("one program", ())]
