"""`jit` and `scan` equal plain Python on every route, compile once, and raise clear errors."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

import models
from fdl import (
    TrainState,
    disable_jit,
    jit,
    losses,
    optim,
    random,
    scan,
    supervised,
    train_step,
    tree,
)
from fdl._compiler import _inductor, _interpreter, _scan_traced, _trace
from fdl._compiler._decompose import decompose
from fdl._compiler._signature import flatten
from tests.support.asserts import assert_equal, close

pytestmark = pytest.mark.usefixtures("real_loops")


class Pair(NamedTuple):
    left: Any
    right: Any


# ------------------------------------------------------------------------------------ the basics


def test_jit_takes_and_returns_trees() -> None:
    def fn(pair: Pair, *, more: dict[str, Tensor]) -> dict[str, Any]:
        first, second = pair.right
        return {
            "z": Pair(pair.left["b"] + first, [more["scale"] * second]),
            "a": pair.left["a"] - pair.left["b"],
        }

    args = Pair({"b": torch.ones(3), "a": torch.arange(3.0)}, [torch.full((3,), 2.0), torch.eye(3)])
    more = {"scale": torch.tensor(0.5)}
    got, expected = jit(fn)(args, more=more), fn(args, more=more)
    assert_equal(got, expected)
    assert list(got) == ["z", "a"] and isinstance(got["z"], Pair)


def test_jit_gives_back_the_order_of_dicts_of_each_caller(
    plain_backend: None,
) -> None:
    @jit
    def fn(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return tree.map(lambda leaf: leaf * 2, params)

    one, two = {"w": torch.ones(2), "b": torch.zeros(2)}, {"b": torch.zeros(2), "w": torch.ones(2)}
    for params in (one, two, one):
        got = fn(params)
        assert list(got) == list(params)
        assert_equal(got, {"w": torch.full((2,), 2.0), "b": torch.zeros(2)})


def test_jit_keeps_name_and_docstring() -> None:
    def fn(x: Tensor) -> Tensor:
        """Do it."""
        return x

    assert jit(fn).__name__ == "fn" and jit(fn).__doc__ == "Do it."


def test_jit_inside_jit_grad_and_vmap_is_inlined(plain_backend: None, count_programs) -> None:
    inner = jit(lambda x: (x**3).sum())
    x = torch.arange(4.0)
    graphs = count_programs()
    assert_equal(jit(lambda x: inner(x) + grad(inner)(x).sum())(x), inner(x) + (3 * x**2).sum())
    assert graphs.count == 2  # the outer one, and `inner` called alone
    assert_equal(grad(inner)(x), 3 * x**2)
    assert_equal(vmap(inner)(x.view(2, 2)), (x.view(2, 2) ** 3).sum(1))
    assert graphs.count == 2


@pytest.mark.parametrize("way", ["disable_jit", "FDL_JIT"])
def test_jit_can_be_switched_off(way: str, monkeypatch: pytest.MonkeyPatch, count_programs) -> None:
    fn, graphs, seen = jit(lambda x: [seen.append(x), x + 1][1]), count_programs(), []
    if way == "FDL_JIT":
        monkeypatch.setenv("FDL_JIT", "0")
        fn(torch.ones(2))
    else:
        with disable_jit():
            fn(torch.ones(2))
    assert graphs.count == 0
    assert torch.equal(seen[0], torch.ones(2))  # a real tensor went through, none of the tracer's


@pytest.mark.parametrize(
    "fn, args, error, match",
    [
        (
            lambda x: x,
            ({"a": {"b": 1.0}},),
            TypeError,
            r"argument must be a.*\n  x\.a\.b: 1.0",
        ),
        (lambda x: x, ("sgd",), TypeError, "Not tensors:\n  x: 'sgd'"),
        (lambda x: {"n": 3}, (torch.ones(1),), TypeError, "of the result must be.*\n  n: 3"),
        (lambda x: 1 / 0, (torch.ones(1),), ZeroDivisionError, "division"),
        (lambda x: x @ x, (torch.ones(2, 3),), RuntimeError, "same reduction|shapes"),
    ],
    ids=["number", "text", "result", "raises", "shapes"],
)
def test_jit_errors(
    fn: Callable[..., Any], args: tuple[Any, ...], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        jit(fn)(*args)


def test_jit_says_that_values_are_not_known_while_tracing() -> None:
    with pytest.raises(RuntimeError, match="asks for the value of a tensor"):
        jit(lambda x: x if x.sum() > 0 else -x)(torch.ones(2))


# ------------------------------------------------------------------------------------------ scan

X = torch.arange(12.0).view(4, 3)


def several(carry: Any, x: Any) -> Any:
    """A carry of all containers with a leaf that passes through, and a nested y."""
    total = carry["total"] + x["a"] * carry["rate"]
    new = {"pair": Pair(carry["pair"].left * 0.5, [x["b"]]), "total": total, "rate": carry["rate"]}
    return new, {"sum": total.sum(), "more": (total, [x["b"] > 1])}


def inputs() -> tuple[Any, Any]:
    init = {
        "rate": torch.tensor(0.1),
        "total": torch.zeros(3),
        "pair": Pair(torch.ones(2), [torch.tensor(0.0)]),
    }
    return init, {"a": X, "b": X[:, 0]}


def by_hand(f: Callable[..., Any], carry: Any, xs: Any) -> Any:
    ys = []
    for x in tree.unstack(xs):
        carry, y = f(carry, x)
        ys.append(y)
    return carry, tree.stack(ys)


SCANS: dict[str, Callable[[Any, Any], Any]] = {
    "several": lambda init, xs: scan(several, init, xs),
    "no y": lambda init, xs: scan(lambda c, x: (c + x["b"], ()), init["total"], xs),
    "no xs": lambda init, xs: scan(lambda c, x: (c + 1, c), init["total"], (), length=3),
    "no carry": lambda init, xs: scan(lambda c, x: ((), x["a"] * 2), (), xs),
    "y is x, carry is constant": lambda init, xs: scan(lambda c, x: (c, x), init, xs),
    "scan in scan": lambda init, xs: scan(
        lambda c, x: scan(lambda d, z: (d + z, d * z), c, x["a"]), init["rate"], xs
    ),
    "closed over": lambda init, xs: scan(lambda c, x: (c + x["b"] * xs["a"][1], c), X[0], xs),
    "grad through": lambda init, xs: grad(
        lambda rate: scan(several, init | {"rate": rate}, xs)[0]["total"].sum()
    )(init["rate"]),
    "vmap through": lambda init, xs: vmap(lambda rate: scan(several, init | {"rate": rate}, xs))(
        torch.stack([init["rate"], 2 * init["rate"]])
    ),
    "jvp through": lambda init, xs: jvp(
        lambda rate: scan(several, init | {"rate": rate}, xs)[0]["total"],
        (init["rate"],),
        (torch.tensor(1.0),),
    ),
    "vmap in the body": lambda init, xs: scan(
        lambda c, x: (vmap(torch.add)(c, x["a"]), vmap(grad(lambda z: z**2))(c)), init["total"], xs
    ),
}


def test_eager_scan_equals_a_loop() -> None:
    init, xs = inputs()
    assert_equal(scan(several, init, xs), by_hand(several, init, xs))
    plain = scan(lambda c, x: (c + 1, c), torch.tensor(0), (), length=3)
    assert_equal(plain, (torch.tensor(3), torch.arange(3)))
    assert scan(lambda c, x: (c + x, ()), torch.tensor(0.0), X[:, 0])[1] == ()


def test_every_scan_in_one_inductor_program_equals_eager() -> None:
    init, xs = inputs()

    def everything(init: Any, xs: Any) -> Any:
        return {name: f(init, xs) for name, f in SCANS.items()}

    got, expected = jit(everything)(init, xs), everything(init, xs)
    assert_equal(got, expected)
    assert list(got["several"][0]) == list(expected["several"][0])


@pytest.mark.parametrize("name", SCANS)
def test_each_scan_compiled_alone_equals_eager(name: str, plain_backend: None) -> None:
    assert_equal(jit(SCANS[name])(*inputs()), SCANS[name](*inputs()))


@pytest.mark.parametrize("length", [4, 11, 12, 30], ids=["written out", "prime", "blocks", "tens"])
def test_tiny_steps_are_unrolled(
    length: int, plain_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_scan_traced, "MAX_UNROLL", 10)
    init, xs = inputs()
    xs = {"a": torch.arange(3.0 * length).view(length, 3), "b": torch.arange(1.0 * length)}
    for name in ("several", "no y", "no carry", "y is x, carry is constant", "closed over"):
        assert_equal(jit(SCANS[name])(init, xs), SCANS[name](init, xs), rtol=1e-5)


def test_unrolled_steps_in_one_inductor_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scan_traced, "MAX_UNROLL", 10)
    init, xs = inputs()
    xs = tree.map(lambda leaf: torch.cat([leaf] * 5), xs)
    fn = jit(SCANS["several"], strict=True)
    assert_equal(fn(init, xs), SCANS["several"](init, xs), rtol=1e-5)


@pytest.mark.slow
def test_a_step_leaves_the_layout_of_convolutions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor prefers channels last on GPUs, but the next step expects the original layout."""
    options = _inductor._options
    no_cache = {"fx_graph_cache": False}  # which ignores layouts
    monkeypatch.setattr(_inductor, "_options", lambda *_: options(False, False) | no_cache)

    model, opt = models.lenet(), optim.sgd(0.1)
    step = train_step(supervised(model, losses.cross_entropy), opt)
    state = TrainState.create(model, opt, key=random.key(0))
    x = random.normal(random.key(1), (16, 2, 1, 28, 28)).transpose(0, 1)  # rows lie apart
    y = torch.zeros(2, 16, dtype=torch.int64)
    leaves, spec = flatten(((state, (x, y)), {}))
    program = _interpreter.compile_bodies(
        decompose(_trace.trace(lambda s, b: scan(step, s, b), leaves, spec))
    )
    got, (expected, _) = program(leaves), flatten(scan(step, state, (x, y)))
    close(got, expected, rtol=1e-4, atol=1e-6)
    assert [x.stride() for x in got] == [x.stride() for x in expected]


