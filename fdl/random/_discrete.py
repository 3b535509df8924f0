"""Draws of integers and of given elements: random signs, choices, Poisson and binomial counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdl.random import _arithmetic, _checks, _counts, _samplers
from fdl.random._samplers import Key, Shape


def rademacher(key: Key, shape: Shape = (), dtype: torch.dtype = torch.int64) -> Tensor:
    """Draw -1 or 1 with equal probability.

    Equals JAX 0.5.0 and later without x64, whatever the dtype. With x64, JAX draws other signs.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: int64, int32, int16, int8, float32, float64, float16 or bfloat16.

    Returns:
        `dtype` of `shape`, values -1 and 1.

    >>> from fdl import random
    >>> random.rademacher(random.key(0), (5,))
    tensor([-1, -1,  1,  1, -1])
    """
    _checks.check_key("rademacher", key)
    _checks.check_dtype("rademacher", dtype, _arithmetic.SIGNED)
    return 2 * _samplers.bernoulli(key, 0.5, shape).to(dtype) - 1


def choice(
    key: Key,
    a: int | Tensor,
    shape: Shape = (),
    replace: bool = True,
    p: Tensor | None = None,
    axis: int = 0,
) -> Tensor:
    """Draw elements of a tensor, or of `range(a)`, with or without replacement.

    Equals JAX 0.5.0 and later: with replacement and without `p` that of x64, which draws `randint`
    of int64; with `p`, the rounding of a sum or a logarithm can decide a draw otherwise, about one
    in 100,000.

    Args:
        key: a key, int64 [2].
        a: a positive int n, or a tensor with n elements along `axis`.
        shape: shape of the draws.
        replace: whether an element can be drawn more than once. If not, the product of `shape` must
            be at most n.
        p: probabilities of the elements, floating [n], positive or 0; they are divided by their
            sum. Those of 16 bits are converted to float32. Without replacement, elements are drawn
            one after the other, in proportion to the probabilities of those left, and 0 is drawn
            when nothing else is left.
        axis: axis of the tensor from which elements are drawn, as a whole.

    Returns:
        For an int, int64 of `shape`; for a tensor, its dtype and its shape with `shape` in place of
        `axis`.

    >>> from fdl import random
    >>> random.choice(random.key(0), 10, (3,), replace=False)
    tensor([0, 1, 8])
    >>> random.choice(random.key(0), torch.tensor([2.0, 3.0, 5.0]), (4,), p=torch.ones(3) / 3)
    tensor([2., 2., 5., 3.])
    """
    _checks.check_key("choice", key)
    shape = _checks.check_shape("choice", shape)
    n, axis = _checks.check_population("choice", a, axis, shape, replace)
    if p is not None:
        _checks.check_probabilities("choice", p, n)
    index = _draw_index(key, n, shape, replace, p)
    return a[(slice(None),) * axis + (index,)] if isinstance(a, Tensor) else index


def _draw_index(
    key: Key, n: int, shape: tuple[int, ...], replace: bool, p: Tensor | None
) -> Tensor:
    draws = math.prod(shape)
    if not draws:
        return torch.zeros(shape, dtype=torch.int64, device=key.device)
    if p is None:
        if replace:
            return _samplers.randint(key, shape, 0, n)
        return _samplers.permutation(key, n)[:draws].reshape(shape)
    p = p.to(_arithmetic.working_dtype(p.dtype))
    if replace:
        total = p.cumsum(0)
        u = _arithmetic.unit(key, shape, p.dtype)
        return torch.searchsorted(total, total[-1] * (1 - u))
    # The largest of log p plus Gumbel noise are draws without replacement; equal ones in order.
    noise = -torch.log(-torch.log(_arithmetic.positive(key, (n,), p.dtype)))
    order = torch.sort(noise + torch.log(p), descending=True, stable=True).indices
    return order[:draws].reshape(shape)


def poisson(
    key: Key, lam: float | Tensor, shape: Shape | None = None, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Draw from the Poisson distribution with mean `lam`.

    Knuth's method below a mean of 10, above it the transformed rejection of W. Hörmann ("The
    transformed rejection method for generating Poisson random variables", Insurance: Mathematics
    and Economics 12, 1993), with the keys of JAX 0.5.0 and later. Of its draws with mean 1,000 one
    in 5,000 differs: JAX tests for acceptance in float32, which distorts the distribution for large
    means (a variance 6 % too large for 4 million); here the test is float64. As in JAX, a draw
    depends on the shape and on the other means, since proposals are made until each element has
    accepted one. Draws do not depend on `dtype`, nor on x64 in JAX.

    Args:
        key: a key, int64 [2].
        lam: mean, a number from 0 on or a tensor that broadcasts to `shape`, converted to float32.
            The result is -1 where a tensor is negative or NaN. No gradient flows to it.
        shape: shape of the result; by default that of `lam`.
        dtype: int64, int32, int16, int8 or uint8, which must be wide enough for the draws.

    Returns:
        `dtype` of `shape`. Numbers from 2**24 on are even, since they are float32 before.

    >>> from fdl import random
    >>> random.poisson(random.key(0), 3.0, (5,))
    tensor([0, 0, 4, 4, 1])
    """
    _checks.check_key("poisson", key)
    _checks.check_dtype("poisson", dtype, _arithmetic.INTEGERS)
    shape = _checks.check_parameters("poisson", shape, lam=lam)
    _checks.check_not_negative("poisson", "lam", lam)
    lam = _arithmetic.cast(lam, torch.float32, key).detach().expand(shape)
    return _counts.poisson(key, lam).to(dtype)


def binomial(
    key: Key,
    n: float | Tensor,
    p: float | Tensor,
    shape: Shape | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw how many of `n` trials succeed, each with probability `p`.

    Sums of geometric numbers for a mean of at most 10, above it the transformed rejection of
    W. Hörmann ("The generation of binomial random variates", Journal of Statistical Computation and
    Simulation 46, 1993), with the keys of JAX 0.5.0 and later. Of its draws with `n` 100,000 one in
    400 differs: JAX tests for acceptance in float32, here it is float64. As in JAX, a draw depends
    on the shape and on the other parameters, since proposals are made until each element has
    accepted one. The default dtype gives the draws of JAX without x64; with x64 it draws float64.

    Args:
        key: a key, int64 [2].
        n: number of trials, a number from 0 on or a tensor that broadcasts to `shape`; fractions
            are dropped. The result is NaN where a tensor is negative or NaN, and ∞ where it is ∞.
        p: probability of success, a number in [0, 1] or a floating tensor that broadcasts to
            `shape`; NaN where it is negative or NaN. No gradient flows to it.
        shape: shape of the result; by default the broadcast shape of `n` and `p`.
        dtype: float32, float64, float16 or bfloat16, as in JAX. 16-bit draws are those of float32,
            rounded.

    Returns:
        `dtype` of `shape`, whole numbers.

    >>> from fdl import random
    >>> random.binomial(random.key(0), 10, 0.5, (5,))
    tensor([6., 7., 5., 6., 7.])
    """
    _checks.check_key("binomial", key)
    _checks.check_dtype("binomial", dtype, _arithmetic.FLOATS)
    shape = _checks.check_parameters("binomial", shape, n=n, p=p)
    _checks.check_not_negative("binomial", "n", n)
    _checks.check_probability("binomial", p)
    working = _arithmetic.working_dtype(dtype)
    n, p = (_arithmetic.cast(x, working, key).detach().expand(shape) for x in (n, p))
    return _counts.binomial(key, n, p).to(dtype)
