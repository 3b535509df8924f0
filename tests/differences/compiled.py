"""Measures docs/differences/compiled.md: operations eagerly, by torch.compile and by fdl.jit.

All operations are in one program, which has them in one kernel where it can. How they round depends
on the processor: on another one than that of the page, nothing is measured.
"""

import math
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.func import grad

import fdl
from tests.differences.tables import Table

MADE_ON = "AVX2"  # vectors of 256 bits, `torch.backends.cpu.get_cpu_capability()`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILERS = {
    "torch.compile": partial(torch.compile, fullgraph=True),
    "fdl.jit": partial(fdl.jit, strict=True),
}
SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 0.0)
N = 64


def positive(x):
    """Numbers from 0.125 on."""
    return x.abs() + 0.125


# Elementwise operations of [64, 64], which are also given `SPECIAL`.
ELEMENTWISE = {
    "x / 255": lambda x: x / 255,
    "x / 3 · x": lambda x: x / 3 * x,
    "1 / x": lambda x: 1 / x,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": lambda x: torch.log(positive(x)),
    "log1p": lambda x: torch.log1p(positive(x)),
    "sqrt": lambda x: torch.sqrt(positive(x)),
    "rsqrt": lambda x: torch.rsqrt(positive(x)),
    "sin": torch.sin,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "softplus": F.softplus,
    "erf": torch.erf,
    "erfinv": lambda x: torch.erfinv(x / 16),
    "lgamma": lambda x: torch.lgamma(positive(x)),
    "x ** 3": lambda x: x**3,
    "x ** 2.5": lambda x: positive(x) ** 2.5,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "gradient of tanh": lambda x: grad(lambda x: torch.tanh(x).sum())(x),
    "gradient of sigmoid": lambda x: grad(lambda x: torch.sigmoid(x).sum())(x),
    "gradient of gelu": lambda x: grad(lambda x: F.gelu(x).sum())(x),
    "remainder by 0.7": lambda x: torch.remainder(x, 0.7),
    "clamp to [−1, 1]": lambda x: x.clamp(-1, 1),
    "round": torch.round,
}
REDUCING = {
    "sum of all": torch.sum,
    "mean of rows": lambda x: x.mean(1),
    "var of rows": lambda x: x.var(1),
    "norm of rows": lambda x: torch.linalg.vector_norm(x, dim=1),
    "logsumexp": lambda x: x.logsumexp(1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "layer_norm": lambda x: F.layer_norm(x, (N,)),
    "group_norm": lambda x: F.group_norm(x.view(8, 8, N), 4),
    "batch_norm, training": lambda x: F.batch_norm(x.t(), None, None, training=True),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.arange(N)),
    "its gradient": lambda x: grad(lambda x: F.cross_entropy(x, torch.arange(N)))(x),
    "x @ x": lambda x: x @ x,
    "linear, ten outputs": lambda x: F.linear(x, x[:10], x[0, :10]),
    "conv2d": lambda x: F.conv2d(x.view(1, 1, N, N), x[:8, :9].reshape(8, 1, 3, 3)),
    "avg_pool2d": lambda x: F.avg_pool2d(x.view(1, 1, N, N), 3),
    "max_pool2d": lambda x: F.max_pool2d(x.view(1, 1, N, N), 3),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 4, N, 16)] * 3),
}


def numbers(dtype):
    """[64, 64] draws of N(0, 9)."""
    x = torch.randn(N, N, generator=torch.Generator().manual_seed(0)) * 3
    return x.to(dtype)


def operations(xs, special):
    """Apply all operations to each dtype, and those of single numbers to special ones."""
    every = ELEMENTWISE | REDUCING
    results = {f"{name}, {kind}": f(x) for kind, x in xs.items() for name, f in every.items()}
    return results | {f"{name}, special": f(special) for name, f in ELEMENTWISE.items()}


@cache
def compared():
    """The results of all operations, by compiler."""
    inputs = {name: numbers(dtype) for name, dtype in DTYPES.items()}, torch.tensor(SPECIAL)
    ways = {name: make(operations)(*inputs) for name, make in COMPILERS.items()}
    return operations(*inputs), ways


def distance(eager, compiled):
    """The largest difference in units in the last place.

    Of numbers below a thousandth of the largest result, which are what is left of larger ones, the
    unit is that of this thousandth.
    """
    if eager.dtype != compiled.dtype:
        return f"{eager.dtype} → {compiled.dtype}"
    finite = eager.isfinite()
    if not torch.equal(finite, compiled.isfinite()):
        return f"{(finite != compiled.isfinite()).sum()} NaN or ∞ more or fewer"
    a, b = eager[finite].double(), compiled[finite].double()
    size = torch.maximum(a.abs(), a.abs().max() / 1024).clamp(min=torch.finfo(eager.dtype).tiny)
    unit = 2 ** torch.floor(torch.log2(size)) * torch.finfo(eager.dtype).eps
    most = ((a - b).abs() / unit).max().item()
    return "same" if most == 0 else f"{max(round(most), 1)} ulp"


def special(eager, compiled):
    """Name the special numbers at which two results are not the same, with both values."""
    named = dict(zip(("NaN", "∞", "−∞", "−0", "0"), zip(eager, compiled, strict=True), strict=True))
    other = [
        f"{name}: {float(a):g} → {float(b):g}"
        for name, (a, b) in named.items()
        if not (a.isnan() and b.isnan())
        and (a.isnan() or b.isnan() or a.isinf() != b.isinf() or a.signbit() != b.signbit())
    ]
    return "; ".join(other) or "same"


