"""The draws that docs/differences/draws.md compares, and how they are made; needs no torch.

An interpreter with another release of JAX runs `everything`.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

SEED, SHAPE = 42, (256,)


class Array(NamedTuple):
    """An argument that is a tensor in fdl and an array in JAX."""

    values: Any
    dtype: str = "float32"


class Draw(NamedTuple):
    """A call of a function that fdl.random and jax.random have in common; dtypes are named."""

    function: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed

    @property
    def is_wide(self):
        """Whether JAX needs its x64 for it."""
        return "64" in str(self.options.get("dtype"))


def draw(function, *args, shape=SHAPE, **options):
    """A draw of this shape; what takes none is passed `shape=None`."""
    return Draw(function, args, options if shape is None else options | {"shape": shape})


def of_dtypes(function, *args, dtypes, **options):
    """The draw in several dtypes, by the name of its row."""
    shown = ", ".join(map(str, args))
    return {
        f"`{function}({shown})`, {dtype}": draw(function, *args, dtype=dtype, **options)
        for dtype in dtypes
    }


FLOATS = ("float32", "float64", "bfloat16", "float16")
LOGITS = [0.0, 1.0, 2.0, -1.0, 0.5]
WEIGHTS = Array([0.1, 0.2, 0.3, 0.4])
COVARIANCE = Array([[2.0, 0.5], [0.5, 1.0]])
DRAWS = {
    "`split(3)`": draw("split", 3, shape=None),
    "`fold_in(7)`": draw("fold_in", 7, shape=None),
    **of_dtypes("bits", dtypes=("uint8", "uint16", "uint32", "uint64")),
    **of_dtypes("uniform", dtypes=FLOATS),
    **of_dtypes("uniform", dtypes=("float32",), minval=-1.0, maxval=3.0),
    **of_dtypes("normal", dtypes=FLOATS),
    **of_dtypes("truncated_normal", -2.0, 2.0, dtypes=FLOATS),
    **of_dtypes("truncated_normal", 3.0, 4.0, dtypes=("float32",)),
    "`bernoulli(0.3)`": draw("bernoulli", Array(0.3)),
    "`bernoulli(p)`, p in bfloat16": draw("bernoulli", Array(0.3, "bfloat16")),
    **of_dtypes("randint", SHAPE, 0, 10, shape=None,
                dtypes=("int32", "int64", "int8", "uint8", "int16", "uint16")),
    **of_dtypes("randint", SHAPE, -100, 100, shape=None, dtypes=("int8",)),
    **of_dtypes("rademacher", dtypes=("int32", "int8")),
    "`permutation(100)`": draw("permutation", 100, shape=None),
    "`choice(100)`": draw("choice", 100),
    "`choice(4)` with `p`": draw("choice", 4, p=WEIGHTS),
    "`choice(300, replace=False)`": draw("choice", 300, replace=False),
    **{f"`categorical`, logits in {dtype}": draw("categorical", Array(LOGITS, dtype))
       for dtype in ("float32", "bfloat16", "float16")},
    **of_dtypes("exponential", dtypes=("float32", "bfloat16")),
    **of_dtypes("gumbel", dtypes=("float32", "bfloat16")),
    **of_dtypes("laplace", dtypes=("float32", "bfloat16")),
    **of_dtypes("logistic", dtypes=("float32", "bfloat16")),
    **of_dtypes("cauchy", dtypes=("float32", "bfloat16")),
    **of_dtypes("gamma", 0.3, dtypes=("float32",)),
    **of_dtypes("gamma", 3.0, dtypes=("float32", "bfloat16")),
    **of_dtypes("beta", 0.5, 2.0, dtypes=("float32",)),
    "`dirichlet`, 3 of 1": draw("dirichlet", Array([1.0, 1.0, 1.0]), shape=(80,)),
    **of_dtypes("t", 3.0, dtypes=("float32",)),
    "`ball(3)`": draw("ball", 3, shape=(80,)),
    **of_dtypes("poisson", 2.0, dtypes=("int32",)),
    **of_dtypes("poisson", 50.0, dtypes=("int32",)),
    **of_dtypes("binomial", 10.0, 0.3, dtypes=("float32",)),
    **of_dtypes("binomial", 100.0, 0.4, dtypes=("float32",)),
    "`multivariate_normal`": draw("multivariate_normal", Array([0.0, 1.0]), COVARIANCE),
    "`orthogonal(8)`": draw("orthogonal", 8, shape=(4,)),
}  # fmt: skip


def called(draw, random, xp, key):
    """Make a draw with the functions of `random` and arrays of `xp`, torch or jax.numpy."""
    array = xp.tensor if hasattr(xp, "tensor") else xp.array

    def made(value):
        if isinstance(value, Array):
            return array(value.values, dtype=getattr(xp, value.dtype))
        return value

    options = {name: made(value) for name, value in draw.options.items()}
    if "dtype" in options:
        options["dtype"] = getattr(xp, options["dtype"])
    return getattr(random, draw.function)(key, *map(made, draw.args), **options)


def x64(on):
    """JAX's x64 for a block; `jax.experimental` had it before."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64

    return enable_x64(on)


