"""Side effects of a traced function raise at the first call, and name the line of user code."""

import functools
import itertools
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from fdl import interop, jit, nn, random, scan, tree
from fdl._compiler._purity import check_draw
from fdl._compiler._user_lines import is_user_code

pytestmark = pytest.mark.usefixtures("plain_backend", "real_loops")

X = torch.linspace(0.1, 0.9, 6).view(2, 3)

# ------------------------------------------------------------------------------------ random draws

SEEDED = [
    getattr(packet, overload)
    for name in dir(torch.ops.aten)
    if hasattr(packet := getattr(torch.ops.aten, name), "overloads")
    for overload in packet.overloads()
    if torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
]
ON = {"train": True, "training": True, "dropout": 0.5, "dropout_p": 0.5}


def test_every_seeded_operation_of_torch_is_refused() -> None:
    assert len(SEEDED) > 90
    for func in SEEDED:
        switches = {a.name for a in func._schema.arguments} & ON.keys()
        with pytest.raises(ValueError, match=r"draws from torch's generator, at test_purity\.py"):
            check_draw(func, (), {name: ON[name] for name in switches})
        for name in switches:
            check_draw(func, (), {name: type(ON[name])(0)})


LSTM = torch.nn.LSTM(3, 3, num_layers=2, dropout=0.5).requires_grad_(False)
DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "rand": lambda x: x + torch.rand(2, 3),
    "rand with a generator": lambda x: x + torch.rand(2, 3, generator=torch.Generator()),
    "rand_like": lambda x: x + torch.rand_like(x),
    "randn": lambda x: x + torch.randn(3),
    "randn_like": lambda x: x + torch.randn_like(x),
    "randint": lambda x: x + torch.randint(0, 5, size=(3,)),
    "randint_like": lambda x: x + torch.randint_like(x, 5),
    "randperm": lambda x: x[:, torch.randperm(3)],
    "normal": lambda x: x + torch.normal(0.0, 1.0, (3,)),
    "normal of tensors": lambda x: torch.normal(x, x),
    "bernoulli": lambda x: x * torch.bernoulli(x),
    "multinomial": lambda x: x * torch.multinomial(x, 2).sum(),
    "poisson": lambda x: x * torch.poisson(x),
    "bernoulli_": lambda x: x * torch.empty(3).bernoulli_(0.5),
    "uniform_": lambda x: x * torch.empty(3).uniform_(),
    "normal_": lambda x: x * torch.empty(3).normal_(),
    "exponential_": lambda x: x * torch.empty(3).exponential_(),
    "geometric_": lambda x: x * torch.empty(3).geometric_(0.5),
    "cauchy_": lambda x: x * torch.empty(3).cauchy_(),
    "log_normal_": lambda x: x * torch.empty(3).log_normal_(),
    "random_": lambda x: x * torch.empty(3).random_(5),
    "dropout": lambda x: F.dropout(x),
    "dropout in place": lambda x: F.dropout(x * 1, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x),
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=True),
    "rrelu": lambda x: F.rrelu(x - 1, training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x.view(1, 1, 2, 3), 1, (1, 2)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
    "module": lambda x: torch.nn.Dropout()(x),
    "lstm": lambda x: LSTM(x[None])[0],
    "initializer": lambda x: torch.nn.init.normal_(torch.empty(3)) * x,
    "new layer": lambda x: torch.nn.Linear(3, 3).requires_grad_(False)(x),
    "distribution": lambda x: torch.distributions.Gamma(x, x, validate_args=False).sample(),
    "rsample": lambda x: torch.distributions.Normal(x, x, validate_args=False).rsample(),
}


@pytest.mark.parametrize(
    "fn, expected",
    [
        (lambda: 0, True),
        (pytest.raises, True),
        (nn.linear, False),
        (check_draw, False),
        (F.dropout, False),
        (functools.wraps, False),
    ],
)
def test_user_code_is_neither_fdl_nor_torch_nor_the_standard_library(
    fn: Callable[..., Any], expected: bool
) -> None:
    assert is_user_code(fn.__code__) is expected


