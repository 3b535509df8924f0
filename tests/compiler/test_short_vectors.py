"""Masks and bytes in compiled kernels equal those of eager torch, whatever is left of a vector.

On a processor with vectors of 256 bits these go through functions of fdl's own.
"""

import math

import pytest
import torch
from torch import Tensor
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.func import grad

import fdl
from fdl._compiler._products import SOURCE as PRODUCT
from fdl._compiler._rows import SOURCE as ROWS
from fdl._compiler._short_vectors import (
    CODE,
    INCLUDE,
    INTRINSICS,
    narrowed,
    with_short_vectors,
)

LENGTHS = [1, 7, 8, 9, 31, 40, 1003]
ODD = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, -1.0, 2.0]


def numbers(n: int) -> Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    x[: len(ODD)] = torch.tensor(ODD)[:n]
    return x


@pytest.mark.parametrize("n", LENGTHS)
def test_masks_are_written_and_read(n: int) -> None:
    x, chosen = numbers(n), torch.arange(n) % 3 == 1

    def fn(x: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        positive = x > 0
        return positive, ~chosen, torch.where(chosen, x, -x), chosen.float(), positive & chosen

    for result, expected in zip(fdl.jit(fn)(x, chosen), fn(x, chosen), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        if result.dtype is torch.bool:  # a byte of 255 would be True as well
            assert set(result.view(torch.uint8).tolist()) <= {0, 1}


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_bytes_become_floats(dtype: torch.dtype, n: int) -> None:
    rows = torch.arange(3 * n).reshape(3, n).to(dtype)
    index = torch.tensor([2, 0, 1, 2])

    def fn(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        x = rows[index].float()
        return x / 255, x.sum(1)

    for result, expected in zip(fdl.jit(fn)(rows, index), fn(rows, index), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


def test_what_a_dropout_keeps() -> None:
    """The masks of a ReLU and a dropout are written forward and read backward."""
    x, key = torch.randn(6, 50), fdl.random.key(0)
    drop = fdl.nn.dropout(0.5)

    def loss(x: Tensor) -> Tensor:
        return drop.apply({}, x.relu().sin().relu(), train=True, key=key).square().sum()

    torch.testing.assert_close(fdl.jit(grad(loss))(x), grad(loss)(x))


def test_only_kernels_with_a_use_for_them_have_them() -> None:
    plain = INCLUDE + "auto x = at::vec::Vectorized<float>::loadu(p, static_cast<int64_t>(8));"
    assert with_short_vectors(plain) == plain
    mask = INCLUDE + "at::vec::VecMask<float,1>::from(p, n).store(q, n);"
    assert with_short_vectors(mask) == mask.replace(INCLUDE, INCLUDE + CODE)


def test_kernels_of_fdl_include_no_more_than_those_of_torch() -> None:
    narrow = str(pick_vec_isa()) == "avx2"
    assert narrowed(PRODUCT).startswith(INTRINSICS) == narrow
    assert narrowed(ROWS) == ROWS
