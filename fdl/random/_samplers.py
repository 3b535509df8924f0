"""Keys and samplers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fdl._threefry import MASK, encrypted_counters, threefry2x32
from fdl.random import _arithmetic, _checks

Key: TypeAlias = Tensor  # int64 [2], values in [0, 2**32)
Shape: TypeAlias = Sequence[int]


def key(seed: int, device: torch.device | str | None = None) -> Key:
    """Make a key from an integer seed.

    The high and low 32 bits of the seed become the two words. A negative seed is taken modulo
    2**64, so `key(-1)` equals `key(2**64 - 1)`. The key equals that of `jax.random.key` with x64
    enabled. Without x64, JAX drops the high word of seeds that are negative or exceed 32 bits.

    Args:
        seed: an int in [-2**63, 2**64).
        device: device of the key, and of everything drawn from it.

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
    return torch.tensor([(seed >> 32) & MASK, seed & MASK], dtype=torch.int64, device=device)


def split(key: Key, num: int = 2) -> Tensor:
    """Split one key into `num` independent keys, and do not use it again.

    Args:
        key: a key, int64 [2].
        num: number of keys, a non-negative int.

    Returns:
        The new keys, int64 [num, 2]; unpack them or index the first axis.

    >>> init_key, run_key = split(key(0))
    >>> init_key
    tensor([1797259609, 2579123966])
    """
    _checks.check_key("split", key)
    _checks.check_count("split", "num", num)
    return torch.stack(encrypted_counters(key, (num,)), -1)


def fold_in(key: Key, data: int | Tensor) -> Key:
    """Derive a new key from a key and a number, such as a step count, an epoch or a rank.

    `fold_in(key, i)` equals `split(key, n)[i]`: with any one key, fold in or split, never both.

    Args:
        key: a key, int64 [2].
        data: an int in [0, 2**32), or a 0-d integer tensor, of which the low 32 bits are used.

    Returns:
        A key, int64 [2].

    >>> fold_in(key(0), 1)
    tensor([ 928981903, 3453687069])
    >>> step = torch.tensor(1)
    >>> fold_in(key(0), step)
    tensor([ 928981903, 3453687069])
    """
    _checks.check_key("fold_in", key)
    return torch.stack(threefry2x32(key[0], key[1], 0, _checks.folded_word(data)))


def bits(key: Key, shape: Shape = (), dtype: torch.dtype | None = None) -> Tensor:
    """Draw uniform words of 8, 16, 32 or 64 bits.

    Equals `jax.random.bits` of the same width, from JAX 0.5.0 on. Without a dtype, JAX with x64
    draws 64 bits.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: uint8, uint16, uint32 or uint64, an unsigned integer as wide as the words. None:
            words of 32 bits in int64, since torch lacks most operations for the wider three.

    Returns:
        `dtype` of `shape`; for None int64, values in [0, 2**32).

    >>> bits(key(0), (3,))
    tensor([4070199207, 4202968722, 1427181096])
    >>> bits(key(0), (3,), torch.uint8)
    tensor([167, 146,  40], dtype=torch.uint8)
    """
    _checks.check_key("bits", key)
    shape = _checks.check_shape("bits", shape)
    if dtype is None:
        return _arithmetic.words(key, shape, 32)
    _checks.check_dtype("bits", dtype, _arithmetic.WORDS)
    width = _arithmetic.WORDS[dtype]
    drawn = _arithmetic.words(key, shape, width)
    return (drawn if width == 64 else drawn & (2**width - 1)).to(dtype)


def uniform(
    key: Key,
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
) -> Tensor:
    """Draw uniformly from [minval, maxval).

    On [0, 1) the values are multiples of 2**-23 (float32; -52 for float64, -10 for float16, -7 for
    bfloat16) and the same bits everywhere. Other bounds add one rounding, which can return `maxval`
    itself where |minval| is far larger than `maxval - minval`.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: float32, float64, float16 or bfloat16.
        minval: lower bound, a number or a tensor that broadcasts to `shape`.
        maxval: upper bound, likewise. Gradients flow to both bounds.

    Returns:
        `dtype` of `shape`.

    >>> uniform(key(0), (2, 3), minval=-1.0)
    tensor([[ 0.8953,  0.9572, -0.3354],
            [-0.0627,  0.1398, -0.6690]])
    """
    shape = _checks.check_draw("uniform", key, shape, dtype)
    _checks.check_bounds("uniform", shape, minval=minval, maxval=maxval)
    return _arithmetic.uniform(key, shape, minval, maxval, dtype).to(dtype)


