"""Traced graphs in primitives: the same values, and one decomposition for equal operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from fdl._compiler import _decompose
from fdl._compiler._decompose import decompose
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace

X = torch.linspace(-2, 2, 24, dtype=torch.float64).view(4, 6)
Y = X.cos()


def image(x: Tensor) -> Tensor:
    return x.view(2, 1, 3, 4)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "an argument twice, then two": lambda x, y: (
        F.mse_loss(x, x),
        F.mse_loss(x, y),
        x.addcmul(x, y),
    ),
    "two arguments, then one twice": lambda x, y: (torch.addcmul(y, x, y), torch.addcmul(x, x, x)),
    "several results": lambda x, y: torch.var_mean(x, 1, correction=0),
    "one of several results": lambda x, y: torch.var_mean(x, 1)[1],
    "several of one value": lambda x, y: (F.silu(x), F.silu(x) + y),
    "layer norm": lambda x, y: F.layer_norm(x, (6,), y[0], y[1]),
    "its gradient": grad(lambda x, y: (F.layer_norm(x, (6,), y[0], y[1]) * y).sum()),
    "group norm": lambda x, y: F.group_norm(x, 3, y[0], y[1]),
    "batch norm": grad(lambda x, y: (F.batch_norm(x, None, None, training=True) * y).sum()),
    "pooling": grad(lambda x, y: F.max_pool2d(image(x), 2).square().sum()),
    "cross entropy": grad(lambda x, y: F.cross_entropy(x, torch.arange(4), label_smoothing=0.1)),
    "a transposed argument": lambda x, y: F.gelu(x.mT) + F.gelu(y.mT),
    "a conjugate": lambda x, y: torch.dot(torch.complex(x, y)[0].conj(), torch.complex(y, x)[0]),
    "another dtype": lambda x, y: (F.silu(x.float()), F.silu(x)),
    "another number": lambda x, y: (
        F.softplus(x, 1.0),
        F.softplus(x, 2.0),
        F.elu(x, 1),
        F.elu(x, 1.5),
    ),
    "written to": lambda x, y: x.clone().sqrt_().addcmul_(x, y),
    "a loop": lambda x, y: _loop(x, y),
}


def _loop(x: Tensor, y: Tensor) -> Any:
    from fdl import scan

    return scan(lambda c, z: (F.silu(c) + F.softplus(z), F.layer_norm(c, (6,))), x[0], y)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_computes_the_same(name: str, real_loops: None) -> None:
    leaves, spec = flatten(((X, Y), {}))
    traced = trace(FUNCTIONS[name], leaves, spec)
    expected, _ = flatten(FUNCTIONS[name](X, Y))
    found = decompose(traced).graph(*leaves, *traced.constants)
    torch.testing.assert_close(list(found), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert [x.stride() for x in traced.results] == [x.stride() for x in expected]


def test_equal_layers_are_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    trace_operation = _decompose._trace_operation
    monkeypatch.setattr(
        _decompose, "_trace_operation", lambda *z: times.append(z[0].target) or trace_operation(*z)
    )

    def layers(x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = F.gelu(F.layer_norm(x, (6,)))
        return x

    counts = []
    for n in (1, 5):
        times.clear()
        leaves, spec = flatten(((X,), {}))
        decompose(trace(lambda x, n=n: layers(x, n), leaves, spec))
        counts.append(len(times))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_primitives_stay_as_they_are(name: str, real_loops: None) -> None:
    leaves, spec = flatten(((X, Y), {}))
    traced = decompose(trace(FUNCTIONS[name], leaves, spec))
    before = str(traced.graph.graph)
    assert str(decompose(traced).graph.graph) == before
