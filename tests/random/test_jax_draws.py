"""The draws beyond uniform and normal ones, against ``jax.random``, where JAX is installed."""

import numpy as np
import pytest
import torch

from fdl import random

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")

from tests.random.test_jax import assert_same, jax_key, ulps, x64  # noqa: E402

WIDE = {"float64", "int64", "uint64"}
N = (20_000,)


def theirs(name, seed, *args, dtype="float32", **kwargs):
    """Draw with JAX, with x64 where the dtype needs it; 16 bits as float32."""
    with x64(dtype in WIDE):
        args = [jnp.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x for x in args]
        drawn = np.asarray(getattr(jax.random, name)(jax_key(seed), *args, dtype=dtype, **kwargs))
    return drawn.astype(np.float32) if dtype in ("float16", "bfloat16") else drawn


def ours(name, seed, *args, dtype="float32", **kwargs):
    drawn = getattr(random, name)(random.key(seed), *args, dtype=getattr(torch, dtype), **kwargs)
    return (drawn.float() if dtype in ("float16", "bfloat16") else drawn).numpy()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (4, 0)])
def test_bits_of_every_width(dtype, shape):
    np.testing.assert_array_equal(
        ours("bits", 3, shape, dtype=dtype), theirs("bits", 3, shape, dtype=dtype)
    )


def test_signs_without_x64():
    for shape in ((), (1000,), (3, 0)):
        expected = theirs("rademacher", 4, shape, dtype="int32")
        for dtype in ("int64", "int32", "int16", "int8", "float32", "float64", "bfloat16"):
            drawn = ours("rademacher", 4, shape, dtype=dtype)
            np.testing.assert_array_equal(drawn.astype(np.int32), expected)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_choices_without_probabilities(shape, replace, axis):
    x = np.random.default_rng(0).normal(size=(9, 8, 10)).astype(np.float32)
    key = random.key(5)
    with x64(True):
        one = jax.random.choice(jax_key(5), 11, shape, replace)
        rows = jax.random.choice(jax_key(5), x, shape, replace, axis=axis)
    assert_same(random.choice(key, 11, shape, replace), np.asarray(one))
    drawn = random.choice(key, torch.from_numpy(x), shape, replace, axis=axis)
    assert_same(drawn, np.asarray(rows))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [5, 1000])
def test_choices_with_probabilities(n, dtype):
    p = np.random.default_rng(1).exponential(size=n).astype(dtype)
    p[1] = 0
    p /= p.sum()
    key, tensor = random.key(6), torch.from_numpy(p)
    with x64(dtype == "float64"):
        drawn = np.asarray(jax.random.choice(jax_key(6), n, (50_000,), p=jnp.asarray(p)))
        few = np.asarray(jax.random.choice(jax_key(6), n, (4,), replace=False, p=jnp.asarray(p)))
    assert (random.choice(key, n, (50_000,), p=tensor).numpy() != drawn).mean() < 1e-3
    np.testing.assert_array_equal(random.choice(key, n, (4,), False, tensor).numpy(), few)


