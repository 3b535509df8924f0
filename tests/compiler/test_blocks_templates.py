"""The templates of `blocks/*.h` on every processor: their functions, and convolutions at the edge.

Oracle: torch in float64.
"""

import platform
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.backends.cpu import get_cpu_capability
from torch.fx.experimental.proxy_tensor import make_fx

from fdl._compiler import _blocks
from fdl._compiler._block_layers import part, tiles
from fdl._compiler._block_pass import compute_in_blocks
from fdl._compiler._inductor import import_inductor
from tests.support.blocks import Regions

aten = torch.ops.aten
FLAGS = {
    "DEFAULT": ("-O1",),
    "AVX2": ("-O1", "-mavx2", "-mfma"),
    "AVX512": ("-O1", "-mavx512f", "-mavx512dq", "-mfma"),
}
X86 = platform.machine() in ("x86_64", "AMD64")
PROCESSORS = list(FLAGS)[: list(FLAGS).index(get_cpu_capability()) + 1] if X86 else ["DEFAULT"]


@pytest.fixture(params=PROCESSORS)
def regions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Regions:
    monkeypatch.setattr(_blocks, "get_cpu_capability", lambda: request.param)
    return Regions(*FLAGS[request.param])


def in_blocks(regions: Regions, fn: Any, *args: Tensor) -> Any:
    """Return what a function gives whose convolutions are computed block by block."""
    import_inductor()
    module = make_fx(fn, tracing_mode="fake")(*args)
    compute_in_blocks(module)
    module.recompile()
    left = {node.target for node in module.graph.nodes}
    assert not left & {aten.convolution.default, aten.convolution_backward.default}
    with regions.used():
        return module(*args)


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    """Return errors in units of the last place of float32."""
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    spacing = torch.full_like(exact, 2.0) ** (exponent - 24)
    equal = (got == exact.float()) | (got.isnan() & exact.isnan())
    return torch.where(equal, 0.0, (got.double() - exact).abs() / spacing)


FUNCTIONS = {
    "exp": (torch.exp, 2),
    "log": (torch.log, 2),
    "tanh": (torch.tanh, 2),
    "erf": (torch.erf, 2),
    "sigmoid": (torch.sigmoid, 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_all_floats(regions: Regions, name: str) -> None:
    fn, most = FUNCTIONS[name]
    bits = torch.arange(-(2**31), 2**31, 16411, dtype=torch.int64).to(torch.int32)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, 88.7, -87.4, -103.9, 1e-40]
    )
    x = torch.cat([bits.view(torch.float32), special, torch.linspace(-20, 20, 65536)])
    if name == "sigmoid":  # as torch's, it is 0 where exp(−x) is infinite
        x = x[~(x < -88)]
    x = x[: x.numel() // 32 * 32].view(32, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1)  # only programs with a convolution have regions
    no = [[1, 1], [0, 0], [1, 1], False, [0, 0], 1]
    got = in_blocks(regions, lambda x, w: aten.convolution.default(fn(x), w, None, *no), x, one)
    # A sum of the convolution begins with +0.
    assert ulps(got, fn(x.double())).max() <= most


BATCH = 11  # the last block is not full, whatever a register holds
# Size of the image, kernel, stride, padding, dilation, channels, outputs, groups.
CONVOLUTIONS: dict[str, tuple[Any, ...]] = {
    "kernel wider than the registers": ((2, 40), (1, 19), (1, 1), (0, 9), (1, 1), 2, 3, 1),
    "wide kernel with gaps": ((3, 40), (2, 9), (2, 3), (1, 4), (1, 2), 2, 3, 1),
    "padding beyond the kernel": ((4, 5), (1, 1), (1, 1), (2, 3), (1, 1), 3, 2, 1),
    "padding beyond a kernel with strides": ((4, 5), (2, 2), (3, 2), (4, 5), (1, 1), 3, 2, 1),
    "strides beyond the kernel": ((9, 8), (1, 2), (3, 4), (0, 0), (1, 1), 2, 5, 1),
    "rows and columns that are left over": ((10, 11), (2, 3), (3, 4), (0, 0), (1, 1), 2, 5, 1),
    "stride and dilation with a common factor": ((9, 12), (3, 3), (2, 4), (2, 1), (4, 2), 2, 3, 1),
    "one pixel": ((1, 1), (3, 3), (1, 1), (1, 1), (1, 1), 3, 17, 1),
    "one pixel with strides": ((1, 1), (3, 3), (2, 2), (1, 1), (1, 1), 3, 5, 1),
    "only padding": ((1, 3), (2, 1), (1, 1), (3, 0), (1, 1), 2, 3, 1),
    "groups of one channel": ((6, 7), (3, 3), (1, 2), (1, 1), (1, 1), 5, 10, 5),
    "many outputs and channels": ((5, 6), (3, 3), (1, 1), (1, 1), (1, 1), 17, 33, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(regions: Regions, name: str) -> None:
    size, kernel, stride, padding, dilation, channels, outputs, groups = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, w, b = (
        some(BATCH, channels, *size),
        some(outputs, channels // groups, *kernel),
        some(outputs),
    )
    options = [list(stride), list(padding), list(dilation), False, [0, 0], groups]
    g = torch.randn_like(aten.convolution.default(x, w, b, *options))

    def fn(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Any:
        y = aten.convolution.default(x, w, b, *options)
        z = aten.relu.default(aten.convolution.default(x.sin(), w, None, *options))
        grads = aten.convolution_backward.default(g * y, x, w, [outputs], *options, [True] * 3)
        return y, z * 2, [*grads]

    got, expected = in_blocks(regions, fn, x, w, b, g), fn(x, w, b, g)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("images", [3, 17])
def test_nan_of_an_image_stays_in_it(regions: Regions, images: int) -> None:
    """The last block is filled up with its last image, which must not count twice."""
    x, w = torch.ones(images, 2, 5, 5), torch.ones(3, 2, 3, 3)
    x[-1, 0, 2, 2] = torch.nan
    x[-2, 0, 2, 2] = torch.inf
    options = [[1, 1], [1, 1], [1, 1], False, [0, 0], 1]

    def fn(x: Tensor, w: Tensor) -> Any:
        y = aten.convolution.default(x, w, None, *options)
        grads = aten.convolution_backward.default(y.sign(), x, w, [3], *options, [True] * 3)
        return y, aten.relu.default(aten.convolution.default(x, -w, None, *options)), [*grads]

    torch.testing.assert_close(in_blocks(regions, fn, x, w), fn(x, w), equal_nan=True)


@pytest.mark.parametrize("registers", [16, 32])
def test_tiles_fit_into_registers(registers: int) -> None:
    for outputs in (1, 2, 7, 16, 33):
        for columns in (1, 3, 14, 28):
            for width in (1, part(3, registers), part(9, (registers - 1) // 3)):
                o, j = tiles(outputs, columns, registers, width)
                assert 1 <= o <= outputs and 1 <= j <= columns
                assert (o * j + j) * width < registers
