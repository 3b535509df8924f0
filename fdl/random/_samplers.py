"""Keys and samplers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fdl.random import _checks, _threefry

Key: TypeAlias = Tensor  # int64 [2], values in [0, 2**32)
Shape: TypeAlias = Sequence[int]


def key(seed: int, device: torch.device | str | None = None) -> Key:
    """Make a key from an integer seed.

    The seed's high and low 32 bits become the two words. A negative seed is taken modulo 2**64, so
    `key(-1)` is `key(2**64 - 1)`. This is `jax.random.key` with x64 enabled; without x64 JAX
    drops the high word, which changes seeds that are negative or need more than 32 bits.

    Args:
        seed: an int in [-2**63, 2**64).
        device: where the key lives; everything drawn from it lives there too.

    Returns:
        A key, int64 [2].

    >>> key(7), key(2**32 + 5)
    (tensor([0, 7]), tensor([1, 5]))
    """
    if not isinstance(seed, int):
        raise TypeError(
            f"key: `seed` expected an int, got {_checks.describe(seed)}; "
            "to derive a key from a tensor use fold_in(key, tensor)"
        )
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"key: `seed` must be in [-2**63, 2**64), got {seed}")
    return torch.tensor(
        [(seed >> 32) & _threefry.MASK, seed & _threefry.MASK], dtype=torch.int64, device=device
    )


def split(key: Key, n: int = 2) -> Tensor:
    """Split one key into `n` independent ones; the parent is then used up.

    Args:
        key: a key, int64 [2].
        n: how many, a non-negative int.

    Returns:
        The children, int64 [n, 2]; unpack them or index the first axis.

    >>> init_key, run_key = split(key(0))
    >>> init_key
    tensor([1797259609, 2579123966])
    """
    _checks.check_key("split", key)
    _checks.check_count("split", "n", n)
    return torch.stack(_threefry.encrypted_counters(key, (n,)), -1)


def fold_in(key: Key, data: int | Tensor) -> Key:
    """Derive a new key from a key and a number, such as a step count, an epoch or a rank.

    Number i gives the i-th child of `split`: on one key, fold in or split, never both.

    Args:
        key: a key, int64 [2].
        data: an int in [0, 2**32), or a 0-d integer tensor, whose low 32 bits count.

    Returns:
        A key, int64 [2].

    >>> fold_in(key(0), 1)
    tensor([ 928981903, 3453687069])
    >>> step = torch.tensor(1)
    >>> fold_in(key(0), step)
    tensor([ 928981903, 3453687069])
    """
    _checks.check_key("fold_in", key)
    return torch.stack(_threefry.threefry2x32(key[0], key[1], 0, _checks.folded_word(data)))


def bits(key: Key, shape: Shape = ()) -> Tensor:
    """Draw uniform 32-bit words.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.

    Returns:
        int64 of `shape`, values in [0, 2**32).

    >>> bits(key(0), (3,))
    tensor([4070199207, 4202968722, 1427181096])
    """
    _checks.check_key("bits", key)
    return _threefry.words(key, _checks.check_shape("bits", shape), 32)


def uniform(
    key: Key,
    shape: Shape = (),
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw uniformly from [low, high).

    On [0, 1) the values are multiples of 2**-23 (float32; -52 for float64, -10 for float16, -7 for
    bfloat16) and the same bits everywhere. Other bounds cost one rounding more, which may return
    `high` itself where |low| is far larger than `high - low`.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        low: lower bound, a number or a tensor that broadcasts to `shape`.
        high: upper bound, likewise. Gradients flow to both bounds.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        `dtype` of `shape`.

    >>> uniform(key(0), (2, 3), low=-1.0)
    tensor([[ 0.8953,  0.9572, -0.3354],
            [-0.0627,  0.1398, -0.6690]])
    """
    _checks.check_key("uniform", key)
    shape = _checks.check_shape("uniform", shape)
    _checks.check_dtype("uniform", dtype, _threefry.FLOATS)
    _checks.check_bounds("uniform", shape, low=low, high=high)
    return _threefry.uniform(key, shape, low, high, dtype).to(dtype)


