"""Decompositions against torch's own kernels: zeros, infinities, NaN, integers and 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from fdl import jit, scan
from fdl._compiler._decompositions import OWN

aten = torch.ops.aten

# ------------------------------------------------------------ zeros, infinities, what is no number

NAN, INF = float("nan"), float("inf")
SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, 2.5, -7.0, 1e30, -0.5])


def asserted(x: Tensor) -> Tensor:
    torch._assert_async((x.nan_to_num() > -INF).all())
    return x + 1


ELEMENTWISE: dict[Any, list[Callable[[Tensor], Tensor]]] = {
    None: [
        lambda x: x + 0.0,
        lambda x: x + -0.0,
        lambda x: 0.0 + x,
        lambda x: x - 0.0,
        lambda x: 0.0 - x,
        lambda x: x + torch.zeros_like(x),
        lambda x: torch.zeros_like(x) + x,
        lambda x: x + torch.full_like(x, -0.0),
        lambda x: x + torch.zeros(3, 1, dtype=torch.int64),
        lambda x: torch.add(x, 0, alpha=3),
        lambda x: x * 0,
        lambda x: x * 1,
        lambda x: x - x,
        lambda x: x / x,
        lambda x: x.atan2(-x),
        lambda x: torch.where(x > 0, x, x * 0),
        lambda x: torch.maximum(x, -x),
        lambda x: torch.minimum(x, -x),
        lambda x: (x.double() + 0.0).float(),
        torch.relu,
        F.leaky_relu,
        F.silu,
        F.softplus,
    ],
    aten.clamp_min.default: [lambda x: x.clamp(min=0), lambda x: x.clamp(0, 1), F.relu6],
    aten.clamp_max.default: [lambda x: x.clamp(max=0.0), F.hardtanh],
    aten.remainder.Scalar: [lambda x: x % 2, lambda x: x % -3, lambda x: x % 0.7],
    aten.fmod.Scalar: [lambda x: torch.fmod(x, 2), lambda x: torch.fmod(x, -0.7)],
    aten.remainder.Tensor: [lambda x: x % torch.tensor([2.0]), lambda x: x % -torch.ones_like(x)],
    aten.div.Scalar_mode: [
        *(lambda x, y=y: torch.div(x, y, rounding_mode="floor") for y in (0.7, -0.1, 2, 0, INF)),
        lambda x: torch.div(x, -0.7, rounding_mode="trunc"),
    ],
    aten.div.Tensor_mode: [
        lambda x: torch.div(x, torch.tensor([-0.1]), rounding_mode="floor"),
        lambda x: torch.div(x, x.flip(0), rounding_mode="floor"),
    ],
    aten.pow.Tensor_Scalar: [
        *(lambda x, p=p: x**p for p in (0, 0.5, -0.5, 1, 2, 3, -1, -2, 1.5)),
    ],
    aten.multilabel_margin_loss_forward.default: [
        lambda x: F.multilabel_margin_loss(
            torch.stack([x, x.flip(0)], 1), torch.tensor([[1, -1]]).repeat(len(x), 1)
        ),
        lambda x: F.multilabel_margin_loss(x[:3], torch.tensor([2, 0, -1]), reduction="none"),
    ],
    aten._assert_async.default: [asserted],
    aten.elu_backward.default: [F.elu, F.celu, F.selu, lambda x: F.elu(x, 0.3)],
    aten.hardswish_backward.default: [F.hardswish],
    aten.smooth_l1_loss_backward.default: [
        lambda x: F.smooth_l1_loss(x, torch.ones_like(x)),
        lambda x: F.smooth_l1_loss(x, torch.ones_like(x), reduction="none", beta=0.3),
        lambda x: F.huber_loss(x, torch.ones_like(x), reduction="sum"),
    ],
}
ODD = [F.relu6, F.hardtanh]  # torch gives 0 or 1 at NaN, depending on where in memory it is


def test_every_decomposition_has_a_row() -> None:
    assert ELEMENTWISE.keys() - {None} == OWN.keys()


def test_special_numbers_are_what_they_are_eagerly() -> None:
    # As many of each that torch's own kernels take them all in one way.
    x = SPECIAL.repeat_interleave(16)
    functions = [fn for row in ELEMENTWISE.values() for fn in row]
    smooth = [fn for fn in functions if fn not in ODD]
    every = functions + [lambda x, fn=fn: vjp(fn, x)[1](torch.ones_like(fn(x)))[0] for fn in smooth]
    got = jit(lambda x: [fn(x) for fn in every], strict=True)(x)
    for i, (a, fn) in enumerate(zip(got, every, strict=True)):
        b = fn(x)
        same = torch.isclose(a, b, rtol=1e-5, atol=0, equal_nan=True)
        assert same.all(), (i, x[~same], a[~same], b[~same])
        number = ~b.isnan()
        assert torch.equal(a.signbit()[number], b.signbit()[number]), i


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_decompositions_leave_integers_as_they_are(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 5, 7, 100], dtype=dtype)

    def fn(x: Tensor) -> list[Tensor]:
        rests = [x % 3, x % x.clamp(min=1)]
        quotients = [x // 3, x // x.clamp(min=1), x // 2.5, torch.div(x, 2, rounding_mode="trunc")]
        return [*rests, *quotients, x.clamp(1, 6), x.clamp(max=2.5), x**2]

    for a, b in zip(jit(fn, strict=True)(x), fn(x), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_multiples_are_divided_without_rounding_up(dtype: torch.dtype) -> None:
    """0.3 // 0.1 is 2, as in Python: the quotient is rounded to 3, but 0.3 is less than 3 · 0.1."""
    multiples = torch.arange(-60, 61, dtype=torch.float64) * 0.1
    x = torch.cat([multiples, multiples * 7]).to(dtype)

    def fn(x: Tensor) -> list[Tensor]:
        return [x // 0.1, x // x.new_full((), -0.7), 0.7 // x, torch.floor_divide(x, x.flip(0))]

    got, expected = jit(fn, strict=True)(x), fn(x)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if dtype == torch.float64:
        assert got[0].tolist() == [float(z) // 0.1 for z in x]


DTYPES = [
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quotients_and_rests_of_two_dtypes_are_those_of_eager_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, 9 * 37, generator=generator, dtype=torch.float64) * 40
    x = numbers[0].clamp(-100, 100).abs().to(dtype).view(9, 37)
    y = numbers[1].abs().add(1).clamp(max=100).view(9, 37)
    narrow = {torch.bfloat16, torch.float16}  # Inductor warns of both in one kernel
    kinds = [kind for kind in DTYPES if {dtype, kind} != narrow]
    divisors = {str(kind): y.to(kind) for kind in kinds}

    def fn(x: Tensor, divisors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        others: dict[str, Any] = divisors | {"7": 7, "0.7": 0.7, "-2.5": -2.5}
        return {
            name: [x // y, x % y, torch.fmod(x, y), torch.div(x, y, rounding_mode="trunc")]
            for name, y in others.items()
        }

    got, expected = jit(fn, strict=True)(x, divisors), fn(x, divisors)
    for name in expected:
        for i, (a, b) in enumerate(zip(got[name], expected[name], strict=True)):
            assert a.dtype == b.dtype and torch.equal(a, b), (name, i, (a != b).sum())


# --------------------------------------------------------------------------- roundings to 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_number_is_rounded_to_the_dtype_of_the_tensor(dtype: torch.dtype) -> None:
    """0.7 lies between two numbers of 16 bits: a multiple of it is none of the rounded one."""
    x = torch.cat([torch.tensor([0.7, -0.7, 1.4]), torch.linspace(-9, 9, 200)]).to(dtype)

    def fn(x: Tensor) -> list[Tensor]:
        return [
            torch.full_like(x, 0.7) == x,
            torch.full_like(x, math.nan),
            x % 0.7,
            torch.fmod(x, 0.7),
            torch.fmod(x, x.new_full((), -0.7)),
            x.clamp(-0.7, 0.7),
        ]

    for a, b in zip(jit(fn, strict=True)(x), fn(x), strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def kahan(carry: tuple[Tensor, Tensor], _: Any) -> tuple[tuple[Tensor, Tensor], Any]:
    """Add 1e-3 to a weight of 8 bits, and keep the rounding error."""
    w, lost = carry
    step = torch.full_like(w, 1e-3) - lost
    new = w + step
    return (new, (new - w) - step), ()


def test_a_compensated_sum_of_bfloat16_is_compensated() -> None:
    w = torch.ones(300, dtype=torch.bfloat16)
    fn = lambda w: scan(kahan, (w, torch.zeros_like(w)), (), length=1000)[0]  # noqa: E731
    got, expected = jit(fn, strict=True)(w), fn(w)
    assert (got[0] == 2.0).all()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_rounded_to_16_bits_stays_rounded(dtype: torch.dtype) -> None:
    x = torch.tensor([1e5, 1 / 3, -3e38, 1 + 2**-9]).repeat(40)

    def fn(x: Tensor) -> list[Tensor]:
        rounded = x.to(dtype)
        return [
            rounded.float(),
            rounded.float().isinf(),
            rounded.double(),
            x - rounded.float(),
        ]

    for a, b in zip(jit(fn, strict=True)(x), fn(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------- what is left to torch


def resized(x: Tensor) -> tuple[Tensor, ...]:
    complex_numbers = torch.complex(x.cos(), x) + torch.polar(x.exp(), x)
    image = x[None, None].cos()
    modes = {"nearest": image, "bilinear": image, "bicubic": image, "trilinear": image[None]}
    larger = [F.interpolate(y, scale_factor=2, mode=mode) for mode, y in modes.items()]
    return complex_numbers.real, complex_numbers.imag, *larger


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_kernels_of_torch_are_called_where_the_environment_has_ci(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config
    from torch._inductor.lowering import lowerings

    left = [op for op in lowerings if str(op).startswith(("aten.upsample_", "aten.complex."))]
    for op in left:  # those that an earlier program has added
        monkeypatch.delitem(lowerings, op)
    monkeypatch.setenv("CI", "true")
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    with config.patch(fx_graph_cache=False):
        torch.testing.assert_close(jit(resized, strict=True)(x), resized(x), rtol=1e-12, atol=1e-14)
