"""The arithmetic of random numbers: words to floats, the inverse of erf."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdl import _modes
from fdl._threefry import encrypted_words

MANY = 1024  # words from which on a kernel of their own pays
INT64 = torch.iinfo(torch.int64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SIGNED = (*INTEGERS[:-1], torch.float32, torch.float64, torch.float16, torch.bfloat16)
WORDS = {torch.uint8: 8, torch.uint16: 16, torch.uint32: 32, torch.uint64: 64}

# For each float type: random bits used for one draw, and how many the mantissa keeps (as in JAX).
FLOATS = {
    torch.float32: (32, 23),
    torch.float64: (64, 52),
    torch.float16: (16, 10),
    torch.bfloat16: (8, 7),
}


def words(key: Tensor, shape: tuple[int, ...], width: int, shift: int = 0) -> Tensor:
    """Draw 32-bit words, of which narrower ones are a part, or 64-bit ones, signed.

    What is left of 32-bit words that move right by `shift` is in int32, which compilers turn into
    floats more quickly.
    """
    if _modes.is_tracing() and math.prod(shape) >= MANY:
        return torch.ops.fdl.random_words(key, shape, width, shift)  # type: ignore[no-any-return]
    return encrypted_words(key, shape, width, shift)


def mantissas(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw integers as wide as the mantissa of `dtype`, int32 or int64."""
    width, mantissa = FLOATS[dtype]
    if width == 64:
        return mantissas_of(words(key, shape, width), dtype)
    return words(key, shape, width, width - mantissa) & (2**mantissa - 1)


