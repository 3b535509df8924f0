"""Measures docs/differences/draws.md: fdl.random, releases of JAX, and torch's keys and seeds.

`JAX_PYTHONS` names interpreters with other releases of JAX, with spaces between them.
"""

import math
import os
import random as standard
import warnings
from functools import cache, partial

import numpy as np
import torch

from fdl import random
from tests.differences import draws_of_jax as theirs
from tests.differences.draws_of_jax import DRAWS, SAMPLES, SEED, draw
from tests.differences.elsewhere import measured_by
from tests.differences.tables import Table
from tests.differences.walks import library

RELEASES = ("0.4.30", "0.5.3", "0.6.2", "0.7.2", "0.8.3")
NEWEST = "newest"


@cache
def others():
    """What other releases of JAX measured, by release."""
    pythons = os.environ.get("JAX_PYTHONS", "").split()
    found = [measured_by(p, "tests.differences.draws_of_jax", "everything") for p in pythons]
    return {one["release"]: one for one in found if one["release"] in RELEASES}


def ours(draw):
    """What fdl draws, or the name of the error it raises."""
    try:
        found = theirs.called(draw, random, torch, random.key(SEED))
    except (TypeError, ValueError) as error:
        return type(error).__name__
    return found


def numbers(x):
    """A tensor of fdl as NumPy's numbers, narrow floats widened."""
    return (x.double() if x.is_floating_point() else x).flatten().numpy()


def compared(mine, found):
    """How close the numbers of a release are to those of fdl."""
    if isinstance(found, str):
        return found
    if isinstance(mine, str):
        return "–"
    old, new = numbers(mine), np.array(found["values"])
    if old.shape != new.shape:
        return "another shape"
    if np.array_equal(old.astype(new.dtype), new):
        return "same"
    if mine.is_floating_point():
        info = torch.finfo(mine.dtype)
        ulp = info.eps * 2.0 ** np.floor(np.log2(np.maximum(abs(old), info.tiny)))
        worst = np.max(abs(old - new) / ulp)
        if worst <= 1000:
            return f"{math.ceil(worst)} ulp"
        apart = np.count_nonzero(abs(old - new) > 1000 * ulp)
    else:
        apart = np.count_nonzero(old != new)
    return f"{apart} of {old.size}" if apart < old.size / 4 else "other"


def beginning(x):
    """The first three numbers."""
    if isinstance(x, str):
        return x
    first = numbers(x)[:3]
    return ", ".join(f"{v:.5g}" if x.is_floating_point() else str(v) for v in first.tolist())


def release_row(name):
    """A row of the first table."""
    mine = ours(DRAWS[name])
    cells = {release: compared(mine, one["draws"][name]) for release, one in others().items()}
    if library("jax") is not None:
        cells[NEWEST] = compared(mine, theirs.jax_draw(DRAWS[name]))
    return cells | {"fdl begins": beginning(mine)}


DEFAULTS = {
    "`uniform()`": draw("uniform"),
    "`normal()`": draw("normal"),
    "`bits()`": draw("bits"),
    "`bernoulli(0.3)`": draw("bernoulli", 0.3),
    "`randint(0, 10)`": draw("randint", theirs.SHAPE, 0, 10, shape=None),
    "`rademacher()`": draw("rademacher"),
    "`permutation(100)`": draw("permutation", 100, shape=None),
    "`choice(100)`": draw("choice", 100),
    "`categorical`, float32 logits": draw("categorical", theirs.Array(theirs.LOGITS)),
    "`poisson(2.0)`": draw("poisson", 2.0),
    "`truncated_normal(-2.0, 2.0)`": draw("truncated_normal", -2.0, 2.0),
    "`exponential()`": draw("exponential"),
}


def default_row(name):
    """A row of the second table: no dtype is named."""
    mine = ours(DEFAULTS[name])
    cells = {"fdl": str(mine.dtype).removeprefix("torch.")}
    if library("jax") is not None:
        for column, wide in (("JAX", False), ("JAX with x64", True)):
            found = theirs.jax_draw(DEFAULTS[name], wide)
            close = compared(mine, found)
            cells[column] = close if isinstance(found, str) else f"{found['dtype']}, {close}"
    return cells