def test_derivatives_through_scan_are_those_of_the_sum() -> None:
    init, xs = inputs()  # total = rate · Σ a
    assert_equal(SCANS["grad through"](init, xs), X.sum())
    assert_equal(SCANS["jvp through"](init, xs)[1], X.sum(0))
    assert_equal(SCANS["vmap through"](init, xs)[0]["total"][1], 0.2 * X.sum(0))


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 6),
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.int64]),
)
def test_eager_scan_of_any_shapes_equals_a_loop(
    steps: int, shapes: list[list[int]], dtype: torch.dtype
) -> None:
    init = {str(i): torch.ones(shape, dtype=dtype) for i, shape in enumerate(shapes)}
    size = {name: leaf.numel() * steps for name, leaf in init.items()}
    xs = {
        name: torch.arange(size[name]).to(dtype).view(steps, *leaf.shape)
        for name, leaf in init.items()
    }

    def f(carry: Any, x: Any) -> Any:
        new = tree.map(lambda c, z: c + z % 3, carry, x)
        return new, [new, x]

    assert_equal(scan(f, init, xs), by_hand(f, init, xs))


ONE = torch.tensor(0.0)
SCAN_ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dtype": (
        lambda: scan(lambda c, x: ({"a": {"b": c["a"]["b"].double()}}, ()), {"a": {"b": ONE}}, X),
        ValueError,
        r"a\.b: expected float32\[\], got float64\[\]",
    ),
    "shape": (
        lambda: scan(lambda c, x: ([x, c[1]], ()), [ONE, ONE], X),
        ValueError,
        r"keep the .* dtypes of the carry:\n  0: expected float32\[\], got float32\[3\]",
    ),
    "missing": (
        lambda: scan(lambda c, x: ({"a": c["a"]}, ()), {"a": ONE, "b": ONE}, X),
        ValueError,
        r"carry that f returned.*\n  b: missing",
    ),
    "unexpected": (
        lambda: scan(lambda c, x: ({"a": c["a"], "b": ONE}, ()), {"a": ONE}, X),
        ValueError,
        "b: unexpected",
    ),
    "lengths": (
        lambda: scan(lambda c, x: (c, ()), ONE, {"a": X, "b": X[:2]}),
        ValueError,
        r"one common first axis, got.*'a': \[4, 3\], 'b': \[2, 3\]",
    ),
    "length": (
        lambda: scan(lambda c, x: (c, ()), ONE, X, length=3),
        ValueError,
        r"one common first axis \(length=3\)",
    ),
    "scalar": (lambda: scan(lambda c, x: (c, ()), ONE, ONE), ValueError, "one common first axis"),
    "nothing": (lambda: scan(lambda c, x: (c, ()), ONE), ValueError, "one common first axis"),
    "no steps, another carry": (
        lambda: scan(lambda c, x: (x, ()), ONE, X[:0]),
        ValueError,
        r"keep the .* dtypes of the carry:\n  : expected float32\[\], got float32\[3\]",
    ),
    "init": (
        lambda: scan(lambda c, x: (c, ()), {"a": {"n": 1}}, X),
        TypeError,
        r"every leaf of init must be a tensor.*\n  a\.n: 1",
    ),
    "xs": (
        lambda: scan(lambda c, x: (c, ()), ONE, [X, "text"]),
        TypeError,
        "every leaf of xs must be a tensor.*\n  1: 'text'",
    ),
    "y": (
        lambda: scan(lambda c, x: (c, {"y": 2.0}), ONE, X),
        TypeError,
        r"every leaf of y must be a tensor.*\n  y: 2\.0",
    ),
    "carry": (
        lambda: scan(lambda c, x: ({"c": 2.0}, ()), {"c": ONE}, X),
        TypeError,
        r"every leaf of the carry that f returned must be a tensor.*\n  c: 2\.0",
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SCAN_ERRORS)
def test_scan_errors(name: str, jitted: bool) -> None:
    run, error, match = SCAN_ERRORS[name]
    with pytest.raises(error, match=match):
        jit(run)() if jitted else run()


