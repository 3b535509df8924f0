"""Keys and samplers: known answers, recorded draws, transformations, statistics, errors."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fdl import jit, random
from fdl._threefry import threefry2x32
from fdl.random import _arithmetic

CLOSE = {"exponential", "gumbel", "laplace", "logistic", "cauchy", "gamma", "beta", "dirichlet"}
CLOSE |= {"t", "ball", "orthogonal", "multivariate_normal"}
RECORDED = json.loads(Path(__file__).with_name("vectors.json").read_text())
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


# Known answers and recorded draws


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors for threefry2x32 with 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers(counter, key, answer):
    k0, k1 = torch.tensor(key)
    for x0, x1 in (counter, torch.tensor(counter)):
        assert tuple(w.item() for w in threefry2x32(k0, k1, x0, x1)) == answer


def units_apart(a, b):
    """Largest distance in units in the last place, across zero too."""
    assert a.dtype == b.dtype and a.shape == b.shape
    bits, least = {
        torch.float32: (torch.int32, -(2**31)),
        torch.float64: (torch.int64, -(2**63)),
    }.get(a.dtype, (torch.int16, -(2**15)))
    a, b = (x.contiguous().view(bits).to(torch.int64) for x in (a, b))
    a, b = (torch.where(i < 0, least - i, i) for i in (a, b))
    return int((a - b).abs().max()) if a.numel() else 0


def draw(sampler, seed, kwargs):
    kwargs = dict(kwargs)
    if sampler == "key":
        return random.key(seed)
    if "dtype" in kwargs:
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    for name in {"logits", "alpha", "mean", "cov"} & kwargs.keys():
        kwargs[name] = torch.tensor(kwargs[name])
    return getattr(random, sampler)(random.key(seed), **kwargs)


@pytest.mark.curriculum("T1")
@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda c: f"{c['sampler']}-{c['seed']}-{c['kwargs']}"
)
def test_draws_are_those_recorded_from_jax(case):
    drawn = draw(case["sampler"], case["seed"], case["kwargs"])
    recorded = torch.tensor(case["values"], dtype=drawn.dtype)
    if recorded.numel():
        assert recorded.shape == drawn.shape
    else:  # a list cannot say the sizes beyond an axis of none
        assert drawn.numel() == 0
        return
    if case["sampler"] in CLOSE:
        torch.testing.assert_close(drawn, recorded, rtol=2e-5, atol=1e-6)
    elif case["sampler"] == "truncated_normal":
        torch.testing.assert_close(drawn, recorded, rtol=1e-5, atol=0)
    elif case["sampler"] == "normal":
        assert units_apart(drawn, recorded) <= (4 if drawn.dtype is torch.float32 else 32)
    elif case["kwargs"].get("minval") == -2.5:  # bounds other than [0, 1): a rounding more
        assert units_apart(drawn, recorded) <= 1
    else:
        assert torch.equal(drawn, recorded)


def test_permutation_of_60000_is_the_recorded_one():
    recorded = RECORDED["checksum"]
    order = random.permutation(random.key(recorded["seed"]), recorded["n"])
    assert (order * torch.arange(1, recorded["n"] + 1)).sum().item() == recorded["value"]
    assert torch.equal(order.sort().values, torch.arange(recorded["n"]))


def test_fold_in_takes_the_low_word_of_any_integer_tensor():
    key = random.key(42)
    for data in (0, 1, 2**31, 2**32 - 1):
        expected = random.fold_in(key, data)
        assert torch.equal(random.fold_in(key, torch.tensor(data)), expected)
        assert torch.equal(random.fold_in(key, torch.tensor(data + 2**32)), expected)
    minus_one = torch.tensor(-1, dtype=torch.int32)
    assert torch.equal(random.fold_in(key, minus_one), random.fold_in(key, 2**32 - 1))


def test_counters_beyond_32_bits_use_the_high_word(monkeypatch):
    key = random.key(3)
    expected = torch.stack([random.split(key, 6)[5], torch.stack(threefry2x32(*key, 1, 5))])
    # As if these were two positions in a draw too large to make.
    monkeypatch.setattr(torch, "arange", lambda *_, **__: torch.tensor([5, 2**32 + 5]))
    assert torch.equal(random.split(key, 2), expected)


# The same draws under every transformation


def everything(key, data, p, logits, low, high):
    """Call every sampler; results that must be the same bits, and results close to it.

    Few calls with much in each: compiling takes a second or two for every draw.
    """
    keys = iter(random.split(key, 16).unbind())
    exact = {
        "fold_in": random.fold_in(next(keys), data),
        "bits": random.bits(next(keys), (3, 67)),
        "uniform": random.uniform(next(keys), (77,), dtype=torch.float16),
        "bernoulli": random.bernoulli(next(keys), p, (10, 4)),
        "randint 64": random.randint(next(keys), (10, 5), low, high),
        "randint 32": random.randint(next(keys), (10, 5), low, high, torch.int32),
        "permutation": random.permutation(next(keys), logits),
        "categorical": random.categorical(next(keys), logits, shape=(9, 60)),
    }
    close = {
        "uniform": random.uniform(next(keys), (10, 4), minval=-p, maxval=p),
        "normal 32": random.normal(next(keys), (500,)),
        "normal 64": random.normal(next(keys), (500,), torch.float64),
        "normal 16": random.normal(next(keys), (500,), torch.bfloat16),
        "truncated_normal": random.truncated_normal(next(keys), -2, 2, (500,)),
    }
    return exact, close


def inputs(device="cpu"):
    return (
        torch.tensor(2**33 + 11, device=device),
        torch.tensor([0.1, 0.5, 0.9, 1.0], device=device),
        torch.arange(180.0).reshape(60, 3).sin().to(device),  # a GPU has sines of its own
        torch.tensor([-3, 0, -(2**62), -(2**63), 5], device=device),
        torch.tensor([10, 2**20, 2**62 + 12345, 2**63 - 1, 5], device=device),
    )


def assert_same_draws(ours, reference):
    for name, value in reference[0].items():
        assert torch.equal(ours[0][name], value), name
    for name, value in reference[1].items():
        if name == "uniform":  # a GPU multiplies and adds with one rounding, of the bounds' size
            eps = torch.finfo(value.dtype).eps
            assert (ours[1][name] - value).abs().max() <= eps * value.abs().max()
            continue
        # The distribution function is flat where |x| is large: bounds cost a few digits there.
        limit = 64 if name == "truncated_normal" else 4
        assert units_apart(ours[1][name], value) <= limit, name


def row(results, i):
    return tuple({name: value[i] for name, value in group.items()} for group in results)


@pytest.mark.slow
def test_compiled_is_eager_and_batched_is_one_by_one():
    keys = random.split(random.key(5), 3)
    one_by_one = [everything(key, *inputs()) for key in keys]
    batched = torch.vmap(everything, in_dims=(0, *[None] * 5), randomness="error")

    in_a_batch = batched(keys, *inputs())
    compiled_batch = jit(batched)(keys, *inputs())
    for i, reference in enumerate(one_by_one):
        assert_same_draws(row(in_a_batch, i), reference)
        assert_same_draws(row(compiled_batch, i), reference)


@pytest.mark.slow
def test_traced_is_eager(plain_backend):
    key = random.key(5)
    assert_same_draws(jit(everything)(key, *inputs()), everything(key, *inputs()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_cpu():
    reference = everything(random.key(5), *inputs())
    key = random.key(5, device="cuda")
    for f in (everything, jit(everything)):
        results = f(key, *inputs("cuda"))
        assert all(v.is_cuda for group in results for v in group.values())
        assert_same_draws(
            tuple({n: v.cpu() for n, v in group.items()} for group in results), reference
        )


def test_fold_in_batches_over_data():
    key, steps = random.key(9), torch.arange(5)
    folded = torch.vmap(random.fold_in, (None, 0))(key, steps)
    assert torch.equal(folded, torch.stack([random.fold_in(key, int(i)) for i in steps]))


def test_a_step_counter_as_tensor_never_recompiles():
    counter = CompileCounter()
    step_key = torch.compile(random.fold_in, backend=counter, fullgraph=True)
    for step in range(5):
        assert torch.equal(
            step_key(random.key(1), torch.tensor(step)), random.fold_in(random.key(1), step)
        )
    assert counter.frame_count == 1


def test_draws_work_inside_grad_and_let_gradients_through():
    key = random.key(2)

    def noisy(scale):
        return (scale * random.normal(key, (100,)) + random.uniform(key, (100,))).sum()

    expected = random.normal(key, (100,)).sum()
    torch.testing.assert_close(torch.func.grad(noisy)(torch.tensor(2.0)), expected)

    def mean(low, high):
        return random.uniform(key, (100,), minval=low, maxval=high).mean()

    u = random.uniform(key, (100,)).mean()
    slopes = torch.func.grad(mean, (0, 1))(torch.tensor(1.0), torch.tensor(3.0))
    torch.testing.assert_close(torch.stack(slopes), torch.stack([1 - u, u]))


def test_truncated_normal_moves_with_its_bounds():
    key, step = random.key(2), 1e-6
    f = lambda a, b: random.truncated_normal(key, a, b, (200,), torch.float64).sum()  # noqa: E731
    a, b = torch.tensor(-1.5, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    slopes = torch.func.grad(f, (0, 1))(a, b)
    measured = (
        (f(a + step, b) - f(a - step, b)) / (2 * step),
        (f(a, b + step) - f(a, b - step)) / (2 * step),
    )
    torch.testing.assert_close(slopes, measured, rtol=1e-6, atol=0)


def test_erfinv_inverts_erf_and_has_its_derivative():
    x = torch.linspace(-0.999, 0.999, 1999, dtype=torch.float64)
    x[999] = 0.0
    y = _arithmetic.erfinv(x)
    torch.testing.assert_close(torch.erf(y), x, rtol=1e-14, atol=1e-16)
    slope = torch.vmap(torch.func.grad(_arithmetic.erfinv))(x)
    torch.testing.assert_close(slope, math.sqrt(math.pi) / 2 * torch.exp(y * y), rtol=1e-9, atol=0)
    ends = _arithmetic.erfinv(torch.tensor([-1.0, 1.0]))
    assert ends.isfinite().all() and (ends.abs() > 3.7).all()


def test_inputs_are_left_as_they_were():
    given = (random.key(1), *inputs())
    before = [x.clone() for x in given]
    everything(*given)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


# Statistics, with fixed keys: what passes today passes always


def kolmogorov_smirnov(sample, cdf):
    """Return sqrt(n) times the largest distance from the distribution; above 1.95 in 1 of 1000."""
    x = sample.double().flatten().sort().values
    n, expected = x.numel(), cdf(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    gap = torch.maximum((expected - steps[:-1]).abs().max(), (steps[1:] - expected).abs().max())
    return math.sqrt(n) * gap.item()


def normal_cdf(x):
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def chi_squared_per_class(draws, probabilities):
    """Return chi² over its degrees of freedom, near 1 with variance 2 / degrees of freedom."""
    expected = probabilities * draws.numel()
    counts = torch.bincount(draws.flatten(), minlength=len(probabilities))
    assert len(counts) == len(probabilities)
    return (((counts - expected) ** 2 / expected).sum() / (len(counts) - 1)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_and_normal_follow_their_distributions(dtype):
    key, n = random.key(31), (100_000,)
    assert (
        kolmogorov_smirnov(
            random.uniform(key, n, dtype, minval=-2, maxval=3), lambda x: (x + 2) / 5
        )
        < 1.95
    )
    x = random.normal(key, n, dtype)
    assert kolmogorov_smirnov(x, normal_cdf) < 1.95
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (x.double() ** power).mean().item() - moment
        assert abs(error) < 4 * math.sqrt(variance / n[0])


@pytest.mark.parametrize(("lower", "upper"), [(-2, 2), (0.5, 0.6), (-math.inf, -1), (-6, 6)])
def test_truncated_normal_stays_inside_and_follows_its_distribution(lower, upper):
    x = random.truncated_normal(random.key(32), lower, upper, (100_000,))
    assert (x > lower).all() and (x < upper).all()
    low, high = normal_cdf(torch.tensor([lower, upper], dtype=torch.float64))
    assert kolmogorov_smirnov(x, lambda x: (normal_cdf(x) - low) / (high - low)) < 1.95


def test_truncated_normal_at_the_ends_of_its_distribution_function(monkeypatch):
    for fraction in (0.0, 1.0):
        monkeypatch.setattr(
            _arithmetic, "unit", lambda key, shape, dtype, f=fraction: torch.full(shape, f)
        )
        for lower, upper in ((-6.0, 6.0), (-math.inf, math.inf), (-2.0, 2.0), (1.0, 1.0000002)):
            x = random.truncated_normal(random.key(0), lower, upper, ()).item()
            assert lower < x < upper and abs(x) < 6


TAILS = [(3.0, math.inf), (4.5, 5.0), (6.0, math.inf), (8.0, 8.5), (20.0, math.inf), (100.0, 101.0)]


def tail_beyond(x, lower, upper):
    """The probability of more than x, between bounds of a tail, in float64."""
    log_tail = lambda t: torch.special.log_ndtr(-torch.as_tensor(t, dtype=torch.float64))  # noqa: E731
    rest = torch.exp(log_tail(upper) - log_tail(lower)) if upper < math.inf else 0.0
    return (torch.exp(log_tail(x) - log_tail(lower)) - rest) / (1 - rest)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("lower", "upper"), TAILS)
def test_truncated_normal_far_out_follows_its_distribution(lower, upper, dtype, as_tensors):
    form = (lambda t: torch.tensor(t, dtype=dtype)) if as_tensors else float
    key, shape = random.key(32), (20_000,)
    x = random.truncated_normal(key, form(lower), form(upper), shape, dtype)
    assert (x > lower).all() and (x < upper).all()
    # float32 itself has few numbers in the last tail.
    assert len(x.unique()) > (4_000 if lower == 100 and dtype is torch.float32 else 15_000)
    assert kolmogorov_smirnov(x, lambda x: 1 - tail_beyond(x, lower, upper)) < 1.95
    if lower > 7 or dtype is torch.float32:
        exact = 1 - random.uniform(key, shape, dtype=dtype).double()
        resolution = 4 * torch.finfo(dtype).eps * lower * (lower + 1)
        assert (tail_beyond(x, lower, upper) - exact).abs().max() < resolution
    below = random.truncated_normal(key, form(-upper), form(-lower), shape, dtype)
    assert (below > -upper).all() and (below < -lower).all()
    assert kolmogorov_smirnov(-below, lambda x: 1 - tail_beyond(x, lower, upper)) < 1.95


def test_truncated_normal_takes_bounds_of_every_kind_at_once(plain_backend):
    lower = torch.tensor([-2.0, 8.0, -9.0, 3.0, -math.inf, -math.inf, 1e30], dtype=torch.float64)
    upper = torch.tensor([2.0, math.inf, -8.0, 3.5, -9.0, 1.0, math.inf], dtype=torch.float64)
    f = lambda a, b: random.truncated_normal(random.key(1), a, b)  # noqa: E731
    drawn = f(lower.float(), upper.float())
    assert ((drawn > lower.float()) & (drawn < upper.float())).all() and drawn[6] < 1.001e30
    assert torch.equal(drawn, jit(f)(lower.float(), upper.float()))
    f = lambda a, b: random.truncated_normal(random.key(1), a, b, dtype=torch.float64)  # noqa: E731
    a, b, eps = lower[:6], upper[:6], 1e-6
    for i, (up, down) in enumerate([((eps, 0), (-eps, 0)), ((0, eps), (0, -eps))]):
        slope = torch.func.jacrev(f, i)(a, b).diagonal()
        difference = (f(a + up[0], b + up[1]) - f(a + down[0], b + down[1])) / (2 * eps)
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-7)


def test_the_bias_of_narrow_integers_over_wide_spans_is_as_documented():
    """Of 2**32 words, 5 fall on each of the first 294,967,296 numbers below 10**9, 4 on others."""
    for dtype, share in ((torch.int32, 5 * 294_967_296 / 2**32), (torch.int64, 0.294967296)):
        drawn = random.randint(random.key(0), (100_000,), 0, 10**9, dtype)
        found = (drawn < 294_967_296).double().mean().item()
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 100_000)


def test_bernoulli_has_its_mean_and_its_certainties():
    p = torch.tensor([0.0, 0.01, 0.5, 0.9, 1.0])
    mean = random.bernoulli(random.key(33), p, (100_000, 5)).double().mean(0)
    assert mean[0] == 0 and mean[-1] == 1
    assert ((mean - p).abs() <= 4 * (p * (1 - p) / 100_000).sqrt()).all()


def test_categorical_and_randint_fill_their_classes():
    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    draws = random.categorical(random.key(34), p.log(), shape=(100_000,))
    assert chi_squared_per_class(draws, p) < 4
    draws = random.categorical(random.key(34), p.log().bfloat16(), shape=(100_000,))
    assert chi_squared_per_class(draws, p) < 4
    draws = random.randint(random.key(35), (100_000,), -3, 7) + 3
    assert chi_squared_per_class(draws, torch.full((10,), 0.1)) < 3.5


def test_permutations_are_all_as_likely():
    keys = random.split(random.key(36), 24_000)
    orders = torch.vmap(lambda k: random.permutation(k, 4))(keys)
    assert orders.sum(1).eq(6).all()
    index = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    classes = index.unique(return_inverse=True)[1]
    assert chi_squared_per_class(classes, torch.full((24,), 1 / 24)) < 2.2


def test_children_share_no_draws_with_each_other_or_their_parent():
    key = random.key(37)
    streams = [*random.split(key, 8), key, random.fold_in(key, 3), random.fold_in(key, 2**31)]
    # fold_in(key, i) and split(key)[i] encrypt the same counter, as in JAX: fold from another key.
    streams.pop(-2)
    words = torch.stack([random.bits(k, (1000,)) for k in streams])
    assert words.unique().numel() > words.numel() - 3  # of 10,000 words among 2**32: birthdays
    bits = (words[:, :, None] >> torch.arange(32)) & 1
    agreement = (bits[:, None] == bits[None]).double().mean((2, 3)) - 0.5
    agreement.fill_diagonal_(0)
    assert agreement.abs().max() < 4.5 * 0.5 / math.sqrt(32_000)