def row(name):
    """Compare one operation."""
    if torch.backends.cpu.get_cpu_capability() != MADE_ON:
        return {}
    eager, ways = compared()
    cells = {
        f"{kind}, {way}": distance(eager[f"{name}, {kind}"], results[f"{name}, {kind}"])
        for kind in DTYPES
        for way, results in ways.items()
    }
    key = f"{name}, special"
    for way, results in ways.items():
        cells[f"NaN, ±∞, ±0, {way}"] = special(eager[key], results[key]) if key in eager else "–"
    return cells


TIES = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
ODD = torch.tensor([1.0, math.nan, 3.0, math.nan])
KINKS = torch.tensor([-1.0, -0.0, 0.0, 1.0])
BYTES = torch.tensor([0, 1, 200, 255], dtype=torch.uint8)
SMALL = torch.tensor([1e-8, 1e-6, 1e-4]).repeat(8, 1)  # for whole vectors
WIDE = torch.tensor([-1.5, 0.5, 2.5, 255.5, 256.0, 300.0])
TENTHS = torch.tensor([0.7, 1.4, 2.8, 7.0], dtype=torch.bfloat16)
# name: function and its input
VALUES = {
    "max of ties, index": (lambda x: x.max(0).indices, TIES),
    "argmax of NaN": (torch.argmax, ODD),
    "amax of NaN": (torch.amax, ODD),
    "nanmean of NaN": (torch.nanmean, ODD),
    "gradient of max at ties": (lambda x: grad(lambda x: x.max(0).values)(x), TIES),
    "gradient of amax at ties": (lambda x: grad(torch.amax)(x), TIES),
    "gradient of maximum(x, 0)": (
        lambda x: grad(lambda x: torch.maximum(x, torch.zeros(())).sum())(x),
        KINKS,
    ),
    "gradient of relu": (lambda x: grad(lambda x: F.relu(x).sum())(x), KINKS),
    "gradient of abs": (lambda x: grad(lambda x: x.abs().sum())(x), KINKS),
    "gradient of clamp(−1, 1)": (lambda x: grad(lambda x: x.clamp(-1, 1).sum())(x), KINKS),
    "gradient of sqrt": (lambda x: grad(lambda x: x.sqrt().sum())(x), KINKS),
    "gradient of the norm of zeros": (
        lambda x: grad(torch.linalg.vector_norm)(x),
        torch.zeros(2),
    ),
    "1 / (x + 0)": (lambda x: 1 / (x + 0), KINKS),
    "1 / (x · 1)": (lambda x: 1 / (x * 1), KINKS),
    "1 / −(0 − x)": (lambda x: 1 / -(0 - x), KINKS),
    "sign": (torch.sign, KINKS),
    "x ** 0": (lambda x: x**0, ODD),
    "round to even": (torch.round, WIDE),
    "to uint8": (lambda x: x.to(torch.uint8), WIDE[1:4]),
    "any of uint8": (torch.any, BYTES),
    "all of uint8, dim 0": (lambda x: x.all(0), BYTES),
    "sum of uint8": (torch.sum, BYTES),
    "uint8 + 100": (lambda x: x + 100, BYTES),
    "uint8 / 2": (lambda x: x / 2, BYTES),
    "uint8 // 7": (lambda x: x // 7, BYTES),
    "x // 0.1": (lambda x: x // 0.1, torch.tensor([0.3, 0.5, 1.0, 2.0])),
    "−uint8": (torch.neg, BYTES),
    "cumsum of uint8": (lambda x: x.cumsum(0), BYTES),
    "argsort of ties, stable": (lambda x: x.argsort(stable=True), TIES),
    "float16 sum of 70000": (lambda x: x.sum(), torch.full((70,), 1000.0, dtype=torch.float16)),
    "float16 mean of 70000": (lambda x: x.mean(), torch.full((70,), 1000.0, dtype=torch.float16)),
    "erf": (torch.erf, SMALL),
    "atanh": (torch.atanh, SMALL),
    "bfloat16 fmod(x, 0.7)": (lambda x: torch.fmod(x, 0.7), TENTHS),
    "bfloat16 x % 0.7": (lambda x: x % 0.7, TENTHS),
    "bfloat16 x // 0.7": (lambda x: x // 0.7, TENTHS),
    "bfloat16 x == full_like(x, 0.7)": (
        lambda x: x == torch.full_like(x, 0.7),
        TENTHS[:2],
    ),
    "bfloat16 (x + 1) − x": (
        lambda x: (x + 1) - x,
        torch.tensor([0.5, 100.0, 300.0, 1000.0], dtype=torch.bfloat16),
    ),
}


def apply_all(inputs):
    """Apply each function to its input."""
    return {name: f(inputs[name]) for name, (f, _) in VALUES.items()}


@cache
def values():
    """What all functions return, by the way they are called."""
    inputs = {name: x for name, (_, x) in VALUES.items()}
    ways = {name: make(apply_all)(inputs) for name, make in COMPILERS.items()}
    return {"eager": apply_all(inputs), **ways}


def shown(x):
    """A dtype and numbers; of a matrix, the first row."""
    x = x[0] if x.ndim > 1 else x
    numbers = ", ".join(f"{z:g}" if x.is_floating_point() else str(z) for z in x.flatten().tolist())
    return f"{str(x.dtype).removeprefix('torch.')}: {numbers}"


def value(name):
    """Show what one function returns."""
    return {way: shown(results[name]) for way, results in values().items()}


COLUMNS = [f"{kind}, {way}" for kind in DTYPES for way in COMPILERS]
TABLES = (
    Table(
        "operations",
        ("operation", *COLUMNS, *(f"NaN, ±∞, ±0, {way}" for way in COMPILERS)),
        {name: partial(row, name) for name in (*ELEMENTWISE, *REDUCING)},
        ("torch",),
    ),
    Table(
        "values",
        ("function", "eager", *COMPILERS),
        {name: partial(value, name) for name in VALUES},
        ("torch",),
    ),
)
