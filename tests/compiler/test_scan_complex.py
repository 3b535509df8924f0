"""Loops over complex numbers are loops of the program. Oracle: the function run eagerly."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from fdl import jit, scan, tree
from tests.support.asserts import assert_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex"),
]


def some(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.complex128)


def state_space(h: Tensor, xs: Tensor, rates: Tensor, b: Tensor) -> Any:
    """A linear recurrence with complex states and real inputs."""

    def step(h: Tensor, x: Tensor) -> Any:
        h = rates * h + b @ x.to(b.dtype)
        return h, (b.mH @ h).real

    return scan(step, h, xs)


def spectrum(z: Tensor, xs: Tensor) -> Any:
    """A complex y and a lazily conjugated one, a loop in a loop, an unchanged leaf."""

    def step(carry: Any, x: Tensor) -> Any:
        c, kept = carry
        bias = kept.conj()  # lazily, and closed over
        c, norms = scan(lambda c, row: (c * row.conj() + bias, c.abs()), c, x)
        return (torch.fft.ifft(torch.fft.fft(c) * 0.5), kept), (c.conj(), norms, kept)

    return scan(step, (z, z * 2), xs.conj())


def spectral_layer(scale: Tensor, xs: Tensor) -> Any:
    """Some frequencies are written in place, as in Fourier neural operators."""

    def step(scale: Tensor, x: Tensor) -> Any:
        frequencies = torch.fft.rfft(x * scale)
        kept = torch.zeros_like(frequencies)
        kept[:2] = frequencies[:2] * scale
        kept[2] = frequencies[1].conj()
        return scale * 0.9, torch.fft.irfft(kept, n=x.shape[0])

    return scan(step, scale, xs)


CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "state space": (state_space, (some(5), some(11, 3).real, some(5) / 4, some(5, 3))),
    "spectrum": (spectrum, (some(4), some(3, 2, 4))),
    "only xs": (
        lambda xs: scan(lambda c, x: (c + x.abs(), ()), xs[0].real, xs),
        (some(7),),
    ),
    "only ys": (
        lambda xs: scan(lambda c, x: (c + x, torch.complex(c, x)), xs[0], xs),
        (some(7).real,),
    ),
    "donated": (lambda z, xs: scan(lambda c, x: (c * x, c.imag), z, xs), (some(2), some(3, 2))),
    "gradient of a spectral layer": (
        grad(lambda scale, xs: spectral_layer(scale, xs)[1].square().sum()),
        (some(2).real[0], some(5, 6).real),
    ),
    "gradient": (
        lambda h, xs, rates, b: grad(lambda b: state_space(h, xs, rates, b)[1].square().sum())(b),
        (some(5), some(11, 3).real, some(5) / 4, some(5, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_loops_over_complex_numbers(name: str, real_loops: None) -> None:
    fn, args = CASES[name]
    jitted = jit(fn, donate_argnums=0 if name == "donated" else (), strict=True)
    expected = fn(*args)
    assert_equal(jitted(*tree.map(torch.clone, args)), expected, rtol=1e-12)
    (report,) = jitted.report()
    assert report.route == "one program"
