"""Integers of 8 bits in a compiled function. Oracle: eager torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fdl import jit
from fdl._compiler._narrow_integers import NARROW_INTEGERS

FUNCTIONS = {
    "amin": lambda x: x.amin(1),
    "amin of all": lambda x: x.amin(),
    "min": lambda x: x.min(),
    "min along": lambda x: x.min(1, keepdim=True).values,
    "max along": lambda x: x.gather(0, x.max(0, keepdim=True).indices),
    "amax": lambda x: x.amax(0, keepdim=True),
    "amax of both": lambda x: x.amax((0, 1)),
    "max": lambda x: x.max(),
    "of absolutes": lambda x: (x.abs(), x.abs().amin(1), x.abs().amax(1), x.abs().sum(1)),
    "of complements": lambda x: ((~x).amax(1), (x * 3).amin(1)),
    "aminmax": lambda x: tuple(x.aminmax()),
    "any": lambda x: x.any(),
    "any along": lambda x: (x.any(1), x.any(0, keepdim=True), torch.any(x, (0, 1))),
    "all": lambda x: (x.all(), x.all(1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool], ids=str)
def test_reductions(dtype: torch.dtype) -> None:
    low, high = (0, 2) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    sizes, generator = [(3, 33), (3, 8), (40, 67), (2, 4)], torch.Generator().manual_seed(0)
    xs = [torch.randint(low, high, size, generator=generator) for size in sizes]
    xs = [x.clamp(min=low + 7 * (high > 2)).to(dtype) for x in xs]  # 0 is beyond all of uint8
    xs[0][0, 1] = xs[-1][1, 2] = low
    functions = {
        name: fn
        for name, fn in FUNCTIONS.items()
        if dtype != torch.bool or name not in ("of absolutes", "of complements")
    }

    def everything(xs: list[Tensor]) -> Any:
        return {name: [fn(x) for x in xs] for name, fn in functions.items()}

    torch.testing.assert_close(jit(everything, strict=True)(xs), everything(xs), rtol=0, atol=0)


def test_other_dtypes_are_left_alone() -> None:
    for dtype in (torch.int32, torch.float32):
        x = torch.ones(3, dtype=dtype)
        for op, fn in NARROW_INTEGERS.items():
            assert fn(*(x, 0)[: len(op._schema.arguments)]) is NotImplemented
