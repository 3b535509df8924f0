"""Initializers: the distributions of `torch.nn.init`, and the default ones of torch's modules."""

import math

import pytest
import torch
from torch import nn as oo

from fdl import nn, random, tree
from fdl.nn import init

SHAPE = (100, 50, 5, 5)  # 125,000 draws; fan-in 1250, fan-out 2500
KEY = random.key(11)


def kolmogorov(sample, cdf):
    """The largest distance between the sample's distribution function and `cdf`."""
    x = sample.double().flatten().sort().values
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return torch.maximum((steps[1:] - cdf(x)).abs(), (steps[:-1] - cdf(x)).abs()).max()


def empirical(sample):
    x = sample.double().flatten().sort().values
    return lambda at: torch.searchsorted(x, at, right=True) / len(x)


def is_uniform(low, high):
    return lambda x: ((x - low) / (high - low)).clamp(0, 1)


def is_normal(std, mean=0.0):
    return torch.distributions.Normal(torch.tensor(mean).double(), std).cdf


def is_truncated(std, mean, low, high):
    cdf = is_normal(std, mean)
    below, above = cdf(torch.tensor([low, high], dtype=torch.float64))
    return lambda x: (cdf(x) - below) / (above - below)


FAN_IN, FAN_OUT = 1250, 2500
RELU = math.sqrt(2)
CASES = {  # ours, torch's, its distribution function, bound
    "uniform": (init.uniform(-0.3, 2), (oo.init.uniform_, -0.3, 2), is_uniform(-0.3, 2), 2),
    "normal": (init.normal(0.2, 3), (oo.init.normal_, 3, 0.2), is_normal(0.2, 3), math.inf),
    "truncated_normal": (
        init.truncated_normal(0.7, 0.5, -1, 2),
        (oo.init.trunc_normal_, 0.5, 0.7, -1, 2),
        is_truncated(0.7, 0.5, -1, 2),
        2,
    ),
    "xavier_uniform": (
        init.xavier_uniform(2),
        (oo.init.xavier_uniform_, 2),
        is_uniform(-2 * math.sqrt(6 / (FAN_IN + FAN_OUT)), 2 * math.sqrt(6 / (FAN_IN + FAN_OUT))),
        2 * math.sqrt(6 / (FAN_IN + FAN_OUT)),
    ),
    "xavier_normal": (
        init.xavier_normal(0.5),
        (oo.init.xavier_normal_, 0.5),
        is_normal(0.5 * math.sqrt(2 / (FAN_IN + FAN_OUT))),
        math.inf,
    ),
    "kaiming_uniform": (
        init.kaiming_uniform(nonlinearity="relu"),
        (oo.init.kaiming_uniform_, 0, "fan_in", "relu"),
        is_uniform(-RELU * math.sqrt(3 / FAN_IN), RELU * math.sqrt(3 / FAN_IN)),
        RELU * math.sqrt(3 / FAN_IN),
    ),
    "kaiming_uniform-leaky-fan_out": (
        init.kaiming_uniform(1.0, "fan_out"),
        (oo.init.kaiming_uniform_, 1.0, "fan_out"),
        is_uniform(-math.sqrt(3 / FAN_OUT), math.sqrt(3 / FAN_OUT)),
        math.sqrt(3 / FAN_OUT),
    ),
    "kaiming_normal": (
        init.kaiming_normal(),
        (oo.init.kaiming_normal_,),
        is_normal(RELU / math.sqrt(FAN_IN)),
        math.inf,
    ),
    "kaiming_normal-tanh-fan_out": (
        init.kaiming_normal(mode="fan_out", nonlinearity="tanh"),
        (oo.init.kaiming_normal_, 0, "fan_out", "tanh"),
        is_normal(5 / 3 / math.sqrt(FAN_OUT)),
        math.inf,
    ),
}


@pytest.mark.parametrize(("ours", "theirs", "cdf", "bound"), CASES.values(), ids=CASES)
def test_initializer_has_the_distribution_of_torch(ours, theirs, cdf, bound):
    w = ours(KEY, SHAPE, torch.float32)
    f, *args = theirs
    generator = torch.Generator().manual_seed(5)
    reference = f(torch.empty(SHAPE), *args, generator=generator)
    n = w.numel()
    assert w.shape == SHAPE and w.dtype == torch.float32
    # 1.95 / √n: one sample in a thousand is further away; the key is fixed.
    assert kolmogorov(w, cdf) < 1.95 / math.sqrt(n)
    assert kolmogorov(w, empirical(reference)) < 1.95 * math.sqrt(2 / n)
    assert (w.mean() - reference.mean()).abs() < 5 * reference.std() * math.sqrt(2 / n)
    assert (w.std() / reference.std() - 1).abs() < 5 / math.sqrt(n)
    # float32 rounds the bound itself.
    assert max(w.abs().max(), reference.abs().max()) <= bound * (1 + 1e-6)
    if bound < math.inf:
        assert w.abs().max() > 0.999 * bound