def normal(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the standard normal distribution, by inverting its distribution function.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        dtype: float32, float64, float16 or bfloat16. A bfloat16 draw has 7 random bits and reaches
            ±2.9 at most, as in JAX: if you need the tails, draw float32 and cast.

    Returns:
        `dtype` of `shape`. Eager, compiled, on another device, and in JAX, draws differ by at most
        4 units in the last place (from JAX in float64 by up to 30, due to XLA's log1p).

    >>> normal(key(0), (3,))
    tensor([ 1.6226,  2.0253, -0.4336])
    """
    shape = _checks.check_draw("normal", key, shape, dtype)
    return _arithmetic.normal(_arithmetic.mantissas(key, shape, dtype), dtype).to(dtype)


def truncated_normal(
    key: Key,
    lower: float | Tensor,
    upper: float | Tensor,
    shape: Shape | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw from the standard normal distribution conditioned on (lower, upper).

    Draws agree with `jax.random.truncated_normal` except in the tails. Where both bounds are beyond
    3 (7 in float64) on the same side, JAX's formula can return only a few values (eleven from 5
    on), so another formula is used, which is accurate arbitrarily far out.

    Args:
        key: a key, int64 [2].
        lower: lower bound, a number or a tensor that broadcasts to `shape`; may be -inf.
        upper: upper bound, likewise; may be inf. Gradients flow to both bounds.
        shape: shape of the result; by default the broadcast shape of the bounds.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        `dtype` of `shape`, inside the open interval (in 16 bits a draw may round to a bound).

    >>> truncated_normal(key(0), -2, 2, (3,))
    tensor([ 1.4560,  1.7147, -0.4127])
    """
    _checks.check_key("truncated_normal", key)
    _checks.check_dtype("truncated_normal", dtype, _arithmetic.FLOATS)
    shape = _checks.check_bounds("truncated_normal", shape, lower=lower, upper=upper)
    working = _arithmetic.working_dtype(dtype)
    x = _arithmetic.truncated(key, shape, lower, upper, dtype)
    lower, upper = _arithmetic.cast(lower, working, key), _arithmetic.cast(upper, working, key)
    # A draw must not round to or past a bound. nextafter itself has no derivative.
    inf = torch.full_like(lower, math.inf)
    first = torch.nextafter(lower.detach(), inf)
    last = torch.nextafter(upper.detach(), -inf)
    return torch.minimum(torch.maximum(x, first), last).to(dtype)


def bernoulli(key: Key, p: float | Tensor = 0.5, shape: Shape | None = None) -> Tensor:
    """Draw True with probability `p`.

    Equals `jax.random.bernoulli` for a tensor of the same dtype, and for a number without x64; with
    x64, JAX compares a number in float64, with other draws.

    Args:
        key: a key, int64 [2].
        p: probability of True, a number in [0, 1] (compared in float32) or a floating tensor that
            broadcasts to `shape` (compared in its own dtype, which limits how small it can be).
        shape: shape of the result; by default the shape of `p`.

    Returns:
        bool of `shape`.

    >>> bernoulli(key(0), 0.8, (5,))
    tensor([False, False,  True,  True,  True])
    """
    _checks.check_key("bernoulli", key)
    _checks.check_probability("bernoulli", p)
    dtype, default = (p.dtype, p.shape) if isinstance(p, Tensor) else (torch.float32, ())
    shape = _checks.check_shape("bernoulli", default if shape is None else shape)
    _checks.check_parameters("bernoulli", shape, p=p)
    # Both sides are exact in the working dtype, so the comparison is the one in p's own dtype.
    working = _arithmetic.working_dtype(dtype)
    return _arithmetic.unit(key, shape, dtype) < _arithmetic.cast(p, dtype, key).to(working)


def randint(
    key: Key,
    shape: Shape,
    minval: int | Tensor,
    maxval: int | Tensor,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Draw integers from minval, ..., maxval - 1.

    Draws equal those of `jax.random.randint` for the same dtype. The default is int64, as in JAX
    with x64 enabled; JAX without x64 draws int32, which are different numbers from the same key.

    A draw is a random number of twice the width modulo the span, in arithmetic of the single width.
    The bias is negligible for spans up to 2**16 (int32 and narrower) or 2**32 (int64). Above, some
    values are more probable than others, up to twice as much as the span approaches 2**32 (2**64):
    of int32 draws below 10**9, the odds of the first 294,967,296 to the others are 5 to 4. Draw
    such spans as int64.

    Args:
        key: a key, int64 [2].
        shape: shape of the result.
        minval: smallest value, an int or an integer tensor that broadcasts to `shape`.
        maxval: one more than the largest value, likewise. Tensor bounds are clipped to the range of
            `dtype`; where nothing lies between them, the result is `minval`.
        dtype: int64, int32, int16, int8 or uint8.

    Returns:
        `dtype` of `shape`.

    >>> randint(key(0), (5,), 0, 10)
    tensor([5, 1, 5, 7, 3])
    """
    _checks.check_key("randint", key)
    shape = _checks.check_shape("randint", shape)
    _checks.check_dtype("randint", dtype, _arithmetic.INTEGERS)
    _checks.check_bounds("randint", shape, minval=minval, maxval=maxval)
    # With the last value included, the full range of int64 needs no 65th bit.
    first = _arithmetic.cast(_checks.inclusive_bound("minval", minval, 0, dtype), torch.int64, key)
    last = _arithmetic.cast(_checks.inclusive_bound("maxval", maxval, 1, dtype), torch.int64, key)

    width = 64 if dtype is torch.int64 else 32
    wrap = -1 if width == 64 else MASK
    span = torch.where(last < first, 1, last - first + 1) & wrap  # 0 stands for 2**width
    above, below = (_arithmetic.words(child, shape, width) for child in split(key).unbind())
    # (above * 2**width + below) mod span, in `width` bits: 2**width mod span is the square of its
    # root's remainder. The square may wrap; so it does in JAX.
    root = _arithmetic.remainder(torch.full_like(span, 2 ** (width // 2)), span)
    factor = _arithmetic.remainder((root * root) & wrap, span)
    offset = (
        _arithmetic.remainder(above, span) * factor + _arithmetic.remainder(below, span)
    ) & wrap
    return (first + _arithmetic.remainder(offset, span)).to(dtype)


def permutation(key: Key, x: int | Tensor, axis: int = 0) -> Tensor:
    """Shuffle `range(x)`, or a tensor along one axis.

    Equals `jax.random.permutation` with x64 and without.

    Args:
        key: a key, int64 [2].
        x: a non-negative int n, or a tensor with at least one axis.
        axis: axis of the tensor to shuffle, as a whole: all rows keep their contents.

    Returns:
        For an int, a permutation of 0, ..., n - 1, int64 [n]; for a tensor, `x` reordered along
        `axis`.

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
        axis = _checks.check_axis("permutation", axis, x.ndim)
        return x[(slice(None),) * axis + (permutation(key, x.shape[axis]),)]
    _checks.check_count("permutation", "x", x)
    _checks.check_axis("permutation", axis, 1)
    # Sorting by random words shuffles, except for ties. There are enough rounds, each with new
    # words, that no pair is likely to tie in all of them: n**3 or more sequences of words each.
    rounds = math.ceil(3 * math.log(max(x, 1)) / math.log(2**32 - 1))
    order = torch.arange(x, device=key.device)
    for _ in range(rounds):
        key, subkey = split(key).unbind()
        order = order[torch.sort(_arithmetic.words(subkey, (x,), 32), stable=True).indices]
    return order


def categorical(key: Key, logits: Tensor, axis: int = -1, shape: Shape | None = None) -> Tensor:
    """Draw class indices with probabilities `softmax(logits, axis)`, by the Gumbel-max trick.

    Equals `jax.random.categorical` for logits in float32 and float64, with x64 and without, but for
    one draw in many thousands that rounding decides. For 16-bit logits JAX draws Gumbel numbers of
    16 bits, of which many are equal; here they are of 32.

    Args:
        key: a key, int64 [2].
        logits: unnormalised log-probabilities, floating, with the classes along `axis`; -inf
            excludes a class. 16-bit logits are converted to float32.
        axis: axis of the classes.
        shape: shape of the result, to which the shape of `logits` without `axis` must broadcast.
            By default that shape.

    Returns:
        int64 of `shape`, values in 0, ..., classes - 1.

    >>> logits = torch.tensor([0.0, 3.0, -torch.inf])
    >>> categorical(key(0), logits, shape=(6,))
    tensor([1, 1, 1, 1, 1, 1])
    """
    _checks.check_key("categorical", key)
    axis = _checks.check_logits(logits, axis)
    one_class = logits.select(axis, 0)
    shape = _checks.check_shape("categorical", one_class.shape if shape is None else shape)
    _checks.check_broadcast("categorical", shape, {f"logits.select({axis}, 0)": one_class.shape})
    logits = logits.to(_arithmetic.working_dtype(logits.dtype))
    before = len(shape) + 1 + axis
    sizes = (*shape[:before], logits.shape[axis], *shape[before:])
    u = _arithmetic.positive(key, sizes, logits.dtype)
    return (logits - torch.log(-torch.log(u))).argmax(axis)
