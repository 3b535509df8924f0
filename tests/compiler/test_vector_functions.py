"""Functions that Inductor's vectors compute with an absolute error, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import grad

from fdl import jit

# From the smallest normal number to 1, of both signs, and what lies between the branches.
SIZES = torch.cat([torch.logspace(-37, 0, 2000), torch.linspace(0.92, 0.935, 500)]).clamp(max=0.999)


FUNCTIONS = [torch.erf, torch.special.erf, torch.atanh]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_right_to_a_few_units(dtype: torch.dtype) -> None:
    """As in float64, also where those of eager 16-bit numbers are not."""
    x = torch.cat([SIZES, -SIZES]).to(dtype)
    got = jit(lambda x: [fn(x) for fn in FUNCTIONS], strict=True)(x)
    rtol = (1 if dtype.itemsize == 2 else 4) * torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for y, fn in zip(got, FUNCTIONS, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), fn(x.double()), rtol=rtol, atol=smallest)


def test_derivatives_and_special_numbers() -> None:
    x = torch.cat([SIZES, -SIZES])
    special = torch.tensor([0.0, -0.0, 1, -1, 2, -2, math.inf, -math.inf, math.nan]).repeat(8)

    def fn(x: Tensor, special: Tensor) -> list[Tensor]:
        slopes = [grad(lambda x, fn=fn: fn(x).sum())(x) for fn in FUNCTIONS]
        return slopes + [fn(special) for fn in FUNCTIONS]

    for a, b in zip(jit(fn, strict=True)(x, special), fn(x, special), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0, equal_nan=True)
        number = ~b.isnan()
        assert torch.equal(a.signbit()[number], b.signbit()[number])
