"""What random functions draw from a key, in every floating dtype: mean, variance, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F

from fdl import interop, random
from fdl.interop._key_mode import RULES, KeyedRandomMode
from fdl.nn import Policy, with_policy

KEY = random.key(11)
N = 60_000
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def one(dtype, value=1.0):
    return torch.full((N,), value, dtype=dtype)


def kept(rate):
    """Give mean and deviation of ones after dropout."""
    return 1.0, math.sqrt(rate / (1 - rate))


# A draw; its mean, deviation, the bounds (low, high] or [low, high) that it must keep, and a value
# that all but a share of 1e-4 exceed in magnitude: tails have to be there.
DRAWS = {
    "torch.rand": (lambda d: torch.rand(N, dtype=d), 0.5, 12**-0.5, (0, 1), 0.999),
    "torch.rand_like": (lambda d: torch.rand_like(one(d)), 0.5, 12**-0.5, (0, 1), 0.995),
    "Tensor.uniform_": (lambda d: one(d).uniform_(1, 3), 2, 3**-0.5, (1, 3), 2.98),
    "init.uniform_": (
        lambda d: torch.nn.init.uniform_(one(d), -3, -1), -2, 3**-0.5, (-3, -1), 2.98,
    ),
    "init.kaiming_uniform_": (
        lambda d: torch.nn.init.kaiming_uniform_(one(d).view(-1, 2)),
        0, 1, (-(3**0.5), 3**0.5), 1.72,
    ),
    "torch.randn": (lambda d: torch.randn(N, dtype=d), 0, 1, (-6, 6), 3.7),
    "torch.randn_like": (lambda d: torch.randn_like(one(d)), 0, 1, (-6, 6), 3.7),
    "torch.normal": (lambda d: torch.normal(one(d, 3.0), 2.0), 3, 2, (-9, 15), 10.4),
    "Tensor.normal_": (lambda d: one(d).normal_(3, 2), 3, 2, (-9, 15), 10.4),
    "init.normal_": (lambda d: torch.nn.init.normal_(one(d), 3, 2), 3, 2, (-9, 15), 10.4),
    "Tensor.exponential_": (lambda d: one(d).exponential_(2), 0.5, 0.5, (0, 12), 4),
    "torch.bernoulli": (lambda d: torch.bernoulli(one(d, 0.001)), 0.001, 0.0316, (0, 1), 1),
    "Tensor.bernoulli": (lambda d: one(d).bernoulli(0.999), 0.999, 0.0316, (0, 1), 1),
    "Tensor.bernoulli_": (lambda d: one(d).bernoulli_(one(d, 0.3)), 0.3, 0.21**0.5, (0, 1), 1),
    "F.dropout": (lambda d: F.dropout(one(d), 0.001), *kept(0.001), (0, 1.01), 1),
    "torch.dropout": (lambda d: torch.dropout(one(d), 0.3, train=True), *kept(0.3), (0, 1.5), 1),
    "F.dropout1d": (lambda d: F.dropout1d(one(d).view(1, N, 1), 0.3), *kept(0.3), (0, 1.5), 1),
    "F.dropout2d": (
        lambda d: F.dropout2d(one(d).view(1, N, 1, 1), 0.3), *kept(0.3), (0, 1.5), 1,
    ),
    "F.dropout3d": (
        lambda d: F.dropout3d(one(d).view(1, N, 1, 1, 1), 0.3), *kept(0.3), (0, 1.5), 1,
    ),
    "F.rrelu": (lambda d: F.rrelu(-one(d), 0.1, 0.3, True), -0.2, 0.0577, (-0.301, -0.1), 0.29),
    "torch.rrelu": (
        lambda d: torch.rrelu(-one(d), 0.1, 0.3, True), -0.2, 0.0577, (-0.301, -0.1), 0.29,
    ),
    "torch.randint": (lambda d: torch.randint(0, 11, (N,), dtype=d), 5, 10**0.5, (0, 10), 10),
}  # fmt: skip
# Alpha dropout: input ones go to two values; standardised normal input keeps mean and variance.
for _name in ("F.alpha_dropout", "F.feature_alpha_dropout", "torch.alpha_dropout",
              "torch.feature_alpha_dropout"):  # fmt: skip
    _f = getattr(F if _name[0] == "F" else torch, _name.partition(".")[2])
    DRAWS[_name] = (
        lambda d, f=_f: f(random.normal(KEY, (1, N, 1)).to(d), 0.3, True), 0, 1, (-6, 6), 3.5,
    )  # fmt: skip
# No numbers of their own: memory, permutations, what calls the above, what is not random.
NOT_DRAWING = {
    *("torch.empty", "torch.empty_like", "Tensor.new_empty", "Tensor.unflatten", "torch.randperm"),
    *("F.gumbel_softmax", "F.multi_head_attention_forward", "F.scaled_dot_product_attention"),
    *(f"torch.{name}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
    *(f"torch.{name}_cell" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
}


def test_every_drawing_rule_has_a_row():
    from fdl._differentiable import _functions

    assert DRAWS.keys() | NOT_DRAWING | _functions.RULES.keys() == RULES.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DRAWS)
def test_mean_variance_and_extremes(name, dtype):
    draw, mean, std, bounds, tail = DRAWS[name]
    low, high = torch.tensor(bounds).to(dtype).double()
    with KeyedRandomMode(KEY):
        y = draw(dtype)
    assert y.dtype == dtype
    x = y.double().flatten()
    step = torch.finfo(dtype).eps
    assert x.isfinite().all()
    assert (x.mean() - mean).abs() < 5 * std / N**0.5 + 0.3 * step * max(abs(mean), std)
    assert (x.std() / std - 1).abs() < 0.01 + step or std < 0.05
    assert low <= x.min() and x.max() <= high
    assert (x.abs() >= tail * (1 - step)).any()
    if ("rand" in name and high == 1) or "uniform" in name:
        assert x.max() < high


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exponential_number_is_never_0_nor_infinite(dtype, u, monkeypatch):
    """At the ends of the uniform draw that it is made of; float32 meets 0 once in 8 million."""
    monkeypatch.setattr(random, "uniform", lambda *_, dtype, **__: torch.full((3,), u, dtype=dtype))
    with KeyedRandomMode(KEY):
        x = torch.empty(3, dtype=dtype).exponential_()
        huge_rate = torch.empty(3, dtype=dtype).exponential_(1e30)
    for y in (x, huge_rate):
        assert (y > 0).all() and y.isfinite().all() and y.log().isfinite().all()
    if u == 0:  # the middle of the first step of the uniform grid
        step = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert x[0].item() == pytest.approx(step / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gumbel_softmax_is_never_nan(dtype):
    """The probabilities of the largest are the softmax (Gumbel, 1954)."""
    logits = torch.tensor([0.0, 1.0, -2.0], dtype=dtype)
    with KeyedRandomMode(KEY):
        y = F.gumbel_softmax(logits.expand(N, 3), 0.5, hard=True)
    assert y.isfinite().all()
    shares = y.double().mean(0)
    torch.testing.assert_close(shares, logits.double().softmax(0), atol=0.005, rtol=0)


def test_gumbel_softmax_of_a_module_in_bfloat16():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 64)

        def forward(self, x):
            return F.gumbel_softmax(self.linear(x))

    model, params, _ = interop.from_module(Net())
    model = with_policy(model, Policy(compute=torch.bfloat16))
    y = model.apply(params, random.normal(KEY, (256, 8)), train=True, key=KEY)
    assert not y.isnan().any()


def test_float32_draws_are_those_of_the_key():
    with KeyedRandomMode(KEY):
        got = torch.rand(5), torch.randn(5), torch.empty(5).uniform_()
    keys = [random.fold_in(KEY, i) for i in range(3)]
    expected = (
        random.uniform(keys[0], (5,)),
        random.normal(keys[1], (5,)),
        random.uniform(keys[2], (5,)),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_draws_inside_pythons_functions_follows_the_key():
    x = torch.eye(6) + 0.1
    state = torch.get_rng_state()
    with KeyedRandomMode(KEY):
        torch.svd_lowrank(x, 2)
        torch.pca_lowrank(x, 2)
        torch.nn.init.xavier_normal_(torch.empty(3, 3))
        torch.nn.init.trunc_normal_(torch.empty(3, 3))
        torch.distributions.Normal(torch.zeros(3), 1.0).rsample()
        torch.distributions.Exponential(torch.ones(3)).sample()
        torch.distributions.Uniform(0.0, torch.ones(3)).sample()
        torch.distributions.Bernoulli(torch.full((3,), 0.5)).sample()
    assert torch.equal(torch.get_rng_state(), state)


class Leaves:
    """A container that applies functions of torch to its leaves, as a TensorDict does."""

    shape = torch.Size([])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("the mode comes first")


def test_a_container_of_leaves_is_not_taken_for_one_tensor():
    with (
        KeyedRandomMode(KEY),
        pytest.raises(TypeError, match="randn_like: expected tensors, got Leaves; call it for"),
    ):
        torch.randn_like(Leaves())
