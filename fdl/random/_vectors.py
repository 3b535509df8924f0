"""Draws of vectors and matrices: from a ball, correlated normal numbers, orthogonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl.random import _arithmetic, _checks, _samplers
from fdl.random._continuous import exponential
from fdl.random._gamma import gamma
from fdl.random._samplers import Key, Shape


def ball(
    key: Key, d: int, p: float | Tensor = 2, shape: Shape = (), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw points uniformly from the unit ball of the Lp norm.

    Agrees with JAX 0.5.0 and later as `gamma` does. Gradients flow to `p`. The method is that of
    F. Barthe, O. Guédon, S. Mendelson and A. Naor, "A probabilistic approach to the geometry of the
    lp-ball", Annals of Probability 33 (2005).

    Args:
        key: a key, int64 [2].
        d: dimension of the ball, a non-negative int.
        p: which norm, a positive number or a 0-d tensor.
        shape: shape of the result without its last axis.
        dtype: float32, float64, float16 or bfloat16. 16-bit draws are those of float32, rounded.

    Returns:
        `dtype` of `shape` and d.

    >>> from fdl import random
    >>> random.ball(random.key(0), 3).norm() <= 1
    tensor(True)
    """
    shape = _checks.check_draw("ball", key, shape, dtype)
    _checks.check_count("ball", "d", d)
    _checks.check_parameters("ball", (), p=p)
    _checks.check_positive("ball", p=p)
    working = _arithmetic.working_dtype(dtype)
    p = _arithmetic.cast(p, working, key)
    direction_key, exponential_key = _samplers.split(key).unbind()
    gamma_key, sign_key = _samplers.split(direction_key).unbind()
    # Numbers with density proportional to exp(-|x| ** p).
    size = gamma(gamma_key, 1 / p, (*shape, d), working) ** (1 / p)
    is_positive = _arithmetic.unit(sign_key, (*shape, d), working) < 0.5
    x = torch.where(is_positive, size, -size)
    total = (size**p).sum(-1) + exponential(exponential_key, shape, working)
    return (x / (total ** (1 / p)).unsqueeze(-1)).to(dtype)


def orthogonal(
    key: Key,
    n: int,
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
    m: int | None = None,
) -> Tensor:
    """Draw orthogonal matrices uniformly, by Haar measure.

    Within 1e-5 (1e-14 in float64) per row of JAX 0.5.0 and later: the factor Q of a normal matrix,
    with the signs for which the diagonal of R is positive (F. Mezzadri, "How to generate random
    matrices from the classical compact groups", Notices of the AMS 54, 2007).

    Args:
        key: a key, int64 [2].
        n: number of rows.
        shape: shape of the result without its last two axes.
        dtype: float32, float64, float16 or bfloat16. 16-bit draws are those of float32, rounded.
        m: number of columns; by default n.

    Returns:
        `dtype` of `shape`, n and m: the rows are orthonormal if n ≤ m, the columns if n ≥ m.

    >>> from fdl import random
    >>> q = random.orthogonal(random.key(0), 3)
    >>> torch.allclose(q @ q.mT, torch.eye(3), atol=1e-6)
    True
    """
    shape = _checks.check_draw("orthogonal", key, shape, dtype)
    m = n if m is None else m
    _checks.check_count("orthogonal", "n", n)
    _checks.check_count("orthogonal", "m", m)
    working = _arithmetic.working_dtype(dtype)
    q, r = torch.linalg.qr(_samplers.normal(key, (*shape, max(n, m), min(n, m)), working))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return (q.mT if n < m else q).to(dtype)


FACTORS = ("cholesky", "eigh", "svd")


def multivariate_normal(
    key: Key,
    mean: Tensor,
    cov: Tensor,
    shape: Shape | None = None,
    dtype: torch.dtype | None = None,
    method: str = "cholesky",
) -> Tensor:
    """Draw vectors from the normal distribution with a mean and a covariance.

    With "cholesky", draws are within a few units in the last place of the largest summand of those
    of JAX 0.5.0 and later; the columns of the other factors have signs of their own in each
    library. Gradients flow to `mean` and `cov`.

    Args:
        key: a key, int64 [2].
        mean: floating [..., n].
        cov: symmetric and positive definite, floating [..., n, n]. It may be singular for "eigh"
            and "svd". The result is NaN if there is no factor.
        shape: shape of the result without its last axis, to which the axes before these broadcast;
            by default the shape to which they broadcast together.
        dtype: float32, float64, float16 or bfloat16; by default the dtype to which those of `mean`
            and `cov` promote. 16-bit draws are those of float32, rounded.
        method: "cholesky", "eigh" or "svd", for a factor of `cov`.

    Returns:
        `dtype` of `shape` and n.

    >>> from fdl import random
    >>> cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> random.multivariate_normal(random.key(0), torch.zeros(2), cov, (2,)).shape
    torch.Size([2, 2])
    """
    caller = "multivariate_normal"
    _checks.check_key(caller, key)
    _checks.check_axes(caller, "mean", mean, 1)
    _checks.check_axes(caller, "cov", cov, 2)
    n = mean.shape[-1]
    if cov.shape[-2:] != (n, n):
        raise ValueError(
            f"{caller}: `cov` expected shape (..., {n}, {n}) for `mean` of shape "
            f"{tuple(mean.shape)}, got {_checks.describe(cov)}"
        )
    if method not in FACTORS:
        raise ValueError(f"{caller}: `method` expected 'cholesky', 'eigh' or 'svd', got {method!r}")
    dtype = torch.promote_types(mean.dtype, cov.dtype) if dtype is None else dtype
    _checks.check_dtype(caller, dtype, _arithmetic.FLOATS)
    batches = {"mean[..., 0]": mean.shape[:-1], "cov[..., 0, 0]": cov.shape[:-2]}
    shape = _checks.common_shape(caller, shape, batches)
    working = _arithmetic.working_dtype(dtype)
    x = _samplers.normal(key, (*shape, n), working)
    y = (_factor(cov.to(working), method) @ x.unsqueeze(-1)).squeeze(-1)
    return (mean.to(working) + y).to(dtype)


def _factor(cov: Tensor, method: str) -> Tensor:
    """Factor a matrix into one times its transpose; NaN where that is impossible."""
    if method == "cholesky":
        factor, failed_at = torch.linalg.cholesky_ex(cov)
        return factor * torch.where(failed_at > 0, torch.nan, 1.0).unsqueeze(-1).unsqueeze(-1)
    if method == "eigh":
        values, vectors = torch.linalg.eigh(cov)
    else:
        vectors, values, _ = torch.linalg.svd(cov)
    # Rounding makes an eigenvalue 0 a little negative.
    sizes = values.detach().abs()
    is_zero = sizes <= 4 * torch.finfo(cov.dtype).eps * sizes.sum(-1, keepdim=True)
    roots = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, values).sqrt())
    return vectors * roots.unsqueeze(-2)
