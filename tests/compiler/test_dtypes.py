"""A jitted function accepts the dtypes that eager torch accepts. Oracle: eager torch."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import jit, scan
from fdl._compiler import _dtypes

F32, F64 = torch.float32, torch.float64
DTYPES = (F32, F64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def some(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(shape).to(dtype)


# (function of two dtypes' tensors, shapes)
OPERATIONS: dict[str, tuple[Callable[..., object], list[tuple[int, ...]]]] = {
    "matmul": (torch.matmul, [(3, 4), (4, 5)]),
    "vector": (torch.matmul, [(3, 4), (4,)]),
    "dot": (torch.dot, [(4,), (4,)]),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "linear": (F.linear, [(3, 4), (5, 4)]),
    "bias": (lambda x, b: F.linear(x, torch.ones(5, 4, dtype=x.dtype), b), [(3, 4), (5,)]),
    "conv": (F.conv2d, [(1, 1, 5, 5), (1, 1, 3, 3)]),
    "layer norm": (lambda x, w: F.layer_norm(x, (4,), w), [(3, 4), (4,)]),
    "batch norm": (lambda x, w: F.batch_norm(x, w, w), [(3, 4), (4,)]),
    "softmax": (lambda x, _: torch.softmax(x, 0), [(3,), (1,)]),
    "gelu": (lambda x, _: F.gelu(x), [(3,), (1,)]),
    "std": (lambda x, _: x.std(), [(3,), (1,)]),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.5), [(3,), (3,)]),
    "cross entropy": (lambda x, y: F.cross_entropy(x, y), [(3, 2), (3,)]),
    "mse": (F.mse_loss, [(3,), (3,)]),
    "add": (torch.add, [(3,), (3,)]),
    "subtract": (torch.sub, [(3,), (3,)]),
    "divide": (torch.div, [(3,), (3,)]),
    "shift": (torch.bitwise_left_shift, [(3,), (3,)]),
    "in place": (lambda x, y: x.clone().add_(y), [(3,), (3,)]),
    "index": (lambda x, i: x[i], [(3,), (2,)]),
    "index add": (lambda x, y: x.index_add(0, torch.tensor([0, 1]), y), [(3,), (2,)]),
    "scatter": (lambda x, y: x.scatter(0, torch.tensor([0, 1]), y), [(3,), (2,)]),
    "gather": (lambda x, i: x.gather(0, i), [(3,), (2,)]),
    "embedding": (lambda w, i: F.embedding(i, w), [(3, 2), (2,)]),
    "where": (lambda x, c: torch.where(c, x, x), [(3,), (3,)]),
    "cat": (lambda x, y: torch.cat([x, y]), [(3,), (3,)]),
}


def raises(fn: Callable[..., object], args: list[Tensor]) -> BaseException | None:
    try:
        fn(*args)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return error
    return None


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore:.*uint8")
def test_dtypes_are_refused_as_by_eager_torch(name: str, plain_backend: None) -> None:
    fn, shapes = OPERATIONS[name]
    refused = 0
    for dtypes in product(DTYPES, DTYPES):
        if name == "index" and dtypes[1] in (torch.bool, torch.uint8):
            continue  # a mask: its number of results depends on values
        if name == "where" and dtypes[1] == torch.uint8:
            continue  # deprecated
        args = [some(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        eager = raises(fn, args)
        compiled = raises(jit(fn), args)
        assert (eager is None) == (compiled is None), (dtypes, eager, compiled)
        refused += eager is not None
    if name not in ("add", "cat", "divide"):
        assert refused


@pytest.mark.parametrize("fn", [F.linear, lambda x, w: scan(lambda c, x: (c, w @ x), w, x)[1]])
def test_the_error_is_that_of_eager_torch(fn: Callable[..., object], plain_backend: None) -> None:
    args = torch.ones(3, 4, dtype=torch.uint8), torch.ones(5, 4)
    with pytest.raises(RuntimeError) as eager:
        fn(*args)
    for _ in range(2):
        with pytest.raises(RuntimeError) as compiled:
            jit(fn)(*args)
        assert str(compiled.value) == str(eager.value)


def test_operations_are_tried_once(plain_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dtypes, "_accepted", set())
    tried: list[torch.dtype] = []
    example = _dtypes._example
    monkeypatch.setattr(_dtypes, "_example", lambda x: tried.append(x.dtype) or example(x))
    for n in (3, 4):
        jit(lambda x: (x + 1) * 2)(torch.arange(n))
    assert len(tried) == 2  # one for each operation
    tried.clear()
    jit(lambda x: x.tanh() @ x)(torch.ones(3, 3))  # of one floating dtype
    jit(lambda x: x << 1)(torch.arange(_dtypes.LARGEST + 1))
    jit(lambda x: x << 1)(torch.arange(0, dtype=torch.int16))
    assert tried == []
