"""Keys and samplers: known answers, recorded draws, transformations, statistics, errors."""

import json
import math
from pathlib import Path

import pytest
import torch

from fdl import _random, random

RECORDED = json.loads(Path(__file__).with_name("random_vectors.json").read_text())
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
        assert tuple(w.item() for w in _random.threefry2x32(k0, k1, x0, x1)) == answer


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
    if "logits" in kwargs:
        kwargs["logits"] = torch.tensor(kwargs["logits"])
    return getattr(random, sampler)(random.key(seed), **kwargs)


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
    if case["sampler"] == "truncated_normal":
        torch.testing.assert_close(drawn, recorded, rtol=1e-5, atol=0)
    elif case["sampler"] == "normal":
        assert units_apart(drawn, recorded) <= (4 if drawn.dtype is torch.float32 else 32)
    elif case["kwargs"].get("low") == -2.5:  # bounds other than [0, 1): a rounding more
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


def test_counters_beyond_32_bits_use_the_high_word():
    key, index = random.key(3), torch.tensor([5, 2**32 + 5])
    near, far = torch.stack(_random.threefry2x32(*key, index >> 32, index & _random.MASK), -1)
    assert torch.equal(near, random.split(key, 6)[5])
    assert torch.equal(far, torch.stack(_random.threefry2x32(*key, 1, 5)))
    assert not torch.equal(near, far)


# The same draws under every transformation


def compile(f):
    return torch.compile(f, fullgraph=True, options=random.COMPILE_OPTIONS)


def everything(key, data, p, logits):
    """Call every sampler; results that must be the same bits, and results close to it."""
    keys = iter(random.split(key, 32).unbind())
    exact = {
        "split": random.split(next(keys), 3),
        "fold_in": random.fold_in(next(keys), data),
        "fold_in_int": random.fold_in(next(keys), 7),
        "bits": random.bits(next(keys), (3, 67)),
        **{f"uniform {d}": random.uniform(next(keys), (77,), dtype=d) for d in FLOATS},
        "bernoulli": random.bernoulli(next(keys), 0.3, (33,)),
        "bernoulli_tensor": random.bernoulli(next(keys), p),
        "randint": random.randint(next(keys), (5, 7), -3, 10),
        "randint_wide": random.randint(next(keys), (50,), -(2**62), 2**62 + 12345),
        "randint_full": random.randint(next(keys), (50,), -(2**63), 2**63),
        "randint_32": random.randint(next(keys), (50,), -(2**31), 2**31 - 1, torch.int32),
        "randint_tensor": random.randint(next(keys), (50,), -data, data + 1),
        "permutation": random.permutation(next(keys), 2_000),
        "permutation_rows": random.permutation(next(keys), logits),
        "categorical": random.categorical(next(keys), logits, (100, 4)),
    }
    close = {
        "uniform_bounds": random.uniform(next(keys), (4,), -p, p),
        **{f"normal {d}": random.normal(next(keys), (500,), d) for d in FLOATS},
        "truncated_normal": random.truncated_normal(next(keys), -2, 2, (500,)),
    }
    return exact, close


def inputs(device="cpu"):
    return (
        torch.tensor(2**33 + 11, device=device),
        torch.tensor([0.1, 0.5, 0.9, 1.0], device=device),
        torch.arange(12.0, device=device).reshape(4, 3).sin(),
    )


def assert_same_draws(ours, reference):
    for name, value in reference[0].items():
        assert torch.equal(ours[0][name], value), name
    for name, value in reference[1].items():
        # The distribution function is flat where |x| is large: bounds cost a few digits there.
        limit = 64 if name == "truncated_normal" else 4
        assert units_apart(ours[1][name], value) <= limit, name


def row(results, i):
    return tuple({name: value[i] for name, value in group.items()} for group in results)


def test_compiled_is_eager_and_batched_is_one_by_one():
    keys = random.split(random.key(5), 3)
    one_by_one = [everything(key, *inputs()) for key in keys]
    batched = torch.vmap(everything, in_dims=(0, None, None, None), randomness="error")

    compiled = compile(everything)
    assert_same_draws(compiled(keys[0], *inputs()), one_by_one[0])
    in_a_batch = batched(keys, *inputs())
    compiled_batch = compile(batched)(keys, *inputs())
    for i, reference in enumerate(one_by_one):
        assert_same_draws(row(in_a_batch, i), reference)
        assert_same_draws(row(compiled_batch, i), reference)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_cpu():
    reference = everything(random.key(5), *inputs())
    key = random.key(5, device="cuda")
    for f in (everything, compile(everything)):
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
    counter = torch._dynamo.testing.CompileCounter()
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
        return random.uniform(key, (100,), low, high).mean()

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
    x = torch.linspace(-0.999, 0.999, 1999, dtype=torch.float64)  # 0 is one of them
    y = _random.erfinv(x)
    torch.testing.assert_close(torch.erf(y), x, rtol=1e-14, atol=1e-16)
    slope = torch.vmap(torch.func.grad(_random.erfinv))(x)
    torch.testing.assert_close(slope, math.sqrt(math.pi) / 2 * torch.exp(y * y), rtol=1e-9, atol=0)
    ends = _random.erfinv(torch.tensor([-1.0, 1.0]))
    assert ends.isfinite().all() and (ends.abs() > 3.7).all()


def test_inputs_are_left_as_they_were():
    key, (data, p, logits) = random.key(1), inputs()
    before = [x.clone() for x in (key, data, p, logits)]
    everything(key, data, p, logits)
    assert all(torch.equal(x, y) for x, y in zip((key, data, p, logits), before, strict=True))
