"""The same draws eagerly, batched, compiled, in a loop, and all together."""

import pytest
import torch
from torch.func import vmap

from fdl import jit, random, scan

COV = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
LAM = torch.tensor([0.0, 2.0, 9.0, 11.0, 300.0])
A = torch.tensor([0.1, 1.0, 7.0])

INVERTED = {
    "exponential": lambda k: random.exponential(k, (40,)),
    "gumbel": lambda k: (random.gumbel(k, (40,)), random.gumbel(k, (40,), mode="high")),
    "laplace": lambda k: random.laplace(k, (40,)),
    "logistic": lambda k: random.logistic(k, (40,), torch.float64),
    "cauchy": lambda k: random.cauchy(k, (40,)),
    "rademacher": lambda k: random.rademacher(k, (40,), torch.int8),
    "bits": lambda k: [
        random.bits(k, (9,), d).to(torch.int64)
        for d in (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    ],
    "choice": lambda k: [
        random.choice(k, A, (9,)),
        random.choice(k, A, (2,), replace=False),
        random.choice(k, 3, (9,), p=A),
        random.choice(k, 3, (2,), replace=False, p=A),
    ],
    "orthogonal": lambda k: random.orthogonal(k, 3),
    "multivariate_normal": lambda k: [
        random.multivariate_normal(k, torch.zeros(2), COV, (7,), method=method)
        for method in ("cholesky", "eigh", "svd")
    ],
}
LOOPS = {
    "gamma": lambda k: random.gamma(k, A, (15, 3)),
    "beta": lambda k: random.beta(k, A, A.flip(0), (15, 3)),
    "dirichlet": lambda k: random.dirichlet(k, A, (15,)),
    "t": lambda k: random.t(k, A, (15, 3)),
    "ball": lambda k: random.ball(k, 3, 2, (15,)),
    "poisson": lambda k: random.poisson(k, LAM, (15, 5)),
    "binomial": lambda k: random.binomial(k, LAM, 0.4, (15, 5)),
}
DRAWS = INVERTED | LOOPS
KEYS = random.split(random.key(91), 3)
each = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def rows(draw):
    return [draw(key) for key in KEYS]


def assert_rows(batch, expected, rtol=0.0, atol=0.0):
    leaves = lambda tree: tree if isinstance(tree, list | tuple) else [tree]  # noqa: E731
    for i, row in enumerate(expected):
        for got, value in zip(leaves(batch), leaves(row), strict=True):
            torch.testing.assert_close(got[i], value, rtol=rtol, atol=atol)


@each
def test_batched_draws_are_those_one_by_one(draw):
    assert_rows(vmap(draw, randomness="error")(KEYS), rows(draw), rtol=2e-6, atol=1e-6)


@each
def test_traced_draws_are_those_of_eager_torch(draw, plain_backend):
    expected = rows(draw)
    assert_rows(jit(vmap(draw))(KEYS), expected, rtol=2e-6, atol=1e-6)
    looped = jit(lambda keys: scan(lambda c, k: (c, draw(k)), (), keys)[1])
    assert_rows(looped(KEYS), expected, rtol=2e-6, atol=1e-6)


def test_a_loop_of_draws_eagerly():
    for draw in LOOPS.values():
        assert_rows(scan(lambda c, k, f=draw: (c, f(k)), (), KEYS)[1], rows(draw), 2e-6, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gumbel", "multivariate_normal", "gamma", "poisson"])
def test_one_program_has_the_draws_of_eager_torch(name):
    draw = DRAWS[name]
    compiled = jit(lambda keys: scan(lambda c, k: (c, draw(k)), (), keys)[1])
    assert_rows(compiled(KEYS), rows(draw), rtol=1e-4, atol=2e-5)
    assert [(r.route, r.fallbacks) for r in compiled.report()] == [("one program", ())]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gamma", "poisson"])
def test_torch_compile_has_the_draws_of_eager_torch(name):
    draw = LOOPS[name]
    f = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert_rows([f(KEYS[0])[None]], [draw(KEYS[0])], rtol=2e-6, atol=1e-6)