@pytest.mark.slow
def test_importing_fdl_does_not_wait_for_the_compiler():
    """Dynamo and Inductor take two seconds to import, which eager users need not spend."""
    code = "import sys, fdl; print({'torch._dynamo', 'torch._inductor'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_not_a_function_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="jit: fn must be a function, got an int"):
        jit(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", [lambda f: f, jit], ids=["eager", "jit"])
def test_a_body_that_does_not_return_a_pair_is_named(way: Callable[..., Any]) -> None:
    rows = torch.zeros(4, 2)  # two values: a carry that would unpack
    for y, got in ((lambda c, x: c + x, r"a tensor float32\[2\]"), (lambda c, x: (c,), "a tuple")):
        with pytest.raises(TypeError, match=rf"scan: f must return a pair \(carry, y\), got {got}"):
            way(lambda c, y=y: scan(y, c, rows))(torch.zeros(2))
    with pytest.raises(TypeError, match=r"scan: f must be a function .* got a tensor"):
        way(lambda c: scan(c, lambda c, x: (c, x), rows))(torch.zeros(2))


def test_sparse_arguments_are_refused_by_path() -> None:
    fn = jit(lambda state: state["x"] * 2)
    with pytest.raises(TypeError, match=r"(?s)must be dense.*state\.x: torch\.sparse_coo"):
        fn({"x": torch.ones(3).to_sparse(), "y": torch.ones(3)})
