"""``fdl.random`` against ``jax.random`` itself, where JAX is installed.

``python tests/random/test_jax.py`` writes tests/random/vectors.json anew.
"""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl import random
from fdl.random import _arithmetic
from tests.support.jax import x64

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")

VECTORS = Path(__file__).with_name("vectors.json")
INF = float("inf")

# Draws to record: sampler, seed, keyword arguments, and whether JAX needs x64 for them.
CASES = [
    ("key", 0, {}, False),
    ("key", 2**32 - 1, {}, False),
    *[("key", seed, {}, True) for seed in (2**32 + 5, 2**63 - 1, -1, -(2**31) - 1, -(2**63))],
    *[("split", seed, {"num": n}, True) for seed, n in ((0, 2), (42, 5), (2**40 + 3, 5), (7, 0))],
    *[("fold_in", 42, {"data": data}, False) for data in (0, 1, 2**31, 2**32 - 1)],
    *[("bits", seed, {"shape": shape}, False)
      for seed, shape in ((0, ()), (1, (5,)), (2**40 + 3, (2, 3)), (-3, (3, 1, 7)), (4, (0, 2)))],
    *[("uniform", 11, {"shape": shape}, False) for shape in ((), (5,), (2, 3), (7,))],
    ("uniform", 12, {"shape": (5,), "minval": -2.5, "maxval": 0.75}, False),
    *[("uniform", 13, {"shape": (7,), "dtype": dtype}, dtype == "float64")
      for dtype in ("float16", "bfloat16", "float64")],
    *[("normal", 14, {"shape": shape}, False) for shape in ((), (5,), (2, 3), (31,))],
    ("normal", 15, {"shape": (31,), "dtype": "float64"}, True),
    ("truncated_normal", 16, {"lower": -2.0, "upper": 2.0, "shape": (11,)}, False),
    ("truncated_normal", 16, {"lower": 0.5, "upper": 3.0, "shape": ()}, False),
    ("truncated_normal", 17, {"lower": -1.0, "upper": INF, "shape": (5,), "dtype": "float64"},
     True),
    *[("bernoulli", 18, {"p": p, "shape": shape}, False)
      for p, shape in ((0.5, ()), (0.1, (2, 3)), (0.9, (33,)))],
    *[("randint", 19, {"shape": (2, 3), "minval": low, "maxval": high, "dtype": "int32"}, True)
      for low, high in ((0, 10), (-7, 5), (0, 65_537), (-(2**31), 2**31 - 1), (-(2**31), 2**31))],
    *[("randint", 20, {"shape": (5,), "minval": low, "maxval": high, "dtype": "int64"}, True)
      for low, high in ((0, 10), (-7, 2**33), (-(2**63), 2**63), (-(2**62), 2**62 + 12345))],
    ("randint", 21, {"shape": (), "minval": 0, "maxval": 256, "dtype": "uint8"}, False),
    ("randint", 21, {"shape": (9,), "minval": -128, "maxval": 128, "dtype": "int8"}, False),
    *[("permutation", seed, {"x": n}, False)
      for seed, n in ((22, 10), (23, 1), (24, 0), (25, 100))],
    ("categorical", 26, {"logits": [0.0, 1.0, -1.0, 2.0], "shape": (13,)}, False),
    ("categorical", 27, {"logits": [[0.0, 1.0, -INF], [3.0, 3.0, 3.0]]}, False),
    ("bits", 29, {"shape": (9,), "dtype": "uint8"}, False),
    ("rademacher", 29, {"shape": (9,)}, False),
    ("choice", 30, {"a": 10, "shape": (7,)}, True),
    ("choice", 30, {"a": 10, "shape": (2, 3), "replace": False}, False),
    *[(name, 31, {"shape": (7,)}, False)
      for name in ("exponential", "gumbel", "laplace", "logistic", "cauchy")],
    ("gumbel", 32, {"shape": (7,), "mode": "high"}, False),
    *[("gamma", 33, {"a": a, "shape": (7,)}, False) for a in (0.1, 1.0, 30.0)],
    ("gamma", 34, {"a": 0.5, "shape": (5,), "dtype": "float64"}, True),
    ("beta", 35, {"a": 0.5, "b": 3.0, "shape": (7,)}, False),
    ("dirichlet", 36, {"alpha": [1.0, 2.0, 0.2], "shape": (3,)}, False),
    ("t", 37, {"df": 3.0, "shape": (7,)}, False),
    ("ball", 38, {"d": 3, "shape": (2,)}, False),
    ("orthogonal", 39, {"n": 3}, False),
    ("multivariate_normal", 40, {"mean": [1.0, 2.0], "cov": [[2.0, 1.0], [1.0, 1.0]]}, False),
    *[("poisson", 41, {"lam": lam, "shape": (7,)}, False) for lam in (3.0, 50.0)],
    *[("binomial", 42, {"n": n, "p": 0.3, "shape": (7,)}, False) for n in (10, 100)],
]  # fmt: skip
CHECKSUM = (28, 60_000)  # seed and size of a permutation recorded by its checksum