def of_torch(make):
    """Draw with torch's global generator from the seed of this page, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make()


def torch_sample(name):
    """Make the same sample with torch's own functions; None where it has none."""
    asked, summary = SAMPLES[name]
    options, size = asked.options, asked.options.get("shape")
    dtype = getattr(torch, options.get("dtype", "float32"))
    if asked.function == "randint":
        found = of_torch(lambda: torch.randint(*asked.args[1:], asked.args[0], dtype=dtype))
    elif asked.function == "truncated_normal":
        x = torch.empty(size, dtype=dtype)
        with warnings.catch_warnings():  # of bounds that are far from the mean
            warnings.simplefilter("ignore")
            found = of_torch(lambda: torch.nn.init.trunc_normal_(x, 0, 1, *asked.args))
    elif asked.function == "uniform":
        low, high = options.get("minval", 0.0), options.get("maxval", 1.0)
        found = of_torch(lambda: torch.empty(size, dtype=dtype).uniform_(low, high))
    elif asked.function == "normal":
        found = of_torch(lambda: torch.randn(size, dtype=dtype))
    elif asked.function == "exponential":
        found = of_torch(lambda: torch.empty(size, dtype=dtype).exponential_())
    elif asked.function == "categorical":
        probs = torch.tensor(*asked.args[0][:1], dtype=getattr(torch, asked.args[0].dtype)).softmax(
            0
        )
        found = of_torch(lambda: torch.multinomial(probs, size[0], replacement=True))
    else:
        p = torch.tensor(asked.args[0].values, dtype=getattr(torch, asked.args[0].dtype))
        found = of_torch(lambda: torch.bernoulli(p.expand(size)))
    return summary(numbers(found))


def sample_row(name):
    """A row of the third table."""
    asked, summary = SAMPLES[name]
    mine = ours(asked)
    cells = {release: one["samples"][name] for release, one in others().items()}
    if library("jax") is not None:
        cells[NEWEST] = theirs.jax_sample(name)
    cells["fdl"] = mine if isinstance(mine, str) else summary(numbers(mine))
    try:
        cells["torch"] = torch_sample(name)
    except (RuntimeError, ValueError) as error:
        cells["torch"] = type(error).__name__
    return cells


@cache
def torchs():
    """`torch.func._random`, which releases before 2.12 lack; it is no attribute until imported."""
    try:
        from torch.func import _random
    except ImportError:
        return None
    return _random


def equal(a, b):
    """Whether two draws are the same, in words."""
    return "the same" if torch.equal(a, b) else "others"


def batch(draws):
    """Draw four numbers for each of three keys with `torch.vmap`, and one by one."""
    keys = draws.split(draws.key(SEED), 3)
    each = torch.stack([draws.normal(key, (4,)) for key in keys])
    return equal(torch.vmap(lambda key: draws.normal(key, (4,)))(keys), each)


def shifted(draws):
    """Where the numbers of a key are whose second word is greater by 1, among those of the key."""
    key = draws.key(SEED)
    other = torch.stack([key[0], draws.key(SEED + 1)[1] if key[1] else torch.tensor(1).to(key)])
    same = (draws.bits(key, (64,)) == draws.bits(other, (1,))).nonzero()
    return (
        f"from the {int(same[0]) + 1}th of its numbers on"
        if len(same)
        else "not among its first 64"
    )


KEYS = {
    "a key": lambda r: f"{str(r.key(SEED).dtype).removeprefix('torch.')} {r.key(SEED).tolist()}",
    "`key(-1)`": lambda r: str(r.key(-1).tolist()),
    "`key(2**64)`": lambda r: str(r.key(2**64).tolist()),
    "`fold_in(key, 1)` and `split(key)[1]`":
        lambda r: equal(r.fold_in(r.key(SEED), 1), r.split(r.key(SEED))[1]),
    "`split(key, 2)` and the first two of `split(key, 8)`":
        lambda r: equal(r.split(r.key(SEED), 2), r.split(r.key(SEED), 8)[:2]),
    "bits of the key whose second word is greater by 1": shifted,
    "4 normals and the first 4 of 8":
        lambda r: equal(r.normal(r.key(SEED), (4,)), r.normal(r.key(SEED), (8,))[:4]),
    "normals of bfloat16 and float32, rounded":
        lambda r: equal(r.normal(r.key(SEED), (8,), dtype=torch.bfloat16),
                        r.normal(r.key(SEED), (8,)).bfloat16()),
    "uniforms of bfloat16 and float32, rounded":
        lambda r: equal(r.uniform(r.key(SEED), (8,), dtype=torch.bfloat16),
                        r.uniform(r.key(SEED), (8,)).bfloat16()),
    "`vmap` of `normal` over keys, and one by one": batch,
    "`vmap` of `split` over keys, and one by one": lambda r: equal(
        torch.vmap(r.split)(r.split(r.key(SEED), 3)),
        torch.stack([r.split(key) for key in r.split(r.key(SEED), 3)])),
    "`fold_in(key, torch.tensor(1))` and `fold_in(key, 1)`":
        lambda r: equal(r.fold_in(r.key(SEED), torch.tensor(1)), r.fold_in(r.key(SEED), 1)),
}  # fmt: skip


