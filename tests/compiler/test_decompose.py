"""Traced graphs in primitives: the same values, and one decomposition for equal operations."""

import re
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad

from fdl._compiler import _decompose
from fdl._compiler._decompose import decompose
from fdl._compiler._decompositions import UNKNOWN, decompositions
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace
from tests.support.programs import turn

aten = torch.ops.aten

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
    "layer norm of numbers": grad(lambda x, y: (F.layer_norm(x, (6,)) * y).sum()),
    "its weight": grad(lambda x, y: (F.layer_norm(y, (6,), x[0]) * y).sum()),
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
    for x, y in zip(found, expected, strict=True):
        # The last digit of torch's float32 kernels differs between processors.
        close = 1e-6 if y.dtype is torch.float32 else 1e-12
        torch.testing.assert_close(x, y, rtol=close, atol=close, equal_nan=True)
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


def operations_of_torch() -> list[Any]:
    """A tenth of the operations that torch tests, another one for each state of the library."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db[turn() % 10 :: 10] if torch.float64 in op.dtypes]


def tensor_function(op: Any, sample: Any) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """Write an operation as a function of its tensors, and list these."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def fn(*tensors: Tensor) -> list[Tensor]:
        values = dict(zip(places, tensors, strict=True))
        x, args, kwargs = pytree.tree_unflatten(
            [values.get(i, leaf) for i, leaf in enumerate(leaves)], spec
        )
        results = pytree.tree_leaves(op.op(x, *args, **kwargs))
        return [z for z in results if isinstance(z, Tensor)]

    return fn, [leaves[i] for i in places]


def gradient(fn: Callable[..., list[Tensor]], tensors: list[Tensor]) -> Callable[..., Any]:
    smooth = tuple(i for i, x in enumerate(tensors) if x.is_floating_point())

    def total(*tensors: Tensor) -> Tensor:
        return sum((z * z.detach().cos()).sum() for z in fn(*tensors) if z.is_floating_point())

    return lambda *tensors: list(grad(total, argnums=smooth)(*tensors))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_operations_of_torch_and_their_gradients() -> None:
    """Against the graph before, which eager torch runs."""
    compared = 0
    for op in operations_of_torch():
        for sample in islice(op.sample_inputs("cpu", torch.float64), 2):
            fn, tensors = tensor_function(op, sample)
            for f in (fn, gradient(fn, tensors)):
                leaves, spec = flatten((tuple(tensors), {}))
                try:
                    traced = trace(f, leaves, spec)
                    expected = traced.graph(*leaves, *traced.constants)
                except Exception:
                    continue
                got = decompose(traced).graph(*leaves, *traced.constants)
                if "empty" not in op.name:
                    close = {"rtol": 1e-6, "atol": 1e-7, "equal_nan": True}
                    torch.testing.assert_close(got, expected, **close, msg=f"{op.name}: {sample}")
                compared += 1
    assert compared > 50


# Views of sparse and nested tensors, and those that torch's derivatives use inside.
OTHER_VIEWS = re.compile("indices|values|nested|sparse|primal|dual|test|reshape")


def test_every_view_that_copies_has_a_rule() -> None:
    """Inductor's C++ wrapper cannot call them in a loop: its code would not compile."""
    from torch._inductor.lowering import lowerings

    schemas = torch._C._jit_get_all_schemas()
    names = {
        s.name[6:] for s in schemas if s.name.startswith("aten::") and s.name.endswith("_copy")
    }
    packets = [
        getattr(torch.ops.aten, name) for name in sorted(names) if hasattr(torch.ops.aten, name)
    ]
    copies = [getattr(p, o) for p in packets for o in p.overloads() if not o.endswith("out")]
    rules = decompositions().keys() | lowerings.keys()
    assert [op for op in copies if op not in rules and not OTHER_VIEWS.search(str(op))] == []


VIEWS_THAT_COPY = {
    aten.split_copy.Tensor: (4, 0),
    aten.select_copy.int: (0, 1),
    aten.slice_copy.Tensor: (1, 1, 5, 2),
    aten.detach_copy.default: (),
    aten.view_as_real_copy.default: (),
    aten.view_as_complex_copy.default: (),
    aten._conj_copy.default: (),
    aten._neg_view_copy.default: (),
}


def test_views_that_copy() -> None:
    assert VIEWS_THAT_COPY.keys() == UNKNOWN.keys() - {torch.ops.fdl.random_words.default}
    x = torch.arange(12.0).reshape(6, 2)
    for op, args in VIEWS_THAT_COPY.items():
        z = torch.view_as_complex(x) if "real" in str(op) or "conj" in str(op) else x
        leaves, spec = flatten(((z,), {}))
        traced = decompose(trace(lambda z, op=op, args=args: op(z, *args), leaves, spec))
        assert op not in {node.target for node in traced.graph.graph.nodes}
        results = pytree.tree_leaves(op(z, *args))
        for result, expected in zip(traced.graph(z), results, strict=True):
            assert torch.equal(result, expected)
