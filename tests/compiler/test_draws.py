"""Random words by a kernel of the program: `fdl::random_words`.

Oracle: the same draws eagerly, by operations of torch, which `tests/random` compares with JAX.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

import fdl
from fdl import jit, random
from fdl._compiler import _draws
from fdl._compiler._blocks import REGISTERS, vector_registers
from fdl._threefry import dtype_of_words, encrypted_words, threefry2x32
from fdl.random._arithmetic import MANY
from tests.support.blocks import compile_kernel

KEY = random.key(3)
# Below the kernel's least size, at it, parts of a vector, and more than one thread draws.
SHAPES = [(), (MANY - 1,), (MANY,), (MANY + 1,), (3, 7, 1, 67), (_draws.SMALL * 2 + 5,), (0, 5000)]


def kernels_of(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str]:
    """Return the result of a jitted function, and the source of its kernels."""
    sources: list[str] = []
    original = _draws.call_kernel

    def noted(wrapper: Any, name: str, source: str, *rest: Any) -> None:
        sources.append(name)
        original(wrapper, name, source, *rest)

    # What Inductor finds in its cache is not written again.
    fresh = torch._inductor.config.patch(fx_graph_cache=False)
    with pytest.MonkeyPatch.context() as patch, fresh:
        patch.setattr("fdl._compiler._draws.call_kernel", noted)
        patch.setenv("FDL_CACHE", "0")
        return jit(fn, strict=True, **options)(*args), " ".join(sources)


def check(fn: Callable[..., Any], *args: Any, draws: int = 1) -> None:
    result, kernels = kernels_of(fn, *args)
    torch.testing.assert_close(result, fn(*args), rtol=0, atol=0)
    assert kernels.count("draws") == draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_size(dtype: torch.dtype) -> None:
    many = sum(torch.Size(shape).numel() >= MANY for shape in SHAPES)
    check(lambda key: [random.uniform(key, s, dtype=dtype) for s in SHAPES], KEY, draws=many)


DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "bits": lambda key: random.bits(key, (40, 50)),
    "normal": lambda key: random.normal(key, (40, 50), dtype=torch.float64),
    "bfloat16": lambda key: random.uniform(key, (40, 50), dtype=torch.bfloat16),
    "float16": lambda key: random.normal(key, (40, 50), dtype=torch.float16),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (40, 50)),
    "randint": lambda key: random.randint(key, (2000,), -5, 10**12, dtype=torch.int64),
    "permutation": lambda key: random.permutation(key, 3000),
    "a key of several": lambda key: random.bits(random.split(key, 5)[3], (2000,)),
    "a key with strides": lambda key: random.bits(
        random.split(key, 2).T.contiguous().T[1], (2000,)
    ),
    "keys": lambda key: torch.func.vmap(lambda k: random.bits(k, (1100,)))(random.split(key, 3)),
    "keys of keys": lambda key: torch.func.vmap(torch.func.vmap(lambda k: random.bits(k, (1100,))))(
        random.split(key, 6).reshape(2, 3, 2)
    ),
    "keys along the last axis": lambda key: torch.func.vmap(
        lambda k: random.bits(k, (1100,)), in_dims=1
    )(random.split(key, 3).T),
    "in a loop": lambda key: fdl.scan(
        lambda total, k: (total + random.bits(k, (1500,)), random.uniform(k, (1500,))),
        torch.zeros(1500, dtype=torch.int64),
        random.split(key, 4),
    ),
    "a loop of keys": lambda key: fdl.scan(
        lambda k, _: (random.fold_in(k, 1), random.bits(k, (1500,))), key, None, length=4
    ),
}


def test_each_draw() -> None:
    def every(key: Tensor) -> Any:
        keys = random.split(key, len(DRAWS))
        return {name: draw(key) for (name, draw), key in zip(DRAWS.items(), keys, strict=True)}

    result, kernels = kernels_of(every, KEY)
    torch.testing.assert_close(result, every(KEY), rtol=1e-15, atol=0)
    assert kernels.count("draws") >= len(DRAWS)


def test_derivatives_of_what_is_dropped() -> None:
    x = torch.linspace(-1, 1, 2000, dtype=torch.float64)

    def loss(x: Tensor, key: Tensor) -> Tensor:
        return (fdl.nn.dropout(0.4).apply({}, x, train=True, key=key) ** 3).sum()

    def derivatives(x: Tensor, key: Tensor) -> Any:
        return (
            torch.func.grad(loss)(x, key),
            torch.func.hessian(loss)(x[:1100], key),
            torch.func.jvp(lambda x: loss(x, key), (x,), (x,)),
            torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(x, random.split(key, 3)),
        )

    result, kernels = kernels_of(derivatives, x, KEY)
    torch.testing.assert_close(result, derivatives(x, KEY), rtol=1e-13, atol=1e-13)
    assert kernels.count("draws") == 3  # `grad` and `jvp` draw from the same key


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", sorted({BYTES for BYTES, _ in REGISTERS.values()} | {16}))
def test_counters_beyond_32_bits(size: int, dtype: torch.dtype) -> None:
    if size > vector_registers()[0]:
        pytest.skip("this processor has no such vectors")
    start, count, (k0, k1) = 2**32 - 9, 16, (2**32 - 1, 7)
    source, types = _draws.source_of(dtype, size)
    parameters = ", ".join(f"{kind} a{i}" for i, kind in enumerate(types))
    source = source.replace("KERNEL_NAME", "draws").replace("PARAMETERS", parameters)
    wide, shift = ("true", 0) if dtype is torch.int64 else ("false", 9)
    source += f"""
    extern "C" void kernel(const int64_t* key, {types[1]} to, int64_t start, int64_t count) {{
        draws_parts::draw(key, to, start, count, {wide}, {shift});
    }}"""
    key, result = torch.tensor([k0, k1]), torch.empty(count, dtype=dtype)
    count = min(count, size)  # what one call computes
    compile_kernel(source, ("-O2", "-march=native"))(
        ctypes.c_void_p(key.data_ptr()),
        ctypes.c_void_p(result.data_ptr()),
        ctypes.c_int64(start),
        ctypes.c_int64(count),
    )
    index = torch.arange(start, start + count)
    high, low = threefry2x32(key[0], key[1], index >> 32, index & 0xFFFFFFFF)
    expected = high << 32 | low if dtype is torch.int64 else (high ^ low) >> 9
    assert torch.equal(result[:count].to(torch.int64), expected)


@pytest.mark.parametrize(("width", "shift"), [(64, 0), (32, 0), (32, 9), (8, 1)])
def test_the_operation_itself_draws_the_same(width: int, shift: int) -> None:
    """As in a program that runs without a compiler; and as a kernel."""
    keys = random.split(KEY, 3)
    words = torch.ops.fdl.random_words(keys, [1200], width, shift)
    expected = torch.stack([encrypted_words(key, (1200,), width, shift) for key in keys])
    assert torch.equal(words, expected) and words.dtype is dtype_of_words(shift)
    check(lambda keys: torch.ops.fdl.random_words(keys, [1200], width, shift), keys)
