"""Gamma draws by the method of Marsaglia and Tsang, with the keys of JAX, and their derivative.

G. Marsaglia and W. W. Tsang, "A simple method for generating gamma variables", ACM Transactions on
Mathematical Software 26 (2000).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fdl._modes import in_forward_mode
from fdl._threefry import encrypted_counters, join, threefry2x32
from fdl.random._arithmetic import (
    FLOATS,
    as_unit,
    mantissas_of,
    normal,
)
from fdl.random._loops import until_each_is_done

Words = tuple[Tensor, Tensor]  # a key for each element


def children(key: Words, n: int) -> list[Words]:
    """Split each of many keys into `n`."""
    counters = torch.arange(n, device=key[0].device)
    high, low = threefry2x32(key[0].unsqueeze(-1), key[1].unsqueeze(-1), 0, counters)
    return list(zip(high.unbind(-1), low.unbind(-1), strict=True))


def single(key: Words, dtype: torch.dtype) -> Tensor:
    """Draw the mantissa of one number of `dtype` with each of many keys."""
    return mantissas_of(join(*threefry2x32(*key, 0, 0), FLOATS[dtype][0]), dtype)


class Proposal(NamedTuple):
    """What one step of the method leaves to the next, for each element."""

    accepted: Tensor
    volume: Tensor  # (1 + c x)³ of what was accepted
    key: Words  # of later proposals
    normal_key: Words  # of the next normal number
    uniform_key: Words


def propose(state: Proposal, d: Tensor, c: Tensor, *, dtype: torch.dtype) -> Proposal:
    """Draw a normal number, and accept it, or let another follow.

    A number outside of the domain is drawn again from a child of its key; one that is rejected is
    proposed anew, with new keys for it and for the uniform number that decides.
    """
    next_normal_key, normal_key = children(state.normal_key, 2)
    x = normal(single(normal_key, dtype), dtype)
    u = as_unit(single(state.uniform_key, dtype), dtype)
    v = 1 + x * c
    square, volume = x * x, (v * v) * v
    outside = v <= 0
    rejected = (u >= 1 - 0.0331 * (square * square)) & (
        torch.log(u) >= square * 0.5 + d * ((1 - volume) + torch.log(volume))
    )
    key, new_normal_key, new_uniform_key = children(state.key, 3)

    def keep(condition: Tensor, ours: Words, theirs: Words) -> Words:
        a, b = zip(ours, theirs, strict=True)
        return torch.where(condition, *a), torch.where(condition, *b)

    return Proposal(
        state.accepted | ~(outside | rejected),
        torch.where(state.accepted, state.volume, volume),
        keep(outside, state.key, key),
        keep(outside, next_normal_key, new_normal_key),
        keep(outside, state.uniform_key, new_uniform_key),
    )


def gamma_and_log(key: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from the gamma distribution, and return the draws and their logarithms.

    Args:
        key: a key.
        a: concentrations, float32 or float64, of the shape of the result. The draws are constant;
            see `with_derivative`.
    """
    shape, dtype = tuple(a.shape), a.dtype
    own, boost_key = children(encrypted_counters(key, shape), 2)
    own, normal_key, uniform_key = children(own, 3)
    # Below 1 the method has no domain: there a + 1 and a power of a uniform number.
    d = torch.where(a >= 1, a, a + 1) - 1 / 3
    c = (1 / 3) / torch.sqrt(d)
    init = Proposal(torch.zeros_like(a, dtype=torch.bool), a, own, normal_key, uniform_key)
    step = partial(propose, dtype=dtype)
    volume = until_each_is_done(step, lambda state: state.accepted, init, (d, c)).volume

    u = as_unit(single(boost_key, dtype), dtype)
    power = torch.where(a >= 1, 1.0, (1 - u) ** (1 / a))
    log_u = torch.log1p(-u)
    log_power = torch.where((a >= 1) | (log_u == 0), 0.0, log_u * (1 / a))
    return (d * volume) * power, (torch.log(d) + torch.log(volume)) + log_power


class WithDerivative(torch.autograd.Function):
    """The logarithm of a gamma draw as a function of the concentration: log x of (a, log x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, log_x: Tensor) -> Tensor:
        return log_x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        # The output, not what it was copied from: it depends on a, which higher derivatives see.
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent * slope_of_log(*ctx.saved_tensors), None


def with_derivative(a: Tensor, log_x: Tensor) -> Tensor:
    """Return the logarithms of gamma draws, as functions of their concentrations.

    In reverse mode all derivatives are right, in forward mode and by `torch.compile` the first
    four: torch returns 0 for the second of a Function in forward mode, and Dynamo cannot batch one.
    """
    if not (torch.compiler.is_compiling() or in_forward_mode()):
        return cast(Tensor, WithDerivative.apply(a, log_x))
    # A Runge-Kutta step of length 0 along the path that the slope describes.
    start = a.detach()
    step = a - start
    first = slope_of_log(start, log_x)
    second = slope_of_log(start + step / 2, log_x + step / 2 * first)
    third = slope_of_log(start + step / 2, log_x + step / 2 * second)
    fourth = slope_of_log(a, log_x + step * third)
    return log_x + step / 6 * (first + 2 * second + 2 * third + fourth)


# Nodes of the double exponential rule for integrals over [0, ∞), u = exp(s - exp(-s)).
_STEP = 0.09
_NODES = [i * _STEP for i in range(-39, 43)]


def slope_of_log(a: Tensor, log_x: Tensor) -> Tensor:
    """Differentiate log x by a, where the probability of less than x stays the same.

    For F(a, x) the distribution function and f its derivative by x, dx/da = -∂F/∂a / f. All its
    derivatives are those of the sum by which it is computed, in float64, to about 12 digits.
    """
    dtype = a.dtype
    a, log_x = a.double(), log_x.double()
    x = torch.exp(log_x)
    # Between 0 and 1 the integrand has two scales; there F(a + 1, x) leads to F(a, x).
    small = (a < 1) & (x <= 1)
    slope = _slope_by_integral(torch.where(small, a + 1, a), x, log_x)
    by_recurrence = (slope * x + torch.digamma(a + 1) - log_x) / a
    return torch.where(small, by_recurrence, slope).to(dtype)


def _slope_by_integral(a: Tensor, x: Tensor, log_x: Tensor) -> Tensor:
    """Integrate positive numbers over the tail on the side of x where the density declines.

    With t = x exp(±u) as the variable of integration it is

        x ≤ a:  ∫ (ψ(a + 1) - log x + u exp(-u) x / a) exp(-a u - x expm1(-u)) du
        x > a:  ∫ (log x - ψ(a) + u) exp(a u - x expm1(u)) du
    """
    a, x, log_x = (each.unsqueeze(-1) for each in (a, x, log_x))
    above = x > a
    # The scale on which the integrand declines; the integral does not depend on it.
    scale = (1 / ((x - a).abs() + torch.sqrt(x))).detach()
    s = torch.tensor(_NODES, dtype=torch.float64, device=a.device)
    u = torch.where(above, torch.log1p(scale), scale) * torch.exp(s - torch.exp(-s))
    weight = _STEP * (1 + torch.exp(-s))

    sign = torch.where(above, 1.0, -1.0).double()
    # Far out only the exponential is 0: infinity times 0 would make a derivative NaN.
    exponent = sign * a * u - x * torch.expm1(sign * u).clamp(max=1e300)
    psi = torch.digamma(a + 1)
    factor = torch.where(above, log_x - psi + 1 / a + u, psi - log_x + u * torch.exp(-u) * (x / a))
    return (factor * torch.exp(exponent) * u * weight).sum(-1)
