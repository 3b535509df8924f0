"""Signals while a program runs: it stops, and what was donated is as it was."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fdl import disable_jit, jit, scan
from fdl._compiler import _inductor
from fdl._compiler._graph import LOOP
from fdl._torch_compat import RELEASE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals"),
]
IN_CPP = pytest.mark.skipif(RELEASE < (2, 12), reason="the loop runs in Python")
FOREVER = torch.zeros(10_000_000)  # steps: more than an hour for `work`


def work(c: Tensor, x: Tensor) -> tuple[Tensor, tuple[()]]:
    return (c @ c).tanh() + x + 1, ()


def loop(c: Tensor, xs: Tensor) -> Tensor:
    return scan(work, c, xs)[0]


def nested(c: Tensor, xs: Tensor) -> Tensor:
    """All of the time passes in one turn of the outer loop."""
    return scan(lambda c, _: (loop(c, xs), ()), c, xs[:11])[0]


def written_before(c: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
    """The first result does not need the second loop: it may be written before that."""
    return scan(work, c, xs[:11])[0], loop(torch.zeros_like(c), xs).sum()


def interrupt(_: int, frame: Any) -> None:
    """Raise as Ctrl-C does, once a program is running."""
    if any(f.f_code.co_name == "_execute" for f, _ in traceback.walk_stack(frame)):
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, 0.2)


@contextmanager
def alarm(seconds: float = 0.5, handler: Callable[..., None] = interrupt) -> Iterator[None]:
    """Send a signal."""
    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for two lengths: for a few steps it is fast."""
    jitted = jit(fn, donate_argnums=0)
    few = FOREVER[:101]
    expected = fn(torch.eye(128), few)
    torch.testing.assert_close(jitted(torch.eye(128), few), expected)
    return jitted


@IN_CPP
@pytest.mark.parametrize("fn", [loop, nested])
def test_a_compiled_loop_stops_and_its_arguments_are_intact(fn: Callable[..., Any]) -> None:
    jitted, c = compiled(fn), torch.eye(128)
    for _ in range(2):  # at the first call and later; the arguments can be used again
        with alarm(), pytest.raises(KeyboardInterrupt):
            jitted(c, FOREVER)
        assert torch.equal(c, torch.eye(128))
    few = FOREVER[:101]
    torch.testing.assert_close(jitted(c, few), fn(torch.eye(128), few))
    with pytest.raises(RuntimeError, match="donated"):
        c.sum()
    assert {report.route for report in jitted.report()} == {"one program"}  # type: ignore[attr-defined]


@IN_CPP
def test_what_may_have_been_written_stays_donated() -> None:
    jitted, c = compiled(written_before), torch.eye(128)
    with alarm(), pytest.raises(KeyboardInterrupt):
        jitted(c, FOREVER)
    with pytest.raises(RuntimeError, match="donated"):
        c.sum()


@IN_CPP
def test_the_error_of_another_handler_is_raised() -> None:
    def handler(*args: Any) -> None:
        try:
            interrupt(*args)
        except KeyboardInterrupt:
            raise TimeoutError("too long") from None

    jitted, c = compiled(loop), torch.eye(128)
    with alarm(handler=handler), pytest.raises(TimeoutError, match="too long"):
        jitted(c, FOREVER)
    assert torch.equal(c, torch.eye(128))


@IN_CPP
def test_a_handler_that_returns_runs_at_once_and_the_program_goes_on() -> None:
    calls = []

    def handler(*_: Any) -> None:
        calls.append(1)
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    many = FOREVER[:20_001]
    jitted = compiled(loop)
    expected = jitted(torch.eye(128), many)
    with alarm(0.1, handler):
        result = jitted(torch.eye(128), many)
    assert torch.equal(result, expected)
    assert len(calls) > 1  # once it returned only one would be left


@IN_CPP
def test_a_program_of_another_thread_runs_on() -> None:
    jitted, results = compiled(loop), []
    many = FOREVER[:20_001]
    expected = jitted(torch.eye(128), many)
    done = threading.Event()

    def run() -> None:
        results.append(jitted(torch.eye(128), many))
        done.set()

    with alarm(0.1, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        threading.Thread(target=run).start()
        done.wait()
    done.wait()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("way", ["eager", "compiled loop bodies"])
def test_loops_in_python_stop(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = _inductor.lower

    def only_bodies(graph: Any, *args: Any, **options: Any) -> Any:
        if any(node.target is LOOP for node in graph.graph.nodes):
            raise RuntimeError("no loops")
        return lower(graph, *args, **options)

    c = torch.eye(128)
    if way == "eager":
        raising = alarm(0.5, signal.default_int_handler)
        with disable_jit(), raising, pytest.raises(KeyboardInterrupt):
            jit(loop, donate_argnums=0)(c, FOREVER)
    else:
        monkeypatch.setattr(_inductor, "lower", only_bodies)
        jitted = jit(loop, donate_argnums=0)
        with pytest.warns(UserWarning, match="no loops"):
            jitted(torch.eye(128), FOREVER[:101])
        with pytest.warns(UserWarning), alarm(), pytest.raises(KeyboardInterrupt):
            jitted(c, FOREVER)
    assert torch.equal(c, torch.eye(128))


@pytest.mark.skipif(os.name == "nt", reason="kills itself")
@IN_CPP
def test_a_real_ctrl_c() -> None:
    jitted, c = compiled(loop), torch.eye(128)
    with alarm(0.5, lambda *_: os.kill(os.getpid(), signal.SIGINT)):
        old = signal.signal(signal.SIGINT, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                jitted(c, FOREVER)
        finally:
            signal.signal(signal.SIGINT, old)
    assert torch.equal(c, torch.eye(128))