@pytest.mark.parametrize("name", DRAWS)
def test_what_moves_the_generator_is_refused(name: str) -> None:
    fn = DRAWS[name]
    if "generator" not in name:
        before = torch.get_rng_state()
        fn(X)
        assert not torch.equal(before, torch.get_rng_state())
    match = (
        r"draws from torch's generator, at test_purity\.py:\d+: .*comes? from a key.*fdl\.random"
    )
    for way in (
        fn,
        lambda x: grad(lambda x: fn(x).float().sum())(x),
        lambda x: scan(lambda c, x: (c, fn(x)), x, torch.stack([x] * 20)),
        lambda x: vmap(fn, randomness="different")(x[None]),
    ):
        before = torch.get_rng_state()
        with pytest.raises((ValueError, RuntimeError)):  # some stop earlier under grad and vmap
            jit(way)(X)
        assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match=match):
        jit(fn)(X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: F.dropout(x, training=False),
        lambda x: F.rrelu(x),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
        lambda x: torch.nn.Dropout().eval()(x),
        lambda x: nn.dropout(0.5).apply({}, x, train=True, key=random.key(0)),
        lambda x: interop.from_module(torch.nn.Dropout())[0].apply(
            {}, x, train=True, key=random.key(0)
        ),
    ],
    ids=["dropout", "rrelu", "attention", "module", "nn.dropout", "from_module"],
)
def test_what_draws_nothing_or_from_a_key_is_not(fn: Callable[[Tensor], Tensor]) -> None:
    before = torch.get_rng_state()
    torch.testing.assert_close(jit(fn)(X), fn(X))
    with torch.inference_mode():  # composite operations arrive there as they are
        torch.testing.assert_close(jit(fn)(X), fn(X))
    assert torch.equal(before, torch.get_rng_state())


# -------------------------------------------------------------------------- tensors that are kept

KEPT = types.SimpleNamespace(value=torch.zeros(()), log=[], table={})


class Counter:
    total: Any = 0

    def __init__(self) -> None:
        self.n = torch.zeros(())

    def update(self, x: Tensor) -> Tensor:
        self.n = self.n + x.sum()
        return x + 1

    def of_class(self, x: Tensor) -> Tensor:
        Counter.total = Counter.total + x.sum()
        return x + 1


def keeps_in_a_global(x: Tensor) -> Tensor:
    global LAST
    LAST = x * 2
    return x + 1


LAST: Any = None


def factory_of_nonlocal() -> Callable[[Tensor], Tensor]:
    last = None

    def fn(x: Tensor) -> Tensor:
        nonlocal last
        last = x * 2
        return x + 1 if last is not None else x

    return fn


@functools.cache
def table(n: int) -> Tensor:
    return torch.arange(n) * 2.0


def keeps_in_a_module(x: Tensor) -> Tensor:
    MODULE.cached = x * 2
    return MODULE(x)


MODULE = torch.nn.Linear(3, 3).requires_grad_(False)


def keeps_an_attribute_of_itself(x: Tensor) -> Tensor:
    keeps_an_attribute_of_itself.last = x * 2  # type: ignore[attr-defined]
    return x + 1


EFFECTS: dict[str, tuple[Callable[[], Callable[[Tensor], Any]], str]] = {
    "append": (lambda: lambda x: (KEPT.log.append(x * 2), x + 1)[1], r"KEPT\.log\.\d"),
    "append the argument": (lambda: lambda x: (KEPT.log.append(x), x + 1)[1], r"KEPT\.log\.\d"),
    "entry": (lambda: lambda x: (KEPT.table.update(a={"b": x * 2}), x)[1], r"KEPT\.table\.a\.b"),
    "attribute": (lambda: lambda x: (setattr(KEPT, "value", x * 2), x)[1], r"KEPT\.value"),
    "method": (lambda: Counter().update, r"self\.n"),
    "class attribute": (lambda: Counter().of_class, r"total"),
    "global": (lambda: keeps_in_a_global, "LAST"),
    "nonlocal": (factory_of_nonlocal, "last"),
    "cache": (lambda: lambda x: x + table(3), r"float32\[3\], made by mul"),
    "module": (lambda: keeps_in_a_module, r"MODULE\.cached"),
    "function": (lambda: keeps_an_attribute_of_itself, r"keeps_an_attribute_of_itself\.last"),
    "set": (lambda: lambda x: (KEPT_SET.add(x * 2), x)[1], r"float32\[2, 3\], made by mul"),
    "inside grad": (
        lambda: grad(lambda x: (KEPT.log.append(x * 2), x.sum())[1]),
        r"KEPT\.log\.\d",
    ),
    "the gradient": (lambda: lambda x: (KEPT.log.append(grad(torch.sum)(x)), x)[1], "KEPT"),
    "inside vmap": (lambda: vmap(lambda x: (KEPT.log.append(x * 2), x)[1]), r"KEPT\.log\.\d"),
    "in a scan": (
        lambda: lambda x: scan(lambda c, z: (c + z, KEPT.log.append(c * 2)), x[0], x),
        r"scan: the body keeps .*KEPT\.log\.\d",
    ),
    "the carry of a scan": (
        lambda: lambda x: scan(lambda c, z: (c + z, KEPT.log.append(c)), x[0], x),
        r"scan: the body keeps .*KEPT\.log\.\d",
    ),
    "used after a scan": (
        lambda: lambda x: (scan(lambda c, z: (c + z, KEPT.log.append(c)), x[0], x), KEPT.log[-1]),
        r"scan: the body keeps .*KEPT\.log\.\d",
    ),
}
KEPT_SET: set[Tensor] = set()


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFECTS)
def test_a_tensor_that_is_kept_is_named(name: str) -> None:
    make, match = EFFECTS[name]
    KEPT.log.clear(), KEPT.table.clear(), KEPT_SET.clear(), table.cache_clear()
    with pytest.raises(
        ValueError, match=r"keeps a tensor after .*(at test_purity\.py:\d+|an argument)"
    ) as error:
        jit(make())(X)
    assert re.search(match, str(error.value))
    KEPT.log.clear(), KEPT.table.clear(), KEPT_SET.clear(), table.cache_clear()


