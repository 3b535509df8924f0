"""What callbacks print: eagerly, in a program and in the graph without Inductor, the same lines."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import fdl
from fdl import cond, debug, jit, scan, while_loop
from fdl._compiler import _inductor
from fdl._torch_compat import RELEASE

# Without Inductor.
IS_OLD = "torch 2.11 runs the body of a scan once more, for its shapes" * (RELEASE < (2, 12))

X, XS = torch.ones(3), torch.arange(4.0)


def body(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    debug.print("c {c:.1f} x {}", x, c=c.sum())
    return c * 1.5 + x, c.sum()


def walk(x: Tensor) -> Tensor:
    return scan(body, x, XS)[0]


def shown(x: Tensor) -> Tensor:
    debug.print("x {}", x)
    return x.sin()


def lines(x: list[float]) -> list[str]:
    """The lines of `walk(x)`, in Python numbers."""
    out = []
    for row in XS.tolist():
        out.append(f"c {sum(x):.1f} x {row}")
        x = [1.5 * z + row for z in x]
    return out


def ends(x: list[float]) -> list[float]:
    for row in XS.tolist():
        x = [1.5 * z + row for z in x]
    return x


def in_order(x: Tensor) -> Tensor:
    debug.print("first")
    y = walk(x)
    debug.print("between")
    y = walk(y)
    debug.print("last {:.3f}", y.sum())
    return y


def loud(x: Tensor) -> Tensor:
    return cond(x.sum() > 0, shown, torch.cos, x)


def branches_in_order(x: Tensor) -> Tensor:
    debug.print("first")
    loud(x)
    debug.print("between")
    loud(-x)
    loud(2 * x)
    debug.print("last")
    return x


def stepped(x: Tensor) -> Tensor:
    debug.print("{}", x)
    return x + 1


ONES = lines([1.0] * 3)
CASES: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "a tensor": (shown, ["x tensor([1., 1., 1.])"]),
    "no tensor": (lambda x: (debug.print("a {} {b}", 1, b="c"), x)[1], ["a 1 c"]),
    "a shape": (lambda x: (debug.print("{x.shape} {x[0]}", x=x), x)[1], ["torch.Size([3]) 1.0"]),
    "closed over": (lambda x: (debug.print("{}", XS[1]), x)[1], ["1.0"]),
    "scan": (walk, ONES),
    "scan without a use": (lambda x: (walk(x), x)[1], ONES),
    "branches without a use": (
        branches_in_order,
        ["first", "x tensor([1., 1., 1.])", "between", "x tensor([2., 2., 2.])", "last"],
    ),
    "a branch without results": (
        lambda x: (cond(x[0] > 0, lambda x: (shown(x), ())[1], lambda x: (), x), x)[1],
        ["x tensor([1., 1., 1.])"],
    ),
    "a branch in a scan, without a use": (
        lambda x: scan(lambda c, _: (loud(c), (c + 1, ()))[1], x, XS[:2])[0],
        ["x tensor([1., 1., 1.])", "x tensor([2., 2., 2.])"],
    ),
    "grad of a branch without a use": (
        grad(lambda x: (loud(x), x.sum())[1]),
        ["x tensor([1., 1., 1.])"],
    ),
    "while without a use": (
        lambda x: (while_loop(lambda i: i < 2, stepped, x[0]), x)[1],
        ["1.0"],
    ),
    "in order": (
        in_order,
        [
            *("first", *ONES, "between", *lines(ends([1.0] * 3))),
            f"last {3 * ends(ends([1.0]))[0]:.3f}",
        ],
    ),
    "nested scans": (
        lambda x: scan(lambda c, _: (walk(c), ()), x, XS[:2])[0],
        [*ONES, *lines(ends([1.0] * 3))],
    ),
    "map": (
        lambda x: fdl.map(lambda z: (debug.print("z {}", z), z + x)[1], XS),
        [f"z {z}" for z in XS.tolist()],
    ),
    "grad": (grad(lambda x: shown(x).sum()), ["x tensor([1., 1., 1.])"]),
    "hessian": (hessian(lambda x: shown(x).sum()), ["x tensor([1., 1., 1.])"]),
    "jvp": (lambda x: jvp(shown, (x,), (x,)), ["x tensor([1., 1., 1.])"]),
    "vmap": (vmap(shown), ["x 1.0"] * 3),
    "vmap of vmap": (
        lambda x: vmap(vmap(shown, in_dims=0), in_dims=1)(torch.arange(6.0).view(2, 3)),
        ["x 0.0", "x 3.0", "x 1.0", "x 4.0", "x 2.0", "x 5.0"],
    ),
    "vmap, not over it": (vmap(lambda z: (debug.print("x {}", XS[1]), z)[1]), ["x 1.0"]),
    "vmap, one of two": (
        vmap(lambda z: (debug.print("{} {}", z, XS[1]), z)[1]),
        ["1.0 1.0"] * 3,
    ),
    "grad of a scan": (grad(lambda x: walk(x).sin().sum()), ONES),
    "grad of nested scans": (
        grad(lambda x: scan(lambda c, _: (walk(c), ()), x, XS[:2])[0].sin().sum()),
        [*ONES, *lines(ends([1.0] * 3))],
    ),
    "jvp of a scan": (lambda x: jvp(walk, (x,), (x,)), ONES),
    "grad in a scan": (
        lambda x: scan(lambda c, _: (c - grad(lambda c: shown(c).sum())(c), ()), x * 0, XS[:2])[0],
        ["x tensor([0., 0., 0.])", "x tensor([-1., -1., -1.])"],
    ),
    "vmap of a scan": (
        lambda x: vmap(walk)(torch.stack([x, x + 1])),
        [line for pair in zip(ONES, lines([2.0] * 3), strict=True) for line in pair],
    ),
}


@pytest.mark.parametrize(
    "way", ["eager", "plain", pytest.param("compiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CASES)
def test_lines_and_results(
    name: str, way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, expected = CASES[name]
    if way == "plain":
        if IS_OLD:
            pytest.skip(IS_OLD)
        monkeypatch.setattr(_inductor, "lower", lambda graph, *_: lambda leaves: graph(*leaves))
    result = fn(X)
    first = capsys.readouterr().out.splitlines()
    if way == "eager":
        # A loop in Python runs every member of a batch before the next step, as the program does.
        assert first == expected
        return
    jitted = jit(fn)
    for _ in range(2):
        torch.testing.assert_close(jitted(X), result)
        assert capsys.readouterr().out.splitlines() == expected
    assert jitted.report()[0].fallbacks == ()


@pytest.mark.slow
def test_a_callback_gets_its_arguments_and_own_copies() -> None:
    calls: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    def fn(x: Tensor) -> Tensor:
        y = x + 1
        debug.callback(record, {"y": y, "n": 3}, [None, x], name="step", z=y * 2)
        for _ in range(5):
            y = (y @ y.outer(y)).tanh()
        return y

    jitted = jit(fn)
    jitted(X)
    jitted(X * 2)
    assert len(calls) == 2
    for scale, (args, kwargs) in zip((1, 2), calls, strict=True):
        x = X * scale
        torch.testing.assert_close(args, ({"y": x + 1, "n": 3}, [None, x]))
        torch.testing.assert_close(kwargs["z"], 2 * x + 2)
        assert kwargs["name"] == "step" and type(args[1][1]) is Tensor


@pytest.mark.slow
def test_an_error_of_a_callback_ends_the_program() -> None:
    seen = []

    def stop(x: Tensor) -> None:
        seen.append(float(x))
        if x > 1:
            raise LookupError("more than one")

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, tuple[()]]:
        debug.callback(stop, x)
        return c + x, ()

    jitted = jit(lambda c: scan(step, c, XS)[0])
    for _ in range(2):
        seen.clear()
        with pytest.raises(LookupError, match="more than one"):
            jitted(X)
        assert seen == [0.0, 1.0, 2.0]


@pytest.mark.slow
def test_a_program_in_another_thread_calls_back_too(capsys: pytest.CaptureFixture[str]) -> None:
    jitted = jit(walk)
    thread = threading.Thread(target=jitted, args=(X,))
    thread.start()
    thread.join()
    assert capsys.readouterr().out.splitlines() == ONES


@pytest.mark.skipif(bool(IS_OLD), reason=IS_OLD)
def test_progress_as_the_page_shows_it(plain_backend: None) -> None:
    seen = []

    def step(c: Tensor, i: Tensor) -> tuple[Tensor, tuple[()]]:
        debug.callback(lambda i: seen.append(int(i)), i)
        return c + 1, ()

    jit(lambda c: scan(step, c, torch.arange(25))[0])(X)
    assert seen == list(range(25))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: debug.print("{} {}", x), IndexError, "out of range"),
        (lambda x: debug.print("{a}", b=x), KeyError, "a"),
        (lambda x: debug.print("{"), ValueError, "'{'"),
        (lambda x: debug.print(x), TypeError, r"fmt must be a format string .* tensor float32"),
        (lambda x: debug.callback("print", x), TypeError, "fn must be a function, got a str"),
    ],
)
@pytest.mark.parametrize("way", [lambda fn: fn, jit], ids=["eager", "jit"])
def test_what_cannot_be_printed_raises_at_once(
    call: Callable[..., None], error: type[Exception], text: str, way: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=text):
        way(lambda x: (call(x), x)[1])(X)


@pytest.mark.slow
def test_inside_torch_compile_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    result = torch.compile(shown, fullgraph=True, backend="eager")(X)
    torch.testing.assert_close(result, X.sin())
    assert capsys.readouterr().out == ""
