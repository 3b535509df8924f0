"""NaN, infinities and ties in nets that are computed block by block are those of eager torch.

Oracle: eager torch. NaN is put at one place of the input, of a weight, or of the gradient; all
results have it at the same places.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from fdl import jit
from tests.support.blocks import Regions, assert_close, check

Net = Callable[[Tensor, Tensor, Tensor], Tensor]
BATCH = 19  # of 8 or 16 in a block: the last is not full


def some(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def with_gradients(net: Net) -> Callable[..., Any]:
    def both(x: Tensor, w: Tensor, b: Tensor, cotangent: Tensor) -> Any:
        out, pull = vjp(net, x, w, b)
        return out, pull(cotangent.expand(out.shape) if cotangent.ndim < out.ndim else cotangent)

    return both


def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, w, b)


NETS: dict[str, Net] = {
    "convolution": conv,
    "relu": lambda *a: conv(*a).relu(),
    "max pool": lambda *a: F.max_pool2d(conv(*a), 2),
    "overlapping max pool": lambda *a: F.max_pool2d(conv(*a), 3, 1, 1),
    "average pool": lambda *a: F.avg_pool2d(conv(*a), 2, 1, 1, count_include_pad=False),
    "sigmoid": lambda *a: torch.sigmoid(conv(*a)),
    "tanh": lambda *a: torch.tanh(conv(*a)),
    "gelu": lambda *a: F.gelu(conv(*a)),
    "silu": lambda *a: F.silu(conv(*a)),
    "leaky relu": lambda *a: F.leaky_relu(conv(*a), 0.1),
    "clamp": lambda *a: conv(*a).clamp(-0.5, 0.5),
    "minimum": lambda *a: torch.minimum(conv(*a), conv(*a).flip(1)),
    "maximum": lambda *a: torch.maximum(conv(*a), conv(*a).flip(1)),
    "where": lambda *a: torch.where(conv(*a) > 0, conv(*a), 0.5),
    "quotient": lambda *a: 1 / conv(*a).relu(),
    "root": lambda *a: conv(*a).sqrt(),
    "logarithm": lambda *a: conv(*a).log(),
    "batch norm": lambda *a: F.batch_norm(conv(*a), None, None, training=True),
    "channels' sums": lambda *a: conv(*a).sum((0, 2, 3)),
}
VALUES = {"NaN": nan, "∞": inf, "−∞": -inf, "large": 1e300}


def one(x: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    return x.clone().index_put_(tuple(torch.tensor(i) for i in index), torch.tensor(value).double())


@pytest.mark.parametrize("name", NETS)
def test_what_is_not_finite(name: str) -> None:
    """One program for all values: of an image of a full block, of the last image, and others."""
    x, w, b, cotangent = some(BATCH, 2, 6, 7), some(3, 2, 2, 3), some(3), torch.ones(()).double()
    cases = []
    for value in VALUES.values():
        for index in ((3, 1, 2, 2), (BATCH - 1, 1, 0, 0)):
            cases.append((one(x, index, value), w, b, cotangent))
        cases.append((x, w, one(b, (1,), value), cotangent))
    cases.append((x, w, b, torch.full((), nan).double()))
    fn = with_gradients(NETS[name])
    for case in cases:
        check(1, fn, *case)


def test_a_weight_that_is_not_finite() -> None:
    """Zeros around the gradient are multiplied with it: more pixels may be NaN, and none fewer."""
    w = one(some(3, 2, 2, 3), (1, 1, 1, 1), nan)
    args = (some(BATCH, 2, 6, 7), w, some(3), torch.ones(()).double())
    fn = with_gradients(NETS["relu"])
    out, (by_input, *others) = fn(*args)
    with Regions().used() as regions:
        got, (got_by_input, *got_others) = jit(fn, strict=True)(*args)
    assert regions.calls
    assert_close((got, got_others), (out, others))
    finite = ~got_by_input.isnan()
    assert bool(finite.any())
    assert_close(got_by_input[finite], by_input[finite])


@pytest.mark.parametrize("value", [0.0, -inf, nan, inf])
def test_ties_go_to_the_first(value: float) -> None:
    """Images of one value, and of few: the gradient of a maximum belongs to the first."""
    w, b = torch.ones(3, 2, 1, 1).double(), torch.zeros(3).double()

    def net(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = conv(x, w, b)
        pools = F.max_pool2d(y, 2), F.max_pool2d(y, 3, 2, 1), F.max_pool2d(y, 2, 1, 1, 2)
        return torch.cat([pool.flatten(1) * (i + 1) for i, pool in enumerate(pools)], 1)

    x = (torch.arange(BATCH * 2 * 64) % 3).double().view(BATCH, 2, 8, 8)
    cotangent = torch.arange(1, BATCH * 3 * (16 + 16 + 64) + 1).double()
    out = net(x, w, b)
    cotangent = cotangent[: out.numel()].view(out.shape)
    for image in (x, torch.full_like(x, value), torch.where(x == 1, value, x)):
        check(1, with_gradients(net), image, w, b, cotangent)


FEWER = """
import torch
import torch.nn.functional as F
from torch.func import grad

from fdl import jit
from fdl._compiler import _block_pass

_block_pass.pays = lambda group: any("convolution" in str(node.target) for node in group)
x, w = torch.randn(70, 3, 9, 9, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
loss = lambda w, x: F.max_pool2d(F.conv2d(x, w), 2).tanh().square().sum()
torch.set_num_threads(2)
compiled = jit(grad(loss), strict=True)
torch.testing.assert_close(compiled(w, x), grad(loss)(w, x), rtol=1e-10, atol=1e-10)
assert compiled.report()[0].regions
"""


@pytest.mark.slow
@pytest.mark.parametrize("option", ["OMP_THREAD_LIMIT", "OMP_DYNAMIC"])
def test_fewer_threads_than_asked_for(option: str) -> None:
    values = {"OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "true"}
    environment = {**os.environ, "OMP_NUM_THREADS": "2", option: values[option]}
    subprocess.run([sys.executable, "-c", FEWER], env=environment, check=True, timeout=300)