def test_what_is_kept_for_the_call_only_or_is_not_a_tensor_passes() -> None:
    shapes: list[Any] = []
    counts = itertools.count()

    def fn(x: Tensor) -> Any:
        inner: dict[str, Any] = {}
        inner["self"], inner["x"] = inner, x * 2  # a cycle, which only the collector frees
        shapes.append((tuple(x.shape), next(counts)))
        return scan(lambda c, z: (c + z, [c][0]), inner["x"][0], x)

    assert tree.diff(fn(X), jit(fn)(X)) == []
    assert [shape for shape, _ in shapes] == [(2, 3)] * 2


# -------------------------------------------------------------------------------------- arguments


def train(params: dict[str, Any], batch: Any, *, lr: Any = None, rest: Any = None) -> Any:
    return params["w"] * batch


NOT_TENSORS: dict[str, Any] = {
    "1": 1,
    "0.1": 0.1,
    "True": True,
    "2j": 2j,
    "'adam'": "adam",
    r"float32\[2\] of numpy": np.full(2, 3.25, np.float32),
    r"float64\[\] of numpy": np.float64(3.25),
}


@pytest.mark.parametrize("shown", NOT_TENSORS)
def test_an_argument_that_is_not_a_tensor_is_named(shown: str) -> None:
    value, jitted = NOT_TENSORS[shown], jit(train)
    for args, kwargs, path in (
        (({"w": value}, X), {}, r"params\.w"),
        (({"w": X}, value), {}, "batch"),
        (({"w": X}, X), {"lr": value}, "lr"),
        (({"w": X}, X), {"rest": [X, {"a": value}]}, r"rest\.1\.a"),
    ):
        with pytest.raises(TypeError, match=f"argument must be a tensor.*\n  {path}: {shown}") as e:
            jitted(*args, **kwargs)
        assert "3.25" not in str(e.value)


def test_none_is_a_tree_without_leaves() -> None:
    jitted = jit(lambda x, mask: (x if mask is None else x * mask, None))
    assert torch.equal(jitted(X, None)[0], X) and jitted(X, None)[1] is None
    assert torch.equal(jitted(X, X)[0], X * X)
    assert [r.why for r in jitted.report()][1:] == ["the arguments have another structure"]


# ------------------------------------------------------------------------------------------ values


def asks(x: Tensor) -> Tensor:
    if x.sum() > 0:  # the line to name
        return x
    return -x


ASKED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "if": (asks, r"_local_scalar_dense at test_purity\.py:\d+: if x\.sum\(\) > 0:"),
    "item": (lambda x: x * x[0, 0].item(), "_local_scalar_dense"),
    "bincount": (lambda x: torch.bincount(x[0].long()), "bincount"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "in grad": (grad(lambda x: asks(x).sum()), r"if x\.sum\(\) > 0:"),
    "in a scan": (lambda x: scan(lambda c, z: (asks(c), z), x[0], x), r"if x\.sum\(\) > 0:"),
    "one_hot": (
        grad(lambda x: (F.one_hot(x.argmax(-1)) * x).sum()),
        r"_local_scalar_dense at test_purity\.py",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_question_for_a_value_names_the_operation_and_the_line(name: str) -> None:
    fn, match = ASKED[name]
    with pytest.raises(RuntimeError, match=rf"asks for the value .*by aten\.{match}|{match}"):
        jit(fn)(X)
