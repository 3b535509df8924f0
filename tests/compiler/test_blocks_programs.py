"""Whole programs with nets in blocks: loops, branches, populations, files, threads.

Oracles: eager torch in float64; the same program computed once more, to the bit.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import fdl
from fdl import jit, tree
from fdl._compiler import _block_pass
from fdl._torch_compat import RELEASE
from tests.support.asserts import equal_bits
from tests.support.blocks import assert_close, has_layer
from tests.support.exported import lenet_epoch, lenet_step

pytestmark = pytest.mark.slow
needs_loops = pytest.mark.skipif(RELEASE < (2, 12), reason="torch 2.11 has no loops in files")
Params = dict[str, Tensor]


def some(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def net(params: Params, x: Tensor) -> Tensor:
    y = F.max_pool2d(F.conv2d(x, params["w"], params["b"], padding=1).relu(), 2)
    y = F.batch_norm(y, None, None, training=True)
    y = F.avg_pool2d(torch.sigmoid(F.conv2d(y, params["v"])), 2)
    return y.flatten(1) @ params["out"]


def init(dtype: torch.dtype = torch.float64) -> Params:
    shapes = {"w": (4, 2, 3, 3), "b": (4,), "v": (5, 4, 3, 3), "out": (5, 3)}
    return {name: some(*shape, dtype=dtype) * 0.3 for name, shape in shapes.items()}


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return (net(params, x) - y).square().mean()


def attention_loss(params: Params, x: Tensor) -> Tensor:
    """Return a loss of sequences `[images, 6, 8]` after attention."""
    q, k, v = F.linear(F.layer_norm(x, (8,)), params["qkv"]).chunk(3, -1)
    out = x + torch.softmax(q @ k.mT, -1) @ v
    return F.gelu(F.linear(out, params["up"], params["bias"])).mean(1).square().sum()


def attention_step(params: Params, x: Tensor) -> tuple[Params, None]:
    return tree.map(lambda p, g: p - 0.1 * g, params, grad(attention_loss)(params, x)), None


def attention_init(dtype: torch.dtype = torch.float64) -> Params:
    shapes = {"qkv": (24, 8), "up": (32, 8), "bias": (32,)}
    return {name: some(*shape, dtype=dtype) * 0.3 for name, shape in shapes.items()}


def step(params: Params, batch: tuple[Tensor, Tensor]) -> tuple[Params, Tensor]:
    grads = grad(loss)(params, *batch)
    return tree.map(lambda p, g: p - 0.1 * g, params, grads), loss(params, *batch)


def epoch(params: Params, xs: Tensor, ys: Tensor) -> Any:
    return fdl.scan(step, params, (xs, ys))


def gathered_epoch(params: Params, x: Tensor, y: Tensor, rows: Tensor) -> Any:
    return fdl.scan(lambda p, i: step(p, (x[i], y[i])), params, rows)


def branch(params: Params, x: Tensor, y: Tensor) -> Any:
    both = (lambda p: loss(p, x, y), lambda p: loss(p, x.flip(-1), y))
    return fdl.cond(x.sum() > 0, *both, params), fdl.cond(x.sum() <= 0, *both, params)


def until(params: Params, x: Tensor, y: Tensor) -> Any:
    def body(carry: Any) -> Any:
        params, i = carry
        return step(params, (x, y))[0], i + 1

    return fdl.while_loop(
        lambda carry: carry[1] < 3, body, (params, torch.zeros((), dtype=torch.int64))
    )


def members(params: Params) -> Params:
    return tree.map(lambda p: torch.stack([p, p * 0.9, p * 1.1]), params)


@pytest.fixture(autouse=True)
def wherever_there_can_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_block_pass, "pays", has_layer)


XS, YS = some(4, 19, 2, 10, 10), some(4, 19, 3)
X, Y = some(50, 2, 10, 10), some(50, 3)
ROWS = torch.arange(50).flip(0)[:38].view(2, 19)
PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "a step": (step, (init(), (XS[0], YS[0]))),
    "an epoch": (epoch, (init(), XS, YS)),
    "an epoch of rows": (gathered_epoch, (init(), X, Y, ROWS)),
    "a branch": (branch, (init(), X[:9], Y[:9])),
    "a loop with a condition": (until, (init(), X[:9], Y[:9])),
    "epochs of a population": (vmap(epoch, (0, None, None)), (members(init()), XS, YS)),
    "gradients through an epoch": (
        grad(lambda p, xs, ys: epoch(p, xs, ys)[1].sum()),
        (init(), XS, YS),
    ),
    "per-sample gradients": (
        lambda p, x, y: vmap(grad(lambda p, x, y: loss(p, x[None], y[None])), (None, 0, 0))(
            p, x, y
        ),
        (init(), X[:9], Y[:9]),
    ),
    "an epoch of sequences": (
        lambda p, xs: fdl.scan(attention_step, p, xs)[0],
        (attention_init(), some(3, 19, 6, 8)),
    ),
    "epochs of a population of sequences": (
        lambda p, xs: vmap(lambda p: fdl.scan(attention_step, p, xs)[0])(p),
        (members(attention_init()), some(3, 19, 6, 8)),
    ),
    "training and evaluation": (
        lambda p, a, b: (step(p, a), net(p, b).argmax(1)),
        (init(), (XS[0], YS[0]), X),
    ),
}


NONE = ("per-sample gradients", "epochs of a population of sequences")


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_equal_eager_torch(name: str) -> None:
    fn, args = PROGRAMS[name]
    compiled = jit(fn, strict=True)
    assert_close(compiled(*args), fn(*args))
    assert compiled.report()[0].regions or name in NONE


def test_a_donated_state() -> None:
    train = jit(step, donate_argnums=0, strict=True)
    params, expected = init(), init()
    for x, y in zip(XS, YS, strict=True):
        params, value = train(params, (x, y))
        expected, expected_value = step(expected, (x, y))
        assert_close((params, value), (expected, expected_value))
    assert train.report()[0].regions


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_bits_for_a_number_of_threads(dtype: torch.dtype, threads: Any) -> None:
    args = (init(dtype), some(250, 2, 10, 10, dtype=dtype), some(250, 3, dtype=dtype))
    _check_bits(grad(loss), args, dtype, threads)
    _check_bits(
        grad(attention_loss), (attention_init(dtype), some(250, 6, 8, dtype=dtype)), dtype, threads
    )


def _check_bits(fn: Any, args: tuple[Any, ...], dtype: torch.dtype, threads: Any) -> None:
    expected = fn(*args)
    for number in (1, 2, 3):
        threads(number)
        compiled = jit(fn, strict=True)
        first = compiled(*args)
        for _ in range(20):
            again = compiled(*args)
            assert all(equal_bits(first[name], again[name]) for name in first)
        if dtype is torch.float64:
            assert_close(first, expected)
        assert compiled.report()[0].regions


def test_float32_is_as_close_as_eager_torch() -> None:
    args = (init(), some(70, 2, 10, 10), some(70, 3))
    exact = grad(loss)(*args)
    rounded = tree.map(Tensor.float, args)
    eager, got = grad(loss)(*rounded), jit(grad(loss), strict=True)(*rounded)
    for name, leaf in exact.items():
        error, usual = ((z[name] - leaf).abs().max() for z in (got, eager))
        assert error <= 3 * usual + 1e-6 * leaf.abs().max(), name


def test_strides_are_those_of_eager_torch() -> None:
    def activations(params: Params, x: Tensor) -> Any:
        y = F.conv2d(x, params["w"])
        return y, y.relu(), F.max_pool2d(y, 2), y.transpose(2, 3), y[:, 1], y > 0

    for x in (X, X.to(memory_format=torch.channels_last), X[::2, :, 1:]):
        got, expected = jit(activations, strict=True)(init(), x), activations(init(), x)
        assert_close(got, expected)
        for a, b in zip(got[:2], expected[:2], strict=True):
            assert a.stride() == b.stride()


def test_bfloat16_has_no_region() -> None:
    args = tree.map(Tensor.bfloat16, (init(), XS[0], YS[0]))
    compiled = jit(grad(loss), strict=True)
    compiled(*args)
    report = compiled.report()[0]
    assert report.regions == 0
    assert all("bfloat16" in text for text in report.left_out)


@pytest.mark.parametrize("case", [lenet_step, pytest.param(lenet_epoch, marks=needs_loops)])
def test_a_file_computes_the_same_bits(case: Any, tmp_path: Path) -> None:
    fn, args = case()
    compiled = jit(fn, strict=True)
    expected = compiled(*args)
    assert compiled.report()[0].regions
    path = tmp_path / "program.pt2"
    fdl.export(fn, args, path)
    got = fdl.load_program(path)(*args)
    for a, b in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        assert equal_bits(a, b)


def test_a_cached_program_computes_the_same_bits(program_cache: Path) -> None:
    fn, args = lenet_step()
    expected = jit(fn, strict=True)(*args)
    again = jit(fn, strict=True)
    got = again(*args)
    assert again.report()[0].cached
    for a, b in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        assert equal_bits(a, b)