def jax_key(seed):
    """The key of a 64-bit seed, whatever x64 says."""
    with x64(True):
        return jax.random.PRNGKey(seed)


def call_jax(sampler, seed, kwargs, wide):
    with x64(wide):
        if sampler == "key":
            return np.asarray(jax.random.PRNGKey(seed))
        kwargs = dict(kwargs)
        for name in {"logits", "alpha", "mean", "cov"} & kwargs.keys():
            kwargs[name] = jnp.asarray(kwargs[name], dtype=jnp.float32)
        if kwargs.get("maxval") in (2**31, 2**63):
            kwargs["maxval"] = np.uint64(kwargs["maxval"])
        return np.asarray(getattr(jax.random, sampler)(jax_key(seed), **kwargs))


def checksum(order):
    """A number that tells permutations of one size apart."""
    order = np.asarray(order).astype(np.uint64)
    return int((order * np.arange(1, order.size + 1, dtype=np.uint64)).sum())


def ulps(a, b):
    """Largest distance of two float arrays in units in the last place, across zero too."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = np.dtype(f"int{8 * a.itemsize}")
    a, b = (x.view(bits).astype(np.int64) for x in (a, b))
    a, b = (np.where(i < 0, np.int64(np.iinfo(bits).min) - i, i) for i in (a, b))
    return int(np.abs(a - b).max(initial=0))


def assert_same(ours, theirs):
    ours = ours.to(torch.float32) if ours.dtype is torch.bfloat16 else ours
    theirs = theirs.astype(np.float32) if theirs.dtype.name == "bfloat16" else theirs
    np.testing.assert_array_equal(ours.numpy(), theirs)


# Left out here: JAX's implementations and shardings, the dtype of keys, more random bits per draw
# (but for `gumbel`), shuffles of each row on its own, classes without replacement. `device`, which
# a JAX key gets from a context, is an argument.
ONLY_JAX = {("permutation", "independent"), ("categorical", "replace"), ("key", "dtype")}
ONLY_JAX |= {(name, "mode") for name in ("bernoulli", "categorical", "choice")}
ONLY_JAX |= {(name, p) for name in random.__all__ for p in ("impl", "out_sharding")}
ONLY_OURS = {("key", "device")}
# JAX: None, which is int64 and float64 with x64, int32 and float32 without.
DTYPES = dict.fromkeys(("randint", "poisson", "rademacher"), torch.int64)
DTYPES |= {"bits": None, "multivariate_normal": None}


@pytest.mark.parametrize("name", sorted({*random.__all__} - {"Key", "Shape"}))
def test_signatures_are_those_of_jax(name):
    ours = inspect.signature(getattr(random, name)).parameters
    theirs = inspect.signature(getattr(jax.random, name)).parameters
    expected = [p for p in theirs if (name, p) not in ONLY_JAX]
    assert [p for p in ours if (name, p) not in ONLY_OURS] == expected
    for p in expected:
        default = theirs[p].default
        if p == "dtype":
            assert default is None and ours[p].default is DTYPES.get(name, torch.float32)
        else:
            assert ours[p].default == default
    # By position, what both take is at the same place.
    both = [p for p in theirs if p in ours]
    assert all(list(ours).index(p) == list(theirs).index(p) for p in both)


@pytest.mark.slow
def test_recorded_vectors_are_those_of_this_jax():
    for case in json.loads(VECTORS.read_text())["cases"]:
        drawn = call_jax(case["sampler"], case["seed"], case["kwargs"], case["x64"])
        recorded = np.array(case["values"], drawn.dtype)
        if drawn.dtype.kind == "f":
            np.testing.assert_allclose(drawn, recorded, rtol=1e-6, atol=0)
        else:
            np.testing.assert_array_equal(drawn.reshape(recorded.shape), recorded)


seeds = st.integers(-(2**63), 2**63 - 1)
shapes = st.sampled_from([(), (1,), (5,), (2, 3), (4, 0), (3, 1, 7)])
quick = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.mark.slow
@quick
@given(seeds, shapes, st.integers(0, 2**32 - 1))
def test_keys_and_bits(seed, shape, data):
    key, theirs = random.key(seed), jax_key(seed)
    assert_same(key, theirs)
    assert_same(random.fold_in(key, data), jax.random.fold_in(theirs, data))
    assert_same(random.fold_in(key, torch.tensor(data)), jax.random.fold_in(theirs, data))
    assert_same(random.split(key, 5), jax.random.split(theirs, 5))
    assert_same(random.bits(key, shape), jax.random.bits(theirs, shape))


@pytest.mark.slow
@quick
@given(seeds, shapes, st.sampled_from(["bfloat16", "float16", "float32", "float64"]))
def test_unit_uniform_and_bernoulli_are_the_same_bits(seed, shape, name):
    key, theirs, dtype = random.key(seed), jax_key(seed), getattr(torch, name)
    with x64(name == "float64"):
        assert_same(
            random.uniform(key, shape, dtype=dtype), jax.random.uniform(theirs, shape, name)
        )
        flips = jax.random.bernoulli(theirs, jnp.asarray(0.3, name), shape)
    p = torch.tensor(0.3, dtype=dtype)
    assert_same(random.bernoulli(key, p, shape), np.asarray(flips))


def test_bernoulli_of_numbers_and_arrays():
    p = np.linspace(0, 1, 7, dtype=np.float32)
    key, theirs = random.key(5), jax_key(5)
    assert_same(random.bernoulli(key, torch.from_numpy(p)), jax.random.bernoulli(theirs, p))
    for number in (0.0, 0.1, 0.5, 1.0):
        ours = random.bernoulli(key, number, (1000,))
        assert_same(ours, jax.random.bernoulli(theirs, number, (1000,)))


@quick
@given(seeds, st.floats(-100, 100, width=32), st.floats(-100, 100, width=32))
def test_uniform_between_bounds(seed, low, high):
    if low > high:
        low, high = high, low
    low, high = torch.tensor(low), torch.tensor(high)
    ours = random.uniform(random.key(seed), (50,), minval=low, maxval=high)
    theirs = jax.random.uniform(jax_key(seed), (50,), jnp.float32, low.numpy(), high.numpy())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)  # 2 ulp of the largest bound


INT_TYPES = ("int64", "int32", "int16", "int8", "uint8")
corners = st.sampled_from([0, 1, -1, 2**16, 2**31 - 1, 2**32, 2**62, -(2**62)])


@pytest.mark.slow
@quick
@given(seeds, shapes, st.sampled_from(INT_TYPES), st.data())
def test_randint_of_any_span(seed, shape, name, data):
    info = torch.iinfo(getattr(torch, name))
    bounds = (corners | st.integers(info.min, info.max)).map(lambda n: max(info.min, n))
    low, high = (min(data.draw(bounds), info.max) for _ in range(2))
    # Bounds as tensors: out of order is a case like any other.
    ours = random.randint(
        random.key(seed), shape, torch.tensor(low), torch.tensor(high), getattr(torch, name)
    )
    with x64(True):
        theirs = jax.random.randint(jax_key(seed), shape, np.int64(low), np.int64(high), name)
    assert_same(ours, np.asarray(theirs))
    if low < high:
        numbers = random.randint(random.key(seed), shape, low, high, getattr(torch, name))
        assert torch.equal(ours, numbers)


@pytest.mark.slow
def test_randint_over_whole_types_and_arrays_of_bounds():
    key, theirs = random.key(6), jax_key(6)
    with x64(True):
        for name in INT_TYPES:
            info = torch.iinfo(getattr(torch, name))
            ours = random.randint(key, (99,), info.min, info.max + 1, getattr(torch, name))
            top = np.uint64(info.max + 1)
            assert_same(ours, np.asarray(jax.random.randint(theirs, (99,), info.min, top, name)))
        low = np.array([-(2**62), -5, 0, 7, 0, -(2**63)])
        high = np.array([[2**62 + 1, 2**40, 3, 7, 300, 2**63 - 1]] * 2)
        for name in INT_TYPES:
            ours = random.randint(
                key, (2, 6), torch.from_numpy(low), torch.from_numpy(high), getattr(torch, name)
            )
            if name in ("int32", "int64"):  # for the others JAX wraps wide bounds before clipping
                assert_same(ours, np.asarray(jax.random.randint(theirs, (2, 6), low, high, name)))
            else:
                assert ours.min() >= torch.iinfo(ours.dtype).min


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 2, 10, 1_625, 1_626, 60_000, 1_000_003])
def test_permutation_of_any_size(n):
    assert_same(random.permutation(random.key(n + 1), n), jax.random.permutation(jax_key(n + 1), n))


@pytest.mark.slow
def test_permutations_do_not_depend_on_x64():
    for on in (False, True):
        with x64(on):
            order = jax.random.permutation(jax_key(6), 20)
        assert_same(random.permutation(random.key(6), 20), np.asarray(order).astype(np.int64))


def test_permutation_of_rows():
    rows = np.arange(60, dtype=np.float32).reshape(20, 3)
    for x in (rows, rows[:, 0]):
        ours = random.permutation(random.key(8), torch.from_numpy(x))
        assert_same(ours, jax.random.permutation(jax_key(8), x))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_axes_of_permutation_and_categorical(axis):
    x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype(np.float32)
    ours = random.permutation(random.key(11), torch.from_numpy(x), axis)
    assert_same(ours, jax.random.permutation(jax_key(11), x, axis))
    batch = tuple(np.delete(x.shape, axis))
    for shape in (None, (7, *batch)):
        ours = random.categorical(random.key(12), torch.from_numpy(x), axis, shape)
        assert_same(ours, jax.random.categorical(jax_key(12), x, axis, shape))


# XLA's log1p is off by up to 128 units of float64 near -0.41; torch's is right.
@pytest.mark.parametrize(
    ("name", "limit"), [("float32", 4), ("float64", 32), ("float16", 2), ("bfloat16", 2)]
)
def test_normal_within_units_in_the_last_place(name, limit):
    for seed in range(3):
        ours = random.normal(random.key(seed), (100_000,), getattr(torch, name))
        with x64(name == "float64"):
            theirs = np.asarray(jax.random.normal(jax_key(seed), (100_000,), name))
        if name == "bfloat16":  # NumPy's bits of a bfloat16: the upper half of its float32
            ours, theirs = (
                (x.view(np.int32) >> 16).astype(np.int16).view(np.float16)
                for x in (ours.float().numpy(), theirs.astype(np.float32))
            )
        assert ulps(ours, theirs) <= limit


def test_inverse_of_erf_on_every_float32_that_normal_can_give():
    # All 2**23 of them, tails and neighbours of zero included.
    x = (4 * torch.arange(2**23) + 1 - 2**24).to(torch.float32) * 2.0**-24
    assert ulps(_arithmetic.erfinv(x), jax.lax.erf_inv(x.numpy())) <= 4


def test_inverse_of_erf_in_the_tails_of_float64():
    far = 4 * torch.arange(1000, dtype=torch.int64) + 1
    numerators = [(far << shift) - 2**53 for shift in range(0, 42, 3)]
    numerators += [(far << shift) - 2**20 for shift in range(0, 42, 3)]
    x = torch.cat(numerators).to(torch.float64) * 2.0**-53
    x = torch.cat([x, -x])
    with x64(True):
        assert ulps(_arithmetic.erfinv(x), jax.lax.erf_inv(x.numpy())) <= 4


@pytest.mark.parametrize(("lower", "upper"), [(-2, 2), (-1, INF), (0.5, 0.75), (-INF, 0), (-6, 6)])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_truncated_normal(name, lower, upper):
    ours = random.truncated_normal(
        random.key(9), lower, upper, (20_000,), dtype=getattr(torch, name)
    )
    with x64(name == "float64"):
        theirs = jax.random.truncated_normal(
            jax_key(9), float(lower), float(upper), (20_000,), name
        )
    # One unit in the last place of the distribution function is many of the draw, in the tails.
    unit = 2.0**-23 if name == "float32" else 2.0**-49  # XLA's log1p, as above
    ours, theirs = ours.double(), torch.from_numpy(np.asarray(theirs).astype(np.float64))
    torch.testing.assert_close(
        torch.erf(ours / 2**0.5), torch.erf(theirs / 2**0.5), rtol=0, atol=2 * unit
    )
    middle = theirs.abs() < 2
    torch.testing.assert_close(ours[middle], theirs[middle], rtol=0, atol=16 * unit)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("shape", [None, (50, 4), (1000, 50, 4)])
def test_categorical(name, shape):
    logits = np.random.default_rng(0).normal(size=(50, 4, 10)).astype(name)
    ours = random.categorical(random.key(10), torch.from_numpy(logits), shape=shape)
    with x64(name == "float64"):
        theirs = np.asarray(jax.random.categorical(jax_key(10), logits, shape=shape))
    assert ours.shape == theirs.shape
    # log differs in its last digit, which decides a draw where two classes all but tie.
    assert (ours.numpy() != theirs).mean() < 1e-4


def record():
    cases = [
        {"sampler": s, "seed": seed, "kwargs": kwargs, "x64": wide,
         "values": call_jax(s, seed, kwargs, wide).astype(object).tolist()}
        for s, seed, kwargs, wide in CASES
    ]  # fmt: skip
    seed, n = CHECKSUM
    order = jax.random.permutation(jax_key(seed), n)
    lines = ",\n  ".join(json.dumps(case, default=float) for case in cases)
    VECTORS.write_text(
        f'{{"jax": "{jax.__version__}",\n"checksum": {{"seed": {seed}, "n": {n}, '
        f'"value": {checksum(order)}}},\n"cases": [\n  {lines}\n]}}\n'
    )


if __name__ == "__main__":
    record()
