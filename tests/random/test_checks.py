"""``fdl.random`` refuses what it cannot draw: who, which argument, expected, got, what to do."""

import re

import pytest
import torch

from fdl import random

KEY = random.key(0)
FLOAT, WIDE = torch.tensor(0.5), torch.ones(2, 3)
ON_A_KEY = {
    "split": lambda k: random.split(k),
    "fold_in": lambda k: random.fold_in(k, 1),
    "bits": lambda k: random.bits(k),
    "uniform": lambda k: random.uniform(k),
    "normal": lambda k: random.normal(k),
    "truncated_normal": lambda k: random.truncated_normal(k, -1, 1),
    "bernoulli": lambda k: random.bernoulli(k),
    "randint": lambda k: random.randint(k, (), 0, 2),
    "permutation": lambda k: random.permutation(k, 3),
    "categorical": lambda k: random.categorical(k, WIDE),
    "ball": lambda k: random.ball(k, 2),
    "beta": lambda k: random.beta(k, 1.0, 1.0),
    "binomial": lambda k: random.binomial(k, 2, 0.5),
    "cauchy": lambda k: random.cauchy(k),
    "choice": lambda k: random.choice(k, 3),
    "dirichlet": lambda k: random.dirichlet(k, WIDE),
    "exponential": lambda k: random.exponential(k),
    "gamma": lambda k: random.gamma(k, 1.0),
    "gumbel": lambda k: random.gumbel(k),
    "laplace": lambda k: random.laplace(k),
    "logistic": lambda k: random.logistic(k),
    "multivariate_normal": lambda k: random.multivariate_normal(k, WIDE[0], torch.eye(3)),
    "orthogonal": lambda k: random.orthogonal(k, 2),
    "poisson": lambda k: random.poisson(k, 1.0),
    "rademacher": lambda k: random.rademacher(k),
    "t": lambda k: random.t(k, 1.0),
}


def test_every_draw_is_checked():
    assert {*random.__all__} - {"Key", "Shape", "key"} == ON_A_KEY.keys()


@pytest.mark.parametrize("name", ON_A_KEY)
@pytest.mark.parametrize(
    ("thing", "error", "got", "advice"),
    [
        (3, TypeError, "got 3 (int)", "make a key from a seed with random.key(3)"),
        (None, TypeError, "got None (NoneType)", "make one with random.key(seed)"),
        (
            WIDE,
            TypeError,
            "got a tensor, float32 of shape (2, 3)",
            "make one with random.key(seed)",
        ),
        (
            random.split(KEY, 4),
            ValueError,
            "got a tensor, int64 of shape (4, 2)",
            "use torch.vmap to draw with a batch of keys",
        ),
        (torch.arange(3), ValueError, "got a tensor, int64 of shape (3,)", "see random.key"),
    ],
)
def test_what_is_no_key(name, thing, error, got, advice):
    expected = f"{name}: `key` expected a key, an int64 tensor of shape (2,), {got}; {advice}"
    with pytest.raises(error, match=re.escape(expected)):
        ON_A_KEY[name](thing)


