"""Points of a ball, correlated normal numbers, orthogonal matrices."""

import math

import pytest
import torch
from torch.func import grad, vmap

from fdl import random
from tests.random.test_continuous import LIMIT
from tests.random.test_samplers import kolmogorov_smirnov, normal_cdf


@pytest.mark.parametrize(("d", "p"), [(1, 2), (3, 2), (2, 1.0), (4, 3.0)])
def test_a_ball_is_filled_uniformly(d, p):
    x = random.ball(random.key(51), d, p, (50_000,), torch.float64)
    norm = (x.abs() ** p).sum(-1) ** (1 / p)
    assert (norm <= 1).all()
    assert kolmogorov_smirnov(norm, lambda r: r**d) < LIMIT
    assert abs(x.sign().mean()) < 4 / math.sqrt(50_000 * d)


def test_a_ball_of_no_dimensions_and_gradients_by_its_norm():
    assert random.ball(random.key(1), 0, shape=(3,)).shape == (3, 0)
    f = lambda p: random.ball(random.key(1), 3, p, (9,), torch.float64).sum()  # noqa: E731
    p = torch.tensor(2.5, dtype=torch.float64)
    slope = (f(p + 1e-6) - f(p - 1e-6)) / 2e-6
    # The accepted proposals depend on p too: the gradient is of the same law, not of the same path.
    assert grad(f)(p).isfinite() and slope.isfinite()


@pytest.mark.parametrize(("n", "m"), [(3, None), (4, 2), (2, 4)])
def test_orthogonal_matrices(n, m):
    q = random.orthogonal(random.key(52), n, (20_000,), torch.float64, m)
    rows = n if m is None else min(n, m)
    product = q @ q.mT if m is None or n <= m else q.mT @ q
    torch.testing.assert_close(product, torch.eye(rows).double().expand_as(product))
    # A column of a uniform orthogonal matrix is uniform on the sphere.
    size = max(n, m or n)
    x = q[:, 0, 0]
    if size == 3:
        assert kolmogorov_smirnov(x, lambda x: (x + 1) / 2) < LIMIT
    else:  # of the sphere in 4 dimensions
        cdf = lambda x: 0.5 + (x * (1 - x * x).sqrt() + torch.asin(x)) / math.pi  # noqa: E731
        assert kolmogorov_smirnov(x, cdf) < LIMIT
    if m is None:
        assert abs(torch.linalg.det(q).sign().mean()) < 4 / math.sqrt(20_000)


COV = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "svd"])
def test_normal_vectors_have_their_mean_and_covariance(method):
    n = 100_000
    x = random.multivariate_normal(random.key(53), MEAN, COV, (n,), method=method)
    for i in range(3):
        z = (x[:, i] - MEAN[i]) / COV[i, i].sqrt()
        assert kolmogorov_smirnov(z, normal_cdf) < LIMIT
    deviation = ((COV.diagonal()[:, None] * COV.diagonal() + COV**2) / n).sqrt()
    assert ((torch.cov(x.mT) - COV).abs() < 4 * deviation).all()


@pytest.mark.parametrize("method", ["eigh", "svd"])
def test_a_singular_covariance(method):
    v = torch.tensor([1.0, 2.0, -1.0])
    x = random.multivariate_normal(
        random.key(54), torch.zeros(3), v[:, None] * v, (1000,), method=method
    )
    torch.testing.assert_close(x, x[:, :1] * v, rtol=0, atol=1e-4)


def test_no_factor_is_nan_and_so_is_its_gradient():
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    for method in ("cholesky", "eigh"):
        f = lambda c, m=method: random.multivariate_normal(  # noqa: E731
            random.key(1), torch.zeros(2), c, (5,), method=m
        )
        assert f(indefinite).isnan().all()
        assert grad(lambda c, f=f: f(c).sum())(indefinite).isnan().any()


def test_gradients_of_normal_vectors():
    f = lambda mean, cov: random.multivariate_normal(  # noqa: E731
        random.key(55), mean, (cov + cov.mT) / 2, (7,)
    )
    assert torch.autograd.gradcheck(f, (MEAN.requires_grad_(), COV.clone().requires_grad_()))
    torch.autograd.gradgradcheck(f, (MEAN, COV.clone().requires_grad_()))
    MEAN.requires_grad_(False)


def test_dtypes_and_shapes():
    key, mean, cov = random.key(1), torch.zeros(4, 1, 2), torch.eye(2).expand(3, 2, 2)
    assert random.multivariate_normal(key, mean, cov).shape == (4, 3, 2)
    assert random.multivariate_normal(key, mean, cov, (5, 4, 3)).shape == (5, 4, 3, 2)
    assert random.multivariate_normal(key, mean, cov.double()).dtype is torch.float64
    assert random.multivariate_normal(key, mean.half(), cov.half()).dtype is torch.float16
    assert random.multivariate_normal(key, mean[..., :0], cov[..., :0, :0]).shape == (4, 3, 0)
    assert random.orthogonal(key, 0, (2,)).shape == (2, 0, 0)
    assert random.orthogonal(key, 3, (0,), torch.bfloat16).shape == (0, 3, 3)


def test_members_of_a_batch_have_matrices_of_their_own():
    keys = random.split(random.key(2), 3)
    covs = torch.stack([COV, 2 * COV, COV])
    drawn = vmap(lambda k, c: random.multivariate_normal(k, MEAN, c, (2,)))(keys, covs)
    for key, cov, row in zip(keys, covs, drawn, strict=True):
        torch.testing.assert_close(row, random.multivariate_normal(key, MEAN, cov, (2,)))