@pytest.mark.parametrize("name", [*CASES, "zeros", "ones", "constant"])
def test_initializer_takes_key_shape_and_dtype(name):
    fill = {"zeros": init.zeros, "ones": init.ones, "constant": init.constant(0.5)}
    f = fill[name] if name in fill else CASES[name][0]
    w = f(KEY, (3, 2), torch.float64)
    assert w.dtype == torch.float64 and w.shape == (3, 2)
    assert torch.equal(w, f(KEY, [3, 2], torch.float64))
    if name in fill:
        assert w.unique().tolist() == [{"zeros": 0.0, "ones": 1.0, "constant": 0.5}[name]]
    else:
        assert not torch.equal(w, f(random.key(12), (3, 2), torch.float64))


@pytest.mark.parametrize(
    ("layer", "module", "fan_in"),
    [
        (nn.linear(25, 40), lambda: oo.Linear(25, 40), 25),
        (
            nn.conv2d(4, 16, (2, 3), groups=2),
            lambda: oo.Conv2d(4, 16, (2, 3), groups=2),
            2 * 2 * 3,
        ),
    ],
    ids=["linear", "conv2d"],
)
def test_default_initialisation_is_that_of_the_module(layer, module, fan_in):
    members = 500
    drawn = torch.vmap(layer.init)(random.split(KEY, members))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        reference = tree.stack([dict(module().named_parameters()) for _ in range(members)])
    bound = 1 / math.sqrt(fan_in)
    assert drawn.keys() == reference.keys() == {"weight", "bias"}
    for name, sample in drawn.items():
        n = sample.numel()
        assert kolmogorov(sample, is_uniform(-bound, bound)) < 1.95 / math.sqrt(n)
        assert kolmogorov(sample, empirical(reference[name].detach())) < 1.95 * math.sqrt(2 / n)
    # Weight and bias are drawn from keys of their own.
    first = drawn["weight"].flatten(1)[:, 0] - drawn["bias"][:, 0]
    assert first.abs().min() > 0


@pytest.mark.curriculum("B3")
def test_initializer_of_your_own():
    def sparse(key, shape, dtype=torch.float32):
        w = random.uniform(key, shape, dtype, minval=-10, maxval=10)
        return torch.where(w.abs() < 5, 0.0, w)

    net = nn.sequential(nn.linear(8, 100, weight_init=sparse), nn.relu, nn.linear(100, 2))
    params = net.init(KEY)
    w = params["0"]["weight"]
    assert ((w == 0) | ((w.abs() >= 5) & (w.abs() < 10))).all()
    assert 0.4 < (w == 0).double().mean() < 0.6
    assert params["2"]["weight"].abs().max() <= 0.1

    # Initialise some parameters again, by path; the others stay the same tensors.
    old, rest = tree.partition(params, "*.weight")
    merged = tree.merge(tree.map(lambda leaf: sparse(KEY, leaf.shape), old), rest)
    assert (merged["2"]["weight"] == 0).any() and merged["2"]["bias"] is params["2"]["bias"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: init.uniform(1, 1), "low must be below high, got low=1, high=1"),
        (lambda: init.normal(-1), "std must be at least 0, got -1"),
        (lambda: init.normal(math.nan), "std must be at least 0, got nan"),
        (lambda: init.truncated_normal(0), "needs std > 0 and low < high, got std=0"),
        (lambda: init.truncated_normal(1, low=2, high=1), "low=2, high=1"),
        (lambda: init.kaiming_uniform(mode="in"), "mode must be 'fan_in' or 'fan_out', got 'in'"),
        (lambda: init.kaiming_normal(mode="in"), "mode must be 'fan_in' or 'fan_out', got 'in'"),
        (lambda: init.xavier_normal()(KEY, (3,), torch.float32), r"fans need a shape .* got \[3\]"),
        (lambda: init.kaiming_normal()(KEY, (), torch.float32), r"fans need a shape .* got \[\]"),
        (lambda: init.kaiming_uniform(nonlinearity="rleu"), "rleu"),
    ],
    ids=[
        *("uniform", "normal", "normal-nan", "truncated-std", "truncated-bounds", "uniform-mode"),
        *("normal-mode", "vector", "scalar", "nonlinearity"),
    ],
)
def test_bad_arguments_raise_when_the_initializer_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()