def key_row(name):
    """A row of the fourth table."""
    cells = {}
    for column, draws in (("`torch.func._random`", torchs()), ("`fdl.random`", random)):
        if draws is not None:
            try:
                with warnings.catch_warnings():  # of slow rules of vmap
                    warnings.simplefilter("ignore")
                    cells[column] = KEYS[name](draws)
            except (RuntimeError, OverflowError, ValueError, TypeError) as error:
                cells[column] = type(error).__name__
    return cells


def of_jax(seed):
    import jax

    return np.asarray(jax.random.key_data(jax.random.key(seed))).tolist()


def of_jax_x64(seed):
    with theirs.x64(True):
        return of_jax(seed)


def of_manual_seed(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.rand(4).tolist()


def of_torch_key(seed):
    return torchs().uniform(torchs().key(seed), 4).tolist()


def of_numpy(seed):
    return np.random.default_rng(seed).random(4).tolist()


SEEDERS = {
    "`torch.manual_seed`": (of_manual_seed, lambda: True),
    "`torch.func._random.key`": (of_torch_key, torchs),
    "`fdl.random.key`": (lambda seed: random.key(seed).tolist(), lambda: True),
    "`jax.random.key`": (of_jax, lambda: library("jax")),
    "… with x64": (of_jax_x64, lambda: library("jax")),
    "NumPy `default_rng`": (of_numpy, lambda: True),
    "Python `Random`": (lambda seed: standard.Random(seed).random(), lambda: True),
}  # fmt: skip
PAIRS = {
    "0 and 2³²": (0, 2**32),
    "1 and 2³² + 1": (1, 2**32 + 1),
    "0 and 2⁶³": (0, 2**63),
    "0 and 2⁶⁴": (0, 2**64),
    "−1 and 1": (-1, 1),
    "−1 and 2³² − 1": (-1, 2**32 - 1),
    "−1 and 2⁶⁴ − 1": (-1, 2**64 - 1),
    "0 and −2⁶³": (0, -(2**63)),
    "1 and 1.7": (1, 1.7),
}


def seed_row(a, b):
    """A row of the last table: do two seeds make the same numbers?"""
    cells = {}
    for name, (draws, there) in SEEDERS.items():
        if there() is not None:
            try:
                cells[name] = "same" if draws(a) == draws(b) else "others"
            except (RuntimeError, OverflowError, ValueError, TypeError) as error:
                cells[name] = type(error).__name__
    return cells


MADE_WITH = ("torch", "jax", "numpy")
TABLES = (
    Table(
        "releases",
        ("draw", *RELEASES, NEWEST, "fdl begins"),
        {name: partial(release_row, name) for name in DRAWS},
        MADE_WITH,
    ),
    Table(
        "defaults",
        ("draw", "fdl", "JAX", "JAX with x64"),
        {name: partial(default_row, name) for name in DEFAULTS},
        MADE_WITH,
    ),
    Table(
        "samples",
        ("sample", "fdl", *RELEASES, NEWEST, "torch"),
        {name: partial(sample_row, name) for name in SAMPLES},
        MADE_WITH,
    ),
    Table(
        "keys",
        ("what", "`torch.func._random`", "`fdl.random`"),
        {name: partial(key_row, name) for name in KEYS},
        MADE_WITH,
    ),
    Table(
        "seeds",
        ("seeds", *SEEDERS),
        {name: partial(seed_row, *pair) for name, pair in PAIRS.items()},
        MADE_WITH,
    ),
)