# Units in the last place that XLA and torch are apart: in float64 due to XLA's log1p.
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 4), ("float64", 256), ("float16", 2), ("bfloat16", 2)]
)
@pytest.mark.parametrize("name", ["exponential", "laplace"])
def test_draws_within_units_in_the_last_place(name, dtype, limit):
    a, b = (draw(name, 7, N, dtype=dtype) for draw in (ours, theirs))
    if dtype in ("float16", "bfloat16"):
        eps = torch.finfo(getattr(torch, dtype)).eps
        np.testing.assert_allclose(a, b, rtol=limit * eps, atol=0)
    else:
        assert ulps(a, b) <= limit


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "kwargs"), [("gumbel", {}), ("gumbel", {"mode": "high"}), ("logistic", {})]
)
def test_logarithms_of_numbers_within_units_in_the_last_place(name, kwargs, dtype):
    a, b = (draw(name, 8, N, dtype=dtype, **kwargs) for draw in (ours, theirs))
    eps = torch.finfo(getattr(torch, dtype)).eps
    units = 256 if dtype == "float64" else 4
    np.testing.assert_allclose(a, b, rtol=units * eps, atol=units * eps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_angles_of_cauchy_draws(dtype):
    a, b = (draw("cauchy", 9, N, dtype=dtype) for draw in (ours, theirs))
    eps = torch.finfo(getattr(torch, dtype)).eps
    np.testing.assert_allclose(np.arctan(a), np.arctan(b), rtol=0, atol=2 * eps)


CONCENTRATIONS = [0.01, 0.3, 1.0, 1.5, 7.0, 1e4]


def assert_mostly_close(a, b, dtype, rtol, atol=0.0, differing=2e-4):
    rtol, atol = (x if dtype == "float32" else x * 1e-8 for x in (rtol, atol))
    atol += 4 * np.finfo(dtype).tiny  # XLA rounds subnormal numbers to 0
    assert a.dtype == b.dtype and a.shape == b.shape
    assert (~np.isclose(a, b, rtol, atol)).sum() <= differing * a.size


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("a", CONCENTRATIONS)
def test_gamma(a, dtype):
    drawn = [d("gamma", 10, a, N, dtype=dtype) for d in (ours, theirs)]
    # Below 1 a draw has a factor u ** (1 / a).
    assert_mostly_close(*drawn, dtype, 2e-5 / min(a, 1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gamma_of_many_concentrations(dtype):
    a = torch.tensor(CONCENTRATIONS, dtype=getattr(torch, dtype))
    for shape in (None, (500, 6), (2, 250, 6), (0, 6)):
        drawn = [d("gamma", 11, a, shape, dtype=dtype) for d in (ours, theirs)]
        assert_mostly_close(*drawn, dtype, 2e-3, differing=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("a", "b"), [(2.0, 3.0), (0.01, 0.02), (50.0, 0.5)])
def test_beta(a, b, dtype):
    drawn = [d("beta", 12, a, b, N, dtype=dtype) for d in (ours, theirs)]
    # Both logarithms are as large as log(u) / a, and so are the errors.
    assert_mostly_close(*drawn, dtype, 2e-5 / min(a, b, 1), differing=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dirichlet(dtype):
    alpha = torch.tensor([[0.5, 1.0, 2.0], [9.0, 9.0, 0.1]], dtype=getattr(torch, dtype))
    for shape in (None, (4000, 2)):
        drawn = [d("dirichlet", 13, alpha, shape, dtype=dtype) for d in (ours, theirs)]
        assert_mostly_close(*drawn, dtype, 2e-4, 1e-30, differing=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("df", [0.5, 4.0, 300.0])
def test_t(df, dtype):
    drawn = [d("t", 14, df, N, dtype=dtype) for d in (ours, theirs)]
    assert_mostly_close(*drawn, dtype, 4e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("d", "p"), [(3, 2), (2, 1.0), (5, 3.5), (0, 2)])
def test_ball(d, p, dtype):
    drawn = [draw("ball", 15, d, p, (3000,), dtype=dtype) for draw in (ours, theirs)]
    assert_mostly_close(*drawn, dtype, 1e-4, 1e-6, differing=1e-3)


@pytest.mark.parametrize("lam", [0.0, 0.3, 4.0, 9.99, 10.0, 45.0, 1000.0])
def test_poisson(lam):
    drawn = [d("poisson", 16, lam, N, dtype="int32") for d in (ours, theirs)]
    assert (drawn[0] != drawn[1]).mean() < (3e-3 if lam == 1000 else 3e-4)


def test_poisson_of_many_means():
    lam = torch.tensor([0.0, -1.0, torch.nan, 3.0, 30.0, 1.0])
    drawn = [d("poisson", 17, lam, (1000, 6), dtype="int32") for d in (ours, theirs)]
    assert (drawn[0] != drawn[1]).mean() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("n", "p"), [(0, 0.5), (20, 0.0), (20, 1.0), (20, 0.3), (100, 0.02), (100, 0.4), (1000, 0.7)]
)
def test_binomial(n, p, dtype):
    drawn = [d("binomial", 18, n, p, N, dtype=dtype) for d in (ours, theirs)]
    assert (drawn[0] != drawn[1]).mean() < 5e-4


def test_binomial_of_what_is_not_a_number():
    n = torch.tensor([10.0, -1.0, torch.nan, torch.inf, 10.0, 10.0, 10.0, 4.7])
    p = torch.tensor([0.4, 0.4, 0.4, 0.4, -0.1, 1.1, torch.nan, 0.5])
    drawn = [d("binomial", 19, n, p, (200, 8)) for d in (ours, theirs)]
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "m"), [(4, None), (5, 3), (2, 6), (0, 3)])
def test_orthogonal(n, m, dtype):
    drawn = [d("orthogonal", 20, n, (7,), dtype=dtype, m=m) for d in (ours, theirs)]
    np.testing.assert_allclose(*drawn, rtol=0, atol=1e-4 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_multivariate_normal(dtype):
    root = np.random.default_rng(2).normal(size=(5, 3, 3)).astype(dtype)
    cov, mean = torch.from_numpy(root @ root.mT + np.eye(3, dtype=dtype)), torch.arange(3.0)
    mean = mean.to(cov.dtype)
    for shape in (None, (400, 5)):
        drawn = [
            d("multivariate_normal", 21, mean, cov, shape, dtype=dtype) for d in (ours, theirs)
        ]
        tolerance = 2e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(*drawn, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_gamma(dtype):
    """Those of JAX, whose series and continued fraction are another way to compute them."""
    a = torch.logspace(-3, 3, 61, dtype=getattr(torch, dtype))
    key = random.key(22)
    mine = torch.func.grad(lambda a: random.gamma(key, a, (20, 61), a.dtype).sum())(a)
    with x64(dtype == "float64"):
        other = jax.grad(lambda a: jax.random.gamma(jax_key(22), a, (20, 61), dtype).sum())
        expected = np.asarray(other(jnp.asarray(a.numpy())))
    rtol = 1e-3 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(mine.numpy(), expected, rtol=rtol)
