"""Whatever tree is saved comes back: structure, order, types, ties and every bit."""

import importlib
import itertools
import pkgutil
import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import fdl
from fdl import data, metrics, nn, optim, random, tree
from fdl.io._safetensors import DTYPES
from fdl.io._schema import KINDS
from tests.support.asserts import equal_bits

CASES = 1000


@st.composite
def tensors(draw) -> Tensor:
    """Any dtype, any bits (payloads of NaN, -0.0, denormals), 0-d, empty, or a view of another."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    packed = dtype == torch.float4_e2m1fn_x2
    shape = draw(st.lists(st.integers(0, 3), min_size=packed, max_size=3))
    count = torch.Size(shape).numel() * dtype.itemsize
    content = bytearray(draw(st.binary(min_size=count, max_size=count)))
    x = torch.tensor(list(content), dtype=torch.uint8)
    if dtype == torch.bool:
        x %= 2
    x = x.view(dtype).reshape(shape)
    if dtype.is_floating_point and not packed and dtype.itemsize > 1 and x.numel():
        special = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0]
        x.reshape(-1)[0] = draw(st.sampled_from(special))
    views = [
        lambda x: x,
        lambda x: x.T if x.ndim == 2 else x,
        lambda x: x[:1].expand(2, *x.shape[1:]) if x.ndim and len(x) else x,
        lambda x: x[1:],
        lambda x: x[..., ::2],
        lambda x: x.conj(),
    ]
    view = draw(st.sampled_from(views))
    return x if packed or not x.ndim else view(x)


python_leaves = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3)
)
names = st.text(max_size=4).filter(
    lambda name: name and "." not in name and name.isprintable() and name != "__metadata__"
)


@st.composite
def nested(draw) -> Any:
    """Up to five containers in each other, with few tensors, so that many are tied."""
    pool = draw(st.lists(tensors(), min_size=1, max_size=3))
    views = [lambda x: x, lambda x: x[...], lambda x: x[1:] if x.ndim else x]
    room = 30

    def build(depth: int, least: int) -> Any:
        nonlocal room
        room -= 1
        if depth == 0 or room < 0:
            if draw(st.integers(0, 2)) == 0:
                return draw(python_leaves)
            return draw(st.sampled_from(views))(draw(st.sampled_from(pool)))
        kind = draw(st.sampled_from([dict, list, tuple, metrics.Mean, OrderedDict]))
        size = 2 if kind is metrics.Mean else draw(st.integers(least, 3))
        # The first child goes all the way down, the others anywhere.
        depths = [depth - 1, *(draw(st.integers(0, depth - 1)) for _ in range(size - 1))][:size]
        children = [build(below, least) for below in depths]
        if kind in (dict, OrderedDict):
            keys = draw(st.lists(names, min_size=size, max_size=size, unique=True))
            return kind(zip(keys, children, strict=True))
        return kind(*children) if kind is metrics.Mean else kind(children)

    return build(draw(st.integers(0, 5)), draw(st.integers(0, 1)))


def plain(x: Tensor) -> Tensor:
    x = x.detach().resolve_conj()
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)


def assert_identical(a: Any, b: Any) -> None:
    assert type(a) is type(b) or isinstance(a, Tensor)
    if isinstance(a, Tensor):
        assert equal_bits(plain(a), plain(b))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            assert_identical(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    elif isinstance(a, float):
        assert struct.pack(">d", a) == struct.pack(">d", b)
    else:
        assert a == b


def same_view(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors cannot be told apart by writing to one."""
    return x is y or (
        x.numel() > 0
        and x.data_ptr() == y.data_ptr()
        and (x.dtype, x.shape, x.stride(), x.is_conj())
        == (y.dtype, y.shape, y.stride(), y.is_conj())
    )


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=nested())
def test_any_tree_comes_back_as_it_was(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    fdl.io.save(path, tree)
    loaded = fdl.io.load(path)
    assert_identical(tree, loaded)
    assert_identical(tree, fdl.io.load(path, like=tree))
    before, after = (
        [x for x in pytree.tree_leaves(one) if isinstance(x, Tensor)] for one in (tree, loaded)
    )
    for (x, p), (y, q) in itertools.combinations(zip(before, after, strict=True), 2):
        assert (p is q) == same_view(x, y)
        assert p is q or not p.numel() or p.data_ptr() != q.data_ptr()
    assert all(x.is_contiguous() and x._base is None for x in after)
    # Another reader sees the same bytes under the dotted names.
    flat = fdl.tree.flatten_dict(tree)
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert equal_bits(file.get_tensor(name), plain(flat[name]))


STATES = {
    "sgd": lambda: optim.sgd(0.1, momentum=0.9),
    "schedule": lambda: optim.adamw(optim.schedules.step(0.1, 3)),
    "lbfgs": lambda: optim.lbfgs(),
    "lookahead": lambda: optim.lookahead(optim.adam()),
    "schedule-free": lambda: optim.schedule_free_adamw(),
    "accumulate": lambda: optim.accumulate(optim.sgd(0.1), 2),
    "plateau": lambda: optim.reduce_on_plateau(optim.sgd(0.1)),
    "noise": lambda: optim.chain(optim.add_noise(random.key(1), 0.1), optim.sgd(0.1)),
    "finite": lambda: optim.apply_if_finite(optim.sgd(0.1)),
    "loss-scale": lambda: optim.loss_scale(optim.sgd(0.1)),
}


@pytest.mark.parametrize("opt", STATES.values(), ids=STATES)
def test_a_whole_training_state_comes_back_from_the_file_alone(opt, tmp_path):
    model = nn.sequential(nn.linear(3, 4), nn.relu, nn.linear(4, 2))
    state = fdl.TrainState.create(model, opt(), key=random.key(0))
    fdl.io.save(tmp_path / "s", state)
    assert_identical(state, fdl.io.load(tmp_path / "s"))
    assert_identical(state, fdl.io.load(tmp_path / "s", like=tree.to(state, "meta")))


def test_every_record_that_can_stand_in_a_tree_has_a_name():
    """A NamedTuple of fdl is registered, unless it is made of functions or stays inside."""
    for made in [metrics.Mean, data.Batch, data.Dataset, data.Indices, fdl.TrainState]:
        assert KINDS[f"fdl.{made.__name__}"] is made
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.iter_modules(optim.__path__, "fdl.optim.")
    ]
    states = {
        kind
        for module in modules
        for name, kind in vars(module).items()
        if hasattr(kind, "_fields") and (name.endswith("State") or name == "Hyper")
    }
    assert len(states) >= 9 and states <= set(KINDS.values())


class Pair(NamedTuple):
    left: Any
    right: Any


def test_a_record_of_the_user_comes_back_with_like(tmp_path):
    path, pair = tmp_path / "p", {"x": Pair(torch.ones(2), 3)}
    fdl.io.save(path, pair)
    with pytest.raises(ValueError, match=r"'x' is a NamedTuple '.*test_schema.Pair'.* pass like="):
        fdl.io.load(path)
    assert_identical(pair, fdl.io.load(path, like={"x": Pair(torch.empty(2, device="meta"), 0)}))
    assert fdl.io.inspect(path).leaves["x.right"] == 3
    assert torch.equal(fdl.io.inspect(path).read("x.left"), torch.ones(2))


def test_a_lazy_conjugate_is_no_tie(tmp_path):
    x = torch.tensor([1 + 2j], dtype=torch.complex64)
    fdl.io.save(tmp_path / "c", {"x": x, "conjugate": x.conj(), "negative": x.conj().imag})
    loaded = fdl.io.load(tmp_path / "c")
    assert loaded["x"].item() == 1 + 2j and loaded["conjugate"].item() == 1 - 2j
    assert loaded["negative"].item() == -2.0
