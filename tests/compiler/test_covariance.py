"""Covariances and correlations in a traced function equal torch's; so do their errors."""

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

from fdl import jit
from tests.compiler.test_dynamic_index import traced
from tests.support.asserts import draw

X = draw(0, 3, 6).double()
TIMES = torch.tensor([1, 2, 0, 3, 1, 1])
WEIGHTS = draw(1, 6).double().abs()


def square(f):
    return lambda x: (f(x) ** 2).sum()


CASES = {
    "variables": torch.cov,
    "one variable": lambda x: torch.cov(x[0]),
    "one number": lambda x: torch.cov(x[0, 0]),
    "one observation": lambda x: torch.cov(x[:, :1]),
    "no observation": lambda x: torch.cov(x[:, :0]),
    "correction 0": lambda x: torch.cov(x, correction=0),
    "correction 9": lambda x: torch.cov(x, correction=9),
    "fweights": lambda x: x.cov(fweights=TIMES),
    "aweights": lambda x: torch.cov(x, aweights=WEIGHTS),
    "float32 weights": lambda x: torch.cov(x, aweights=WEIGHTS.float()),
    "both": lambda x: torch.cov(x, fweights=TIMES, aweights=WEIGHTS, correction=2),
    "both, correction 0": lambda x: torch.cov(x, fweights=TIMES, aweights=WEIGHTS, correction=0),
    "whole numbers": lambda x: torch.cov((10 * x).long()),
    "bfloat16": lambda x: torch.cov(x.bfloat16()),
    "complex": lambda x: torch.cov(torch.complex(x, x.flip(1))),
    "correlations": torch.corrcoef,
    "correlations, method": lambda x: x.corrcoef(),
    "correlations of one": lambda x: torch.corrcoef(x[0]),
    "correlations of a constant": lambda x: torch.corrcoef(torch.cat([x, 0 * x[:1] + 1])),
    "complex correlations": lambda x: torch.corrcoef(torch.complex(x, x.flip(1))),
    "vmap": lambda x: vmap(torch.cov)(x.reshape(3, 2, 3)),
    "gradient": grad(square(torch.cov)),
    "gradient of correlations": grad(square(torch.corrcoef)),
    "jvp": lambda x: jvp(torch.corrcoef, (x,), (x**2,))[1],
    "Hessian": hessian(square(torch.corrcoef)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:cov")  # degrees of freedom <= 0
def test_traced_equals_torch(name):
    torch.testing.assert_close(
        traced(CASES[name])(X), CASES[name](X), rtol=1e-12, atol=1e-14, equal_nan=True
    )


ERRORS = {
    "bool": lambda x: torch.cov(x > 0),
    "three axes": lambda x: torch.corrcoef(x[None]),
    "too few weights": lambda x: torch.cov(x, fweights=TIMES[:2]),
    "float fweights": lambda x: torch.cov(x, fweights=WEIGHTS),
    "integer aweights": lambda x: torch.cov(x, aweights=TIMES),
    "negative fweights": lambda x: torch.cov(x, fweights=-TIMES),
    "negative aweights": lambda x: torch.cov(x, aweights=WEIGHTS - 5),
    "no weight": lambda x: torch.cov(x, fweights=0 * TIMES),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_torch(name):
    with pytest.raises(RuntimeError) as theirs:
        ERRORS[name](X)
    with pytest.raises(RuntimeError, match=r"cov|corrcoef") as ours:
        traced(ERRORS[name])(X)
    assert type(ours.value) is type(theirs.value)


def test_compiled():
    f = jit(grad(square(torch.corrcoef)))
    torch.testing.assert_close(f(X), grad(square(torch.corrcoef))(X), rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="negative"):
        jit(lambda x, w: torch.cov(x, aweights=w))(X, -WEIGHTS)