CASES = [
    (lambda: random.key(1.5), TypeError, "key: `seed` expected an int, got 1.5 (float); to derive"),
    (lambda: random.key(2**64), ValueError, f"`seed` must be in [-2**63, 2**64), got {2**64}"),
    (lambda: random.key(-(2**63) - 1), ValueError, "key: `seed` must be in [-2**63, 2**64), got -"),
    (lambda: random.split(KEY, -1), ValueError, "split: `num` must not be negative, got -1"),
    (lambda: random.split(KEY, 2.0), TypeError,
     "split: `num` expected a non-negative int, got 2.0"),
    (lambda: random.fold_in(KEY, -1), ValueError, "`data` must be in [0, 2**32), got -1"),
    (lambda: random.fold_in(KEY, 2**32), ValueError, f"`data` must be in [0, 2**32), got {2**32}"),
    (lambda: random.fold_in(KEY, "a"), TypeError,
     "`data` expected an int or a tensor, got 'a' (str)"),
    (lambda: random.fold_in(KEY, FLOAT), TypeError,
     "`data` expected an integer dtype, got a tensor, float32"),
    (lambda: random.fold_in(KEY, KEY), ValueError,
     "`data` expected a 0-d tensor, got a tensor, int64"),
    (lambda: random.bits(KEY, 5), TypeError, "bits: `shape` expected a tuple of ints, got 5 (int)"),
    (lambda: random.normal(KEY, (2, -3)), ValueError, "negative sizes, got (2, -3)"),
    (lambda: random.normal(KEY, (2,), torch.int32), TypeError,
     "normal: `dtype` expected float32, float64, float16 or bfloat16, got torch.int32"),
    (lambda: random.uniform(KEY, (2,), float), TypeError,
     "uniform: `dtype` expected float32"),
    (lambda: random.uniform(KEY, (2,), minval=torch.float64), TypeError,
     "uniform: `minval` expected a number or a tensor, got torch.float64 (dtype)"),
    (lambda: random.uniform(KEY, (2,), minval=1, maxval=1.0), ValueError,
     "uniform: `minval` must be below `maxval`, got 1 and 1.0"),
    (lambda: random.uniform(KEY, (2,), minval=float("nan")), ValueError,
     "`minval` must be below `maxval`"),
    (lambda: random.uniform(KEY, (2,), minval=WIDE), ValueError,
     "uniform: `minval` of shape (2, 3) does not broadcast to shape=(2,)"),
    (lambda: random.truncated_normal(KEY, 2, -2), ValueError,
     "truncated_normal: `lower` must be below `upper`, got 2 and -2"),
    (lambda: random.truncated_normal(KEY, WIDE, 2, (3,)), ValueError,
     "truncated_normal: `lower` of shape (2, 3) does not broadcast to shape=(3,)"),
    (lambda: random.bernoulli(KEY, 1.01), ValueError,
     "bernoulli: `p` is a probability and must be in [0, 1], got 1.01"),
    (lambda: random.bernoulli(KEY, float("nan")), ValueError, "must be in [0, 1], got nan"),
    (lambda: random.bernoulli(KEY, KEY), TypeError, "bernoulli: `p` expected float32, float64"),
    (lambda: random.bernoulli(KEY, "p"), TypeError, "bernoulli: `p` expected a number or a tensor"),
    (lambda: random.bernoulli(KEY, WIDE, (2,)), ValueError, "bernoulli: `p` of shape (2, 3) does"),
    (lambda: random.bernoulli(KEY, WIDE, (1, 3)), ValueError, "does not broadcast to shape=(1, 3)"),
    (lambda: random.randint(KEY, (2,), 3, 3), ValueError,
     "`minval` must be below `maxval`, got 3 and 3"),
    (lambda: random.randint(KEY, (2,), 0, 129, torch.int8), ValueError,
     "randint: `maxval` must be in [-127, 128] for torch.int8, got 129; choose a wider dtype"),
    (lambda: random.randint(KEY, (2,), -1, 9, torch.uint8), ValueError,
     "randint: `minval` must be in [0, 255] for torch.uint8, got -1"),
    (lambda: random.randint(KEY, (2,), 0.0, 9), TypeError,
     "randint: `minval` expected an int, got 0.0"),
    (lambda: random.randint(KEY, (2,), FLOAT, 9), TypeError,
     "`minval` expected an integer dtype, got"),
    (lambda: random.randint(KEY, (2,), 0, 9, torch.float32), TypeError,
     "randint: `dtype` expected int64, int32, int16, int8 or uint8, got torch.float32"),
    (lambda: random.permutation(KEY, -1), ValueError,
     "permutation: `x` must not be negative, got -1"),
    (lambda: random.permutation(KEY, 2.0), TypeError,
     "permutation: `x` expected a non-negative int"),
    (lambda: random.permutation(KEY, FLOAT), ValueError,
     "permutation: `x` expected at least one axis, got a 0-d tensor; to permute range(n) pass n"),
    (lambda: random.permutation(KEY, WIDE, 2), ValueError,
     "permutation: `axis` must be in [-2, 1], got 2"),
    (lambda: random.permutation(KEY, 3, 1), ValueError,
     "permutation: `axis` must be in [-1, 0], got 1"),
    (lambda: random.categorical(KEY, WIDE, (3,)), TypeError,
     "categorical: `axis` expected an int, got (3,) (tuple)"),
    (lambda: random.categorical(KEY, WIDE, -3), ValueError,
     "categorical: `axis` must be in [-2, 1], got -3"),
    (lambda: random.categorical(KEY, [0.0]), TypeError,
     "`logits` expected a tensor, got [0.0] (list)"),
    (lambda: random.categorical(KEY, FLOAT), ValueError, "one or more classes along `axis`"),
    (lambda: random.categorical(KEY, WIDE[:, :0]), ValueError,
     "got a tensor, float32 of shape (2, 0)"),
    (lambda: random.categorical(KEY, KEY), TypeError, "categorical: `logits` expected float32"),
    (lambda: random.categorical(KEY, WIDE, shape=(3,)), ValueError,
     "categorical: `logits.select(-1, 0)` of shape (2,) does not broadcast to shape=(3,)"),
    (lambda: random.truncated_normal(KEY, WIDE, WIDE.mT), ValueError,
     "truncated_normal: `lower` of shape (2, 3) and `upper` of shape (3, 2) do not broadcast"),
    (lambda: random.bits(KEY, (2,), torch.int32), TypeError,
     "bits: `dtype` expected uint8, uint16, uint32 or uint64, got torch.int32"),
    (lambda: random.exponential(KEY, 3), TypeError, "exponential: `shape` expected a tuple of int"),
    (lambda: random.laplace(KEY, (-1,)), ValueError, "laplace: `shape` must not have negative"),
    (lambda: random.logistic(KEY, (), torch.int64), TypeError, "logistic: `dtype` expected float"),
    (lambda: random.cauchy(KEY, (), None), TypeError, "cauchy: `dtype` expected float32"),
    (lambda: random.gumbel(KEY, mode="highest"), ValueError,
     "gumbel: `mode` expected 'low', 'high' or None, got 'highest'"),
    (lambda: random.rademacher(KEY, (), torch.uint8), TypeError,
     "rademacher: `dtype` expected int64, int32, int16, int8, float32, float64, float16 or bfl"),
    (lambda: random.choice(KEY, 3.0), TypeError, "choice: `a` expected a non-negative int"),
    (lambda: random.choice(KEY, FLOAT), ValueError,
     "choice: `a` expected at least one axis, got a 0-d tensor; to draw from range(n) pass n"),
    (lambda: random.choice(KEY, 0), ValueError, "choice: `a` has nothing to draw from, got 0"),
    (lambda: random.choice(KEY, WIDE[:0], (2,)), ValueError,
     "choice: `a` has nothing to draw from, got a tensor, float32 of shape (0, 3)"),
    (lambda: random.choice(KEY, WIDE, axis=2), ValueError, "choice: `axis` must be in [-2, 1]"),
    (lambda: random.choice(KEY, 3, (2, 2), replace=False), ValueError,
     "choice: `shape` asks for 4 draws of 3 without replacement; draw fewer, or pass replace=True"),
    (lambda: random.choice(KEY, 2, p=[0.5, 0.5]), TypeError,
     "choice: `p` expected a tensor, got [0.5, 0.5] (list)"),
    (lambda: random.choice(KEY, 2, p=KEY), TypeError, "choice: `p` expected float32"),
    (lambda: random.choice(KEY, 3, p=WIDE), ValueError,
     "choice: `p` expected shape (3,), a probability for each element, got a tensor, float32 of"),
    (lambda: random.gamma(KEY, -1.0), ValueError,
     "gamma: `a` must be positive and finite, got -1.0"),
    (lambda: random.gamma(KEY, float("nan")), ValueError, "gamma: `a` must be positive and finite"),
    (lambda: random.gamma(KEY, "1"), TypeError,
     "gamma: `a` expected a number or a tensor, got '1' (str)"),
    (lambda: random.gamma(KEY, WIDE * 1j), TypeError,
     "gamma: `a` expected a real dtype, got a tensor, complex64 of shape (2, 3)"),
    (lambda: random.gamma(KEY, WIDE, (2,)), ValueError,
     "gamma: `a` of shape (2, 3) does not broadcast to shape=(2,)"),
    (lambda: random.gamma(KEY, 1.0, dtype=torch.int64), TypeError, "gamma: `dtype` expected float"),
    (lambda: random.beta(KEY, 1.0, 0.0), ValueError, "beta: `b` must be positive and finite"),
    (lambda: random.beta(KEY, WIDE, WIDE.mT), ValueError,
     "beta: `a` of shape (2, 3) and `b` of shape (3, 2) do not broadcast together"),
    (lambda: random.t(KEY, 0), ValueError, "t: `df` must be positive and finite, got 0"),
    (lambda: random.dirichlet(KEY, FLOAT), ValueError,
     "dirichlet: `alpha` expected at least 1 axis, got a tensor, float32 of shape ()"),
    (lambda: random.dirichlet(KEY, [1.0]), TypeError, "dirichlet: `alpha` expected a tensor"),
    (lambda: random.dirichlet(KEY, WIDE, (3,)), ValueError,
     "dirichlet: `alpha` of shape (2, 3) does not broadcast to shape=(3, 3)"),
    (lambda: random.ball(KEY, -1), ValueError, "ball: `d` must not be negative, got -1"),
    (lambda: random.ball(KEY, 2, 0), ValueError, "ball: `p` must be positive and finite, got 0"),
    (lambda: random.ball(KEY, 2, WIDE), ValueError, "ball: `p` of shape (2, 3) does not broadcast"),
    (lambda: random.orthogonal(KEY, 2.0), TypeError, "orthogonal: `n` expected a non-negative int"),
    (lambda: random.orthogonal(KEY, 2, m=-1), ValueError, "orthogonal: `m` must not be negative"),
    (lambda: random.multivariate_normal(KEY, FLOAT, WIDE), ValueError,
     "multivariate_normal: `mean` expected at least 1 axis, got a tensor, float32 of shape ()"),
    (lambda: random.multivariate_normal(KEY, WIDE[0], WIDE[0]), ValueError,
     "multivariate_normal: `cov` expected at least 2 axes, got a tensor, float32 of shape (3,)"),
    (lambda: random.multivariate_normal(KEY, WIDE[0], WIDE), ValueError,
     "`cov` expected shape (..., 3, 3) for `mean` of shape (3,), got a tensor, float32"),
    (lambda: random.multivariate_normal(KEY, WIDE, torch.eye(3), (3,)), ValueError,
     "multivariate_normal: `mean[..., 0]` of shape (2,) does not broadcast to shape=(3,)"),
    (lambda: random.multivariate_normal(KEY, WIDE, torch.eye(3), method="qr"), ValueError,
     "multivariate_normal: `method` expected 'cholesky', 'eigh' or 'svd', got 'qr'"),
    (lambda: random.multivariate_normal(KEY, WIDE, torch.eye(3), dtype=int), TypeError,
     "multivariate_normal: `dtype` expected float32"),
    (lambda: random.poisson(KEY, -1), ValueError,
     "poisson: `lam` must be finite and at least 0, got -1"),
    (lambda: random.poisson(KEY, 1.0, dtype=torch.float32), TypeError,
     "poisson: `dtype` expected int64, int32, int16, int8 or uint8, got torch.float32"),
    (lambda: random.binomial(KEY, -1, 0.5), ValueError,
     "binomial: `n` must be finite and at least 0, got -1"),
    (lambda: random.binomial(KEY, 3, 1.5), ValueError,
     "binomial: `p` is a probability and must be in [0, 1], got 1.5"),
    (lambda: random.binomial(KEY, 3, KEY), TypeError, "binomial: `p` expected float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[c[2][:60] for c in CASES])
def test_what_cannot_be_drawn(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_the_error_comes_while_tracing_too():
    with pytest.raises(Exception, match="`p` is a probability"):
        torch.compile(lambda k: random.bernoulli(k, 2.0), backend="eager")(KEY)
    with pytest.raises(ValueError, match=re.escape("got a tensor, int64 of shape (2, 2)")):
        torch.vmap(random.bits)(random.split(KEY, 4).reshape(2, 2, 2))