def as_lists(x):
    """Numbers that JSON keeps as they are, with the name of their dtype."""
    x = np.asarray(x)
    exact = x if x.dtype.kind in "biu" else x.astype("float64")
    return {"dtype": str(x.dtype), "values": exact.reshape(-1).tolist()}


def jax_array(draw, wide=False):
    """What the installed JAX draws, or the name of the error it raises."""
    import jax

    with x64(True) if wide or draw.is_wide else nullcontext():
        try:
            found = called(draw, jax.random, jax.numpy, jax.random.key(SEED))
        except Exception as error:
            return type(error).__name__
        if jax.dtypes.issubdtype(found.dtype, jax.dtypes.prng_key):
            found = jax.random.key_data(found)
        return np.asarray(found)


def jax_draw(draw, wide=False):
    """The same as lists."""
    found = jax_array(draw, wide)
    return found if isinstance(found, str) else as_lists(found)


def all_draws():
    """What the installed JAX draws, by the name of the row."""
    return {name: jax_draw(draw) for name, draw in DRAWS.items()}


def chi_squared(low, high):
    """How uneven the counts of integers in [low, high) are; about 1 for fair draws."""

    def summary(x):
        counts = np.bincount(x.astype("int64") - low, minlength=high - low)
        expected = len(x) / (high - low)
        return f"χ²/df {np.sum((counts - expected) ** 2 / expected) / (len(counts) - 1):.3g}"

    return summary


def range_of(x):
    """The smallest and the largest value, and how many there are."""
    x = np.asarray(x).astype("float64")
    return f"{x.min():.4g} to {x.max():.4g}, {len(np.unique(x))} values"


def evenness(classes):
    """How many classes were drawn, and how often the most frequent one."""

    def summary(x):
        counts = np.bincount(np.asarray(x).astype("int64"), minlength=classes)
        most = counts.max() * classes / counts.sum()
        return f"{np.count_nonzero(counts)} drawn, most {most:.2f} × its share"

    return summary


def hits(p):
    """How many were true, and how many should be."""

    def summary(x):
        return f"{np.count_nonzero(x)}, expected {x.size * p:.3g}"

    return summary


MANY, CLASSES = (2**16,), 50
BOUNDS = {
    "int8": (-100, 100), "uint8": (0, 200), "int16": (-1000, 1000), "uint16": (0, 3000),
}  # fmt: skip
SAMPLES = {
    **{f"2¹⁶ `randint({low}, {high})`, {dtype}":
       (draw("randint", MANY, low, high, dtype=dtype, shape=None), chi_squared(low, high))
       for dtype, (low, high) in BOUNDS.items()},
    "2¹⁶ `randint(0, 256)`, uint8":
       (draw("randint", MANY, 0, 256, dtype="uint8", shape=None), chi_squared(0, 256)),
    **{f"10⁴ `truncated_normal({low:g}, {high:g})`, float32":
       (draw("truncated_normal", low, high, shape=(10**4,), dtype="float32"), range_of)
       for low, high in ((3.0, 4.0), (5.0, 6.0), (-6.0, -5.0), (9.0, 10.0), (6.0, math.inf))},
    "10⁴ `truncated_normal(-2, 2)`, bfloat16":
       (draw("truncated_normal", -2.0, 2.0, shape=(10**4,), dtype="bfloat16"), range_of),
    **{f"2¹⁶ `{name}`, {dtype}": (draw(name, shape=MANY, dtype=dtype), range_of)
       for name in ("uniform", "normal", "exponential") for dtype in FLOATS if dtype != "float64"},
    "2¹⁶ `uniform` on [100, 101), bfloat16":
       (draw("uniform", shape=MANY, dtype="bfloat16", minval=100.0, maxval=101.0), range_of),
    **{f"5,000 `categorical` of 50 equal logits, {dtype}":
       (draw("categorical", Array([0.0] * CLASSES, dtype), shape=(5_000,)), evenness(CLASSES))
       for dtype in ("float32", "bfloat16", "float16")},
    **{f"2¹⁶ `bernoulli(0.001)`, p in {dtype}":
       (draw("bernoulli", Array(1e-3, dtype), shape=MANY), hits(1e-3))
       for dtype in ("float32", "bfloat16", "float16")},
}  # fmt: skip


def jax_sample(name):
    """What the installed JAX shows in many draws."""
    draw, summary = SAMPLES[name]
    found = jax_array(draw)
    return found if isinstance(found, str) else summary(found)


def everything():
    """What this page asks of one release of JAX, for `measured_by`."""
    import jax

    samples = {name: jax_sample(name) for name in SAMPLES}
    return {"release": jax.__version__, "draws": all_draws(), "samples": samples}