def mantissas_of(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Make integers as wide as the mantissa of `dtype` from words, int64."""
    width, mantissa = FLOATS[dtype]
    return (word >> (width - mantissa)) & (2**mantissa - 1)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Widen 16-bit floats, where compilers round between operations or not as they please."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def as_unit(mantissa: Tensor, dtype: torch.dtype) -> Tensor:
    """Map mantissas to [0, 1), exact in `dtype`, given in its working dtype."""
    return mantissa.to(working_dtype(dtype)) * 2.0 ** -FLOATS[dtype][1]


def as_symmetric(mantissa: Tensor, dtype: torch.dtype) -> Tensor:
    """Map mantissas to (-1, 1), never 0, exact in `dtype`, given in its working dtype."""
    width = FLOATS[dtype][1]
    # An odd numerator over 2**(width + 1) is exact, and strictly inside.
    numerator = 4 * mantissa + 1 - 2 ** (width + 1)
    return numerator.to(working_dtype(dtype)) * 2.0 ** -(width + 1)


def unit(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw from [0, 1), exact in `dtype`, given in its working dtype."""
    return as_unit(mantissas(key, shape, dtype), dtype)


def symmetric(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw from (-1, 1), never 0, exact in `dtype`, given in its working dtype."""
    return as_symmetric(mantissas(key, shape, dtype), dtype)


def positive(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw from (0, 1) in the working dtype, where the smallest normal number stands for 0."""
    return unit(key, shape, dtype).clamp(min=torch.finfo(dtype).tiny)


def normal(mantissa: Tensor, dtype: torch.dtype) -> Tensor:
    """Map mantissas to the standard normal distribution, in the working dtype of `dtype`."""
    return math.sqrt(2) * erfinv(as_symmetric(mantissa, dtype))


def uniform(
    key: Tensor,
    shape: tuple[int, ...],
    low: float | Tensor,
    high: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Draw from [low, high) in the working dtype of `dtype`."""
    working = working_dtype(dtype)
    low, high = cast(low, working, key), cast(high, working, key)
    return torch.maximum(low, unit(key, shape, dtype) * (high - low) + low)


def cast(value: float | Tensor, dtype: torch.dtype, key: Tensor) -> Tensor:
    """Turn a number or a tensor into a tensor of `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=key.device)


def remainder(a: Tensor, n: Tensor) -> Tensor:
    """Unsigned a mod n of 64-bit words held in int64, where n = 0 leaves a (as XLA does)."""
    # Below 2**63, halving `a` gives a quotient that is right or one too small; from there on
    # (a negative n) the quotient is 0 or 1. Either way one subtraction is left to do.
    positive = torch.where(n > 0, n, 1)
    quotient = torch.where(n > 0, ((a >> 1) & INT64.max) // positive << 1, 0)
    rest = a - quotient * n
    unsigned_at_least = (rest ^ INT64.min) >= (n ^ INT64.min)
    return torch.where(unsigned_at_least, rest - n, rest)


# From where on both bounds of a truncated normal are treated as being in its tail: there fewer than
# 50,000 of the values of erf are left above.
FAR = {torch.float32: 3.0, torch.float64: 7.0}


def truncated(
    key: Tensor,
    shape: tuple[int, ...],
    lower: float | Tensor,
    upper: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Draw from a truncated normal in the working dtype; rounding may reach a bound."""
    working = working_dtype(dtype)
    far = FAR[working]
    low, high = cast(lower, working, key), cast(upper, working, key)
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor):
        draw = truncated_in_tail if lower >= far or upper <= -far else truncated_by_erf
        return draw(key, shape, low, high, dtype)
    in_tail = (low >= far) | (high <= -far)

    def bounds(chosen: Tensor, other: float) -> tuple[Tensor, Tensor]:
        """Put others where a formula is not chosen, for which its derivatives are finite."""
        return torch.where(chosen, low, other), torch.where(chosen, high, other + 2)

    return torch.where(
        in_tail,
        truncated_in_tail(key, shape, *bounds(in_tail, far), dtype),
        truncated_by_erf(key, shape, *bounds(~in_tail, -1.0), dtype),
    )


def truncated_by_erf(
    key: Tensor, shape: tuple[int, ...], lower: Tensor, upper: Tensor, dtype: torch.dtype
) -> Tensor:
    """Draw from a truncated normal by inverting its distribution function, as JAX does."""
    low, high = torch.erf(lower / math.sqrt(2)), torch.erf(upper / math.sqrt(2))
    return math.sqrt(2) * erfinv(uniform(key, shape, low, high, dtype))


def truncated_in_tail(
    key: Tensor, shape: tuple[int, ...], lower: Tensor, upper: Tensor, dtype: torch.dtype
) -> Tensor:
    """Draw from a normal between bounds of one sign by inverting the logarithm of its tail.

    With Q(x) the probability beyond x and H(d) = log Q(a) - log Q(a + d), a draw is a + d with
    H(d) = -log(1 - u (1 - Q(b) / Q(a))), solved by Newton's method from the d of exp(-x² / 2).
    Nothing in it cancels, or is smaller than u.
    """
    below = upper < 0
    a, b = torch.where(below, -upper, lower), torch.where(below, -lower, upper)
    scale = math.sqrt(0.5)

    def ahead(d: Tensor) -> Tensor:
        ratio = torch.special.erfcx((a + d) * scale) / torch.special.erfcx(a * scale)
        return d * (a + d / 2) - torch.log(ratio)

    open_ended = b.isinf()
    beyond = torch.where(open_ended, 0.0, torch.exp(-ahead(torch.where(open_ended, 1.0, b - a))))
    target = -torch.log1p(-unit(key, shape, dtype) * (1 - beyond))
    d = 2 * target / (a + torch.sqrt(a * a + 2 * target))
    for _ in range(3):
        hazard = math.sqrt(2 / math.pi) / torch.special.erfcx((a + d) * scale)
        d = d - (ahead(d) - target) / hazard
    return torch.where(below, -(a + d), a + d)


# Pieces of erfinv(x) / x as polynomials in w = -log(1 - x²), from M. Giles, "Approximating the
# erfinv function" (GPU Computing Gems, 2011), as XLA has them: below which w a piece holds, what is
# subtracted from w (the first piece) or sqrt(w) (the others), coefficients from the highest power.
# fmt: off
_GILES = {
    torch.float32: (
        (5.0, 2.5, (
            2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
            -0.00125372503, -0.00417768164, 0.246640727, 1.50140941)),
        (math.inf, 3.0, (
            -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
            -0.0076224613, 0.00943887047, 1.00167406, 2.83297682)),
    ),
    torch.float64: (
        (6.25, 3.125, (
            -3.6444120640178196996e-21, -1.685059138182016589e-19, 1.2858480715256400167e-18,
            1.115787767802518096e-17, -1.333171662854620906e-16, 2.0972767875968561637e-17,
            6.6376381343583238325e-15, -4.0545662729752068639e-14, -8.1519341976054721522e-14,
            2.6335093153082322977e-12, -1.2975133253453532498e-11, -5.4154120542946279317e-11,
            1.051212273321532285e-09, -4.1126339803469836976e-09, -2.9070369957882005086e-08,
            4.2347877827932403518e-07, -1.3654692000834678645e-06, -1.3882523362786468719e-05,
            0.0001867342080340571352, -0.00074070253416626697512, -0.0060336708714301490533,
            0.24015818242558961693, 1.6536545626831027356)),
        (16.0, 3.25, (
            2.2137376921775787049e-09, 9.0756561938885390979e-08, -2.7517406297064545428e-07,
            1.8239629214389227755e-08, 1.5027403968909827627e-06, -4.013867526981545969e-06,
            2.9234449089955446044e-06, 1.2475304481671778723e-05, -4.7318229009055733981e-05,
            6.8284851459573175448e-05, 2.4031110387097893999e-05, -0.0003550375203628474796,
            0.00095328937973738049703, -0.0016882755560235047313, 0.0024914420961078508066,
            -0.0037512085075692412107, 0.005370914553590063617, 1.0052589676941592334,
            3.0838856104922207635)),
        (math.inf, 5.0, (
            -2.7109920616438573243e-11, -2.5556418169965252055e-10, 1.5076572693500548083e-09,
            -3.7894654401267369937e-09, 7.6157012080783393804e-09, -1.4960026627149240478e-08,
            2.9147953450901080826e-08, -6.7711997758452339498e-08, 2.2900482228026654717e-07,
            -9.9298272942317002539e-07, 4.5260625972231537039e-06, -1.9681778105531670567e-05,
            7.5995277030017761139e-05, -0.00021503011930044477347, -0.00013871931833623122026,
            1.0103004648645343977, 4.8499064014085844221)),
    ),
}
# fmt: on


def erfinv(x: Tensor) -> Tensor:
    """Invert erf on [-1, 1], in float32 or float64; ±1 give the largest finite result.

    `torch.erfinv` differs from XLA's by 90 units in the last place of float32, and in float64
    between eager and compiled by far more.
    """
    # The clamp changes no square of a number inside (-1, 1). It keeps ±1 finite and, standing
    # between the product and log1p's sum, keeps compilers from fusing the two: in the tails the
    # rounding of x² decides the last digits of the result.
    square = (x * x).clamp(max=1 - torch.finfo(x.dtype).eps / 2)
    w = -torch.log1p(-square)
    (limit, centre, coefficients), *others = _GILES[x.dtype]
    ratio = _horner(coefficients, w - centre)
    for next_limit, centre, coefficients in others:
        # Below its range the piece is not used: the clamp spares the gradient the root of 0.
        root = torch.sqrt(w.clamp(min=limit))
        ratio = torch.where(w < limit, ratio, _horner(coefficients, root - centre))
        limit = next_limit
    return ratio * x


def _horner(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    """Evaluate a polynomial, highest power first."""
    total = torch.full_like(t, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * t + coefficient
    return total