def normal(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the standard normal distribution, by inverting its distribution function.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: float32, float64, float16 or bfloat16. A bfloat16 draw uses 7 random bits and reaches
            ±2.9 at most, as in JAX: where tails matter, draw float32 and cast.

    Returns:
        `dtype` of `shape`, within 4 units in the last place between eager, compiled and devices
        (and JAX in float32; in float64 XLA's own log1p leaves up to 30).

    >>> normal(key(0), (3,))
    tensor([ 1.6226,  2.0253, -0.4336])
    """
    _checks.check_key("normal", key)
    shape = _checks.check_shape("normal", shape)
    _checks.check_dtype("normal", dtype, _threefry.FLOATS)
    mantissa = _threefry.FLOATS[dtype][1]
    # An odd numerator over 2**(mantissa + 1): exact in `dtype`, strictly inside (-1, 1), never 0.
    numerator = 4 * _threefry.mantissas(key, shape, dtype) + 1 - 2 ** (mantissa + 1)
    u = numerator.to(_threefry.working_dtype(dtype)) * 2.0 ** -(mantissa + 1)
    return (math.sqrt(2) * _threefry.erfinv(u)).to(dtype)


def truncated_normal(
    key: Key,
    lower: float | Tensor,
    upper: float | Tensor,
    shape: Shape | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw from the standard normal distribution conditioned on (lower, upper).

    Draws agree with `jax.random.truncated_normal` but in the tails: where both bounds are beyond 3
    (7 in float64) on one side, the formula of JAX has few values left, from 5 on eleven of them,
    and another one is used, which is right however far out.

    Args:
        key: a key, int64 [2].
        lower: lower bound, a number or a tensor that broadcasts to `shape`; may be -inf.
        upper: upper bound, likewise. Gradients flow to both bounds.
        shape: shape of the result; by default that of the bounds, broadcast.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        `dtype` of `shape`, inside the open interval (in 16 bits a draw may round to a bound).

    >>> truncated_normal(key(0), -2, 2, (3,))
    tensor([ 1.4560,  1.7147, -0.4127])
    """
    _checks.check_key("truncated_normal", key)
    _checks.check_dtype("truncated_normal", dtype, _threefry.FLOATS)
    if shape is None:
        shape = torch.broadcast_shapes(*(b.shape for b in (lower, upper) if isinstance(b, Tensor)))
    shape = _checks.check_shape("truncated_normal", shape)
    _checks.check_bounds("truncated_normal", shape, lower=lower, upper=upper)
    working = _threefry.working_dtype(dtype)
    x = _threefry.truncated(key, shape, lower, upper, dtype)
    lower, upper = _threefry.cast(lower, working, key), _threefry.cast(upper, working, key)
    # Rounding must not carry a draw onto or past a bound; nextafter itself has no derivative.
    inf = torch.full_like(lower, math.inf)
    first = torch.nextafter(lower.detach(), inf)
    last = torch.nextafter(upper.detach(), -inf)
    return torch.minimum(torch.maximum(x, first), last).to(dtype)


def bernoulli(key: Key, p: float | Tensor = 0.5, shape: Shape | None = None) -> Tensor:
    """Draw True with probability `p`.

    Args:
        key: a key, int64 [2].
        p: probability of True, a number in [0, 1] (compared in float32) or a floating tensor that
            broadcasts to `shape` (compared in its own dtype, which limits how small it can be).
        shape: shape of the result; by default that of `p`.

    Returns:
        bool of `shape`.

    >>> bernoulli(key(0), 0.8, (5,))
    tensor([False, False,  True,  True,  True])
    """
    _checks.check_key("bernoulli", key)
    _checks.check_probability(p)
    dtype, default = (p.dtype, p.shape) if isinstance(p, Tensor) else (torch.float32, ())
    shape = _checks.check_shape("bernoulli", default if shape is None else shape)
    _checks.check_broadcast("bernoulli", "p", p, shape)
    # Both sides are exact in the working dtype, so the comparison is the one in p's own dtype.
    working = _threefry.working_dtype(dtype)
    return _threefry.unit(key, shape, dtype) < _threefry.cast(p, dtype, key).to(working)


def randint(
    key: Key,
    shape: Shape,
    low: int | Tensor,
    high: int | Tensor,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Draw integers from low, ..., high - 1.

    Draws are those of `jax.random.randint` for the same dtype. JAX's default dtype is int32, or
    int64 with x64 enabled, as here: without x64 its default is `dtype=torch.int32`. The two widths
    draw other numbers from the same key.

    A draw is a random number of twice the width modulo the span, in arithmetic of the single width.
    That leaves no bias to speak of for spans up to 2**16 (int32 and narrower) or 2**32 (int64).
    Above, some values are up to twice as probable as others, the more the closer the span is to
    2**32 (2**64): of int32 draws below 10**9 the first 294,967,296 have 5 chances where others
    have 4. Draw such spans as int64.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        low: smallest value, an int or an integer tensor that broadcasts to `shape`.
        high: one more than the largest value, likewise. Tensor bounds are clipped to `dtype`'s
            range; where they leave nothing between them, `low` is returned.
        dtype: int64, int32, int16, int8 or uint8.

    Returns:
        `dtype` of `shape`.

    >>> randint(key(0), (5,), 0, 10)
    tensor([5, 1, 5, 7, 3])
    """
    _checks.check_key("randint", key)
    shape = _checks.check_shape("randint", shape)
    _checks.check_dtype("randint", dtype, _threefry.INTEGERS)
    _checks.check_bounds("randint", shape, low=low, high=high)
    # With the last value included, the full range of int64 needs no 65th bit.
    first = _threefry.cast(_checks.inclusive_bound("low", low, 0, dtype), torch.int64, key)
    last = _threefry.cast(_checks.inclusive_bound("high", high, 1, dtype), torch.int64, key)

    width = 64 if dtype is torch.int64 else 32
    wrap = -1 if width == 64 else _threefry.MASK
    span = torch.where(last < first, 1, last - first + 1) & wrap  # 0 stands for 2**width
    above, below = (_threefry.words(child, shape, width) for child in split(key).unbind())
    # (above * 2**width + below) mod span, in `width` bits: 2**width mod span is the square of its
    # root's remainder. The square may wrap; so it does in JAX.
    root = _threefry.remainder(torch.full_like(span, 2 ** (width // 2)), span)
    factor = _threefry.remainder((root * root) & wrap, span)
    offset = (_threefry.remainder(above, span) * factor + _threefry.remainder(below, span)) & wrap
    return (first + _threefry.remainder(offset, span)).to(dtype)


def permutation(key: Key, x: int | Tensor) -> Tensor:
    """Shuffle `range(x)`, or the rows of a tensor.

    Args:
        key: a key, int64 [2].
        x: a non-negative int n, or a tensor with at least one axis.

    Returns:
        For an int, a permutation of 0, ..., n - 1, int64 [n]; for a tensor, `x` reordered along
        axis 0.

    >>> permutation(key(0), 6)
    tensor([0, 1, 5, 4, 3, 2])
    """
    _checks.check_key("permutation", key)
    if isinstance(x, Tensor):
        if x.ndim == 0:
            raise ValueError(
                "permutation: `x` expected at least one axis, got a 0-d tensor; "
                "to permute range(n) pass n as an int"
            )
        return x[permutation(key, x.shape[0])]
    _checks.check_count("permutation", "x", x)
    # Sorting by random words shuffles, but for ties. Enough rounds, each with new words, that no
    # pair is likely to tie in all of them: the words spent on an element number n**3 or more.
    rounds = math.ceil(3 * math.log(max(x, 1)) / math.log(2**32 - 1))
    order = torch.arange(x, device=key.device)
    for _ in range(rounds):
        key, subkey = split(key).unbind()
        order = order[torch.sort(_threefry.words(subkey, (x,), 32), stable=True).indices]
    return order


def categorical(key: Key, logits: Tensor, shape: Shape | None = None) -> Tensor:
    """Draw class indices with probabilities `softmax(logits, -1)`, by the Gumbel-max trick.

    Args:
        key: a key, int64 [2].
        logits: unnormalised log-probabilities, floating [*batch, classes]; -inf excludes a class.
            16-bit logits are raised to float32 first.
        shape: shape of the result; `batch` must broadcast to it. By default `batch`.

    Returns:
        int64 of `shape`, values in 0, ..., classes - 1.

    >>> logits = torch.tensor([0.0, 3.0, -torch.inf])
    >>> categorical(key(0), logits, (6,))
    tensor([1, 1, 1, 1, 1, 1])
    """
    _checks.check_key("categorical", key)
    _checks.check_logits(logits)
    shape = _checks.check_shape("categorical", logits.shape[:-1] if shape is None else shape)
    _checks.check_broadcast("categorical", "logits[..., 0]", logits[..., 0], shape)
    logits = logits.to(_threefry.working_dtype(logits.dtype))
    u = _threefry.unit(key, (*shape, logits.shape[-1]), logits.dtype)
    gumbel = -torch.log(-torch.log(u.clamp(min=torch.finfo(u.dtype).tiny)))
    return (logits + gumbel).argmax(-1)
