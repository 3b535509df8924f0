"""Calls that need nothing new are dispatched in C++, and are not told apart from others."""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fdl
from fdl import jit, tree
from fdl._compiler import _dispatch, _inductor
from fdl._torch_compat import RELEASE
from tests.support.asserts import Pair, assert_equal, trees


class Calls:
    """Counts the calls that are dispatched in C++, and the others."""

    def __init__(self) -> None:
        self.known = self.others = 0

    def since(self) -> tuple[int, int]:
        """Return both counts, and start again."""
        counts = self.known, self.others
        self.known = self.others = 0
        return counts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Calls:
    # Until it is built, the first calls are not dispatched in C++.
    if _dispatch._extension().result() is None and pytestconfig.getoption("--quick"):
        pytest.skip("the extension is not built yet, which make quick does not do")
    counts, call = Calls(), _dispatch.call_known

    def counted(*args: Any) -> Any:
        result = call(*args)
        if result is NotImplemented:
            counts.others += 1
        else:
            counts.known += 1
        return result

    monkeypatch.setattr(_dispatch, "call_known", counted)
    return counts


def state() -> dict[str, Any]:
    return {"w": torch.ones(2, 3), "more": [torch.zeros(3), Pair(torch.tensor(1), None)], "e": ()}


def double(x: Any) -> Any:
    return tree.map(lambda leaf: None if leaf is None else leaf * 2, x)


@pytest.mark.parametrize("donate", [(), 0])
@pytest.mark.parametrize("backend", ["torch", "Inductor"])
def test_every_call_but_the_first(
    donate: Any, backend: str, calls: Calls, request: pytest.FixtureRequest
) -> None:
    if backend == "torch":
        request.getfixturevalue("plain_backend")
    fn, value, expected = jit(double, donate_argnums=donate), state(), state()
    for _ in range(4):
        value, expected = fn(value), double(expected)
        assert_equal(value, expected)
        assert type(value["more"][1]) is Pair and value["more"][1].second is None
    assert calls.since() == (3, 1)


def test_keywords_and_other_orders_of_them(calls: Calls, plain_backend: None) -> None:
    fn = jit(lambda x, *, a, b: x + a - b)
    one, two, three = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    assert fn(one, a=two, b=three) == fn(one, a=two, b=three) == fn(one, b=three, a=two) == 0
    assert len(fn.report()) == 1


class Named(Tensor):
    """A tensor of a user's class."""


def reload(x: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer)


# Leaves of the same values, and whether the program of plain ones takes them.
WAYS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "the same": (lambda x: x, True),
    "a copy": (torch.clone, True),
    "a deep copy": (copy.deepcopy, True),
    "loaded": (reload, True),
    "another dtype": (Tensor.double, False),
    "another shape": (lambda x: torch.cat([x, x]), False),
    "other strides": (lambda x: torch.stack([x, x], -1)[..., 0], False),
    "expanded": (lambda x: x[:1].expand(len(x)), False),
    "a parameter": (lambda x: torch.nn.Parameter(x.clone(), requires_grad=False), True),
    "another class": (lambda x: x.clone().as_subclass(Named), False),
    "negated later": (lambda x: torch._neg_view(-x), False),
    "of inference mode": (torch.inference_mode()(torch.clone), False),
}


@pytest.mark.parametrize("donate", [(), 0])
@pytest.mark.parametrize("way", WAYS)
def test_leaves_of_other_kinds(way: str, donate: Any, calls: Calls, plain_backend: None) -> None:
    def step(s: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": s["x"] * 2, "y": s["y"] + s["x"].sum()}

    fn, (make, fits) = jit(step, donate_argnums=donate), WAYS[way]
    value = fn(fn({"x": torch.arange(3.0), "y": torch.tensor(1.0)}))
    calls.since()
    x = make(value["x"])
    plain = x.clone().as_subclass(Tensor)
    expected = step({"x": plain, "y": value["y"].clone()})
    value = fn({"x": x, "y": value["y"]})
    assert_equal(value, expected)
    if way == "loaded" and donate == 0:
        fits = False  # torch.load allocates in a way of its own
    assert calls.since() == ((1, 0) if fits else (0, 1))
    assert_equal(fn(value), step(expected))


def test_memory_that_others_see_is_left_alone(calls: Calls) -> None:
    """Views, arrays, storages and detached tensors of the last results."""
    fn = jit(lambda s: {"x": s["x"] + 1}, donate_argnums=0)
    value = fn({"x": torch.zeros(3)})
    others: list[Any] = []
    views = (Tensor.detach, Tensor.numpy, lambda x: x[:2], lambda x: x.view(3, 1))
    for i, view in enumerate([*views, Tensor.untyped_storage]):
        calls.since()
        others.append(view(value["x"]))
        before = copy.deepcopy(others[-1])
        value = fn(value)
        assert value["x"].tolist() == [i + 2.0] * 3
        assert list(others[-1]) == list(before) and calls.since() == (0, 1)
    address = value["x"].data_ptr()
    assert value["x"].untyped_storage().nbytes() == 12  # nobody keeps the storage
    assert fn(value)["x"].data_ptr() == address and calls.since() == (1, 0)


def test_shared_memory_among_arguments(calls: Calls, plain_backend: None) -> None:
    fn = jit(lambda s, x: [leaf + x for leaf in s], donate_argnums=0)
    a, b, x = torch.zeros(2), torch.zeros(2), torch.ones(2)
    a, b = fn([a, b], x)
    for bad, other in (([a, a], x), ([a, b], a), ([a, a.detach()], x), ([a, b], b[:])):
        with pytest.raises(ValueError, match="passed twice, or shares memory"):
            fn(bad, other)
        assert_equal([a, b], [torch.ones(2)] * 2)
    free = jit(lambda s, x: [leaf + x for leaf in s])  # donates nothing
    for _ in range(3):
        assert_equal(free([a, a], a), [torch.full((2,), 2.0)] * 2)
    assert_equal(fn([a, b], x), [torch.full((2,), 2.0)] * 2)


def test_elements_that_share_memory(calls: Calls) -> None:
    def make() -> Tensor:
        return torch.arange(6.0).as_strided((3, 2), (1, 1)).data  # of 24 bytes, as its storage

    fn = jit(lambda x: x * 2 + torch.arange(6.0).view(3, 2), donate_argnums=0)
    for _ in range(3):
        assert_equal(fn(make()), make() * 2 + torch.arange(6.0).view(3, 2))


def test_donated_tensors_are_gone(calls: Calls, plain_backend: None) -> None:
    fn = jit(lambda s, x: {"x": s["x"] + x}, donate_argnums=0)
    first, x = fn({"x": torch.zeros(3)}, torch.ones(3)), torch.ones(3)
    assert fn(first, x)["x"].tolist() == [2.0] * 3 and calls.since() == (1, 1)
    for use in (lambda: first["x"] + 1, lambda: fn(first, x), lambda: fn({"x": x}, first["x"])):
        with pytest.raises(RuntimeError, match="was donated to a jitted function"):
            use()
    assert x.tolist() == [1.0] * 3


def test_results_that_are_kept_do_not_change(calls: Calls) -> None:
    fn, value = jit(lambda s: {"x": s["x"] + 1, "y": s["x"]}), {"x": torch.zeros(3)}
    kept = [fn(value)["x"] for _ in range(3)]
    for x in kept:
        x += 1
    assert_equal(kept, [torch.full((3,), 2.0)] * 3)
    same = fn(value)["y"]
    same += 1  # results share no memory with the arguments
    assert value["x"].tolist() == [0.0] * 3 and calls.since() == (3, 1)


def test_gradients_after_calls_without(calls: Calls, plain_backend: None) -> None:
    fn, x = jit(lambda x: (x * x).sum()), torch.arange(3.0)
    assert fn(x) == fn(x) == 5 and calls.since() == (1, 1)
    w = torch.arange(3.0, requires_grad=True)
    fn(w).backward()
    assert w.grad is not None and w.grad.tolist() == [0.0, 2.0, 4.0]
    x.requires_grad_()  # the very tensor of the calls before
    assert torch.autograd.grad(fn(x), x)[0].tolist() == [0.0, 2.0, 4.0]
    with torch.no_grad():
        assert not fn(x).requires_grad


def test_transformations_and_modes_see_the_function(calls: Calls, plain_backend: None) -> None:
    seen = []

    def square(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x * x

    fn, x = jit(square), torch.arange(3.0)
    fn(x), fn(x)
    count = len(seen)
    assert torch.vmap(fn)(x).tolist() == [0.0, 1.0, 4.0] and len(seen) == count + 1
    assert torch.func.grad(lambda x: fn(x).sum())(x).tolist() == [0.0, 2.0, 4.0]
    assert torch.func.jvp(fn, (x,), (torch.ones(3),))[1].tolist() == [0.0, 2.0, 4.0]
    assert jit(lambda x: fn(x) + fn(x))(x).tolist() == [0.0, 2.0, 8.0]
    count = len(seen)
    with fdl.disable_jit():
        fn(x)
    assert len(seen) == count + 1
    calls.since()
    fn(x)
    assert calls.since() == (1, 0) and len(seen) == count + 1


def test_closed_over_tensors_are_read_at_each_call(calls: Calls, plain_backend: None) -> None:
    holder = {"scale": torch.tensor(2.0)}
    fn, x = jit(lambda x: x * holder["scale"]), torch.ones(2)
    assert fn(x).tolist() == fn(x).tolist() == [2.0] * 2
    holder["scale"] = torch.tensor(3.0)
    assert fn(x).tolist() == [3.0] * 2 and calls.since() == (2, 1)
    holder["scale"] = torch.full((2,), 4.0)  # another shape
    assert fn(x).tolist() == [4.0] * 2 and calls.since() == (0, 1)
    holder["scale"] = torch.tensor(5.0, requires_grad=True)
    with pytest.raises(ValueError, match="closes over a tensor that requires grad"):
        fn(x)


def test_a_closed_over_tensor_that_comes_and_goes(calls: Calls, plain_backend: None) -> None:
    holder: dict[str, Any] = {"mask": torch.tensor(2.0)}
    fn = jit(lambda x: x if holder["mask"] is None else x * holder["mask"])
    x = torch.ones(2)
    for mask in (2.0, None, 3.0, None, 4.0, 4.0, None):
        holder["mask"] = None if mask is None else torch.tensor(mask)
        assert fn(x).tolist() == [mask or 1.0] * 2


def test_a_closed_over_tensor_is_not_given_away(calls: Calls, plain_backend: None) -> None:
    holder = {"scale": torch.ones(2)}
    fn = jit(lambda x: x * holder["scale"], donate_argnums=0)
    x = fn(fn(torch.ones(2)))
    holder["scale"] = x
    with pytest.raises(ValueError, match="a donated tensor is also closed over"):
        fn(x)


@pytest.mark.slow
def test_threads_that_call_the_same_program() -> None:
    fn = jit(lambda s: {"x": s["x"] * 2 - s["x"] + 1, "n": s["n"] + 1}, donate_argnums=0)

    def start(i: int) -> dict[str, Tensor]:
        return {"x": torch.full((1000,), float(i)), "n": torch.tensor(i)}

    fn(start(0))
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        value = start(i)
        for _ in range(300):
            value = fn(value)
        results[i] = value

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert_equal(results[i], start(i + 300))


def test_other_containers_are_dispatched_in_python(calls: Calls, plain_backend: None) -> None:
    fn = jit(lambda s: OrderedDict(x=s["x"] + 1), donate_argnums=0)
    value = fn(OrderedDict(x=torch.zeros(2)))
    for i in range(3):
        value = fn(value)
        assert type(value) is OrderedDict and value["x"].tolist() == [i + 2.0] * 2
    assert calls.since() == (0, 4)


def test_a_result_of_another_container(calls: Calls, plain_backend: None) -> None:
    fn, x = jit(lambda x: OrderedDict(x=x + 1, y=x)), torch.zeros(2)
    for _ in range(3):
        result = fn(x)
        assert type(result) is OrderedDict
        assert_equal(dict(result), {"x": torch.ones(2), "y": x})
    assert calls.since() == (2, 1)


def test_more_kinds_of_arguments_than_are_kept(calls: Calls, plain_backend: None) -> None:
    fn = jit(lambda x: x + 1)
    for _ in range(2):
        for n in range(_dispatch.MOST + 3):
            assert_equal(fn(torch.zeros(n)), torch.ones(n))
    assert len(fn.report()) == _dispatch.MOST + 3


def merged() -> list[dict[str, Any]]:
    frozen, adapters = {"w": torch.ones(2), "b": torch.zeros(3)}, {"a": torch.full((2,), 3.0)}
    return [
        {**adapters, **frozen},
        {**frozen, **adapters},
        dict(sorted((frozen | adapters).items())),
    ]


@pytest.mark.parametrize("donate", [(), 0])
def test_the_order_of_keys_is_not_structure(donate: Any, calls: Calls) -> None:
    def step(s: dict[str, Any]) -> Any:
        return tree.map(lambda x: x + 1, s["params"]), s["params"]["w"] * s["scale"]

    fn = jit(step, donate_argnums=donate)
    for _ in range(2):
        for params in merged():
            value = {"params": params, "scale": torch.tensor(2.0)}
            expected, result = step(value), fn(tree.map(torch.clone, value))
            assert list(result[0]) == list(params)
            assert_equal(result, expected)
    assert len(fn.report()) == 1 and calls.since() == (3, 3)


def test_a_function_of_the_order_has_a_program_for_each(plain_backend: None) -> None:
    fn = jit(lambda params: sum(i * x.sum() for i, x in enumerate(params.values())))
    one, two = {"a": torch.ones(1), "b": torch.zeros(1)}, {"b": torch.zeros(1), "a": torch.ones(1)}
    for _ in range(2):
        assert (fn(one), fn(two)) == (0, 1)
    assert len(fn.report()) == 2


def test_prints_of_another_order(plain_backend: None, capsys: pytest.CaptureFixture[str]) -> None:
    def show(params: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, x in params.items():
            fdl.debug.print(name + " {}", x)
        return params

    fn = jit(show)
    fn({"a": torch.tensor(1), "b": torch.tensor(2)})
    fn({"b": torch.tensor(2), "a": torch.tensor(1)})
    assert capsys.readouterr().out.split() == ["a", "1", "b", "2", "b", "2", "a", "1"]


@pytest.mark.slow
def test_errors_at_run_time_are_those_of_python(calls: Calls) -> None:
    fn = jit(lambda s, i: {"x": s["x"].index_select(0, i) + 1}, donate_argnums=0)
    value = fn(fn({"x": torch.zeros(3)}, torch.arange(3)), torch.arange(3))
    with pytest.raises(IndexError):
        fn(value, torch.tensor([0, 1, 3]))
    assert calls.since() == (1, 1)
    value = fn({"x": torch.zeros(3)}, torch.arange(3))
    assert value["x"].tolist() == [1.0] * 3


def test_calls_keep_no_memory(plain_backend: None) -> None:
    fn, value = jit(double, donate_argnums=0), state()

    def count() -> int:
        nonlocal value
        for _ in range(100):
            value = fn(value)
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    few = count()
    assert count() <= few


def test_uses_that_torch_does_not_announce_see_nothing(calls: Calls, plain_backend: None) -> None:
    fn = jit(lambda x: x + 1, donate_argnums=0)
    for _ in range(3):
        x = torch.zeros(3)
        fn(x)
        assert torch.empty(0).set_(x).tolist() == []  # does not ask the class


def test_tensors_whose_operations_run_in_python(plain_backend: None) -> None:
    mode = FakeTensorMode()
    fake, fn = mode.from_tensor(torch.ones(2, 3)), jit(lambda x: x.sum(0))
    for x in (torch.ones(2, 3), fake, torch.ones(2, 3), fake):
        assert fn(x).shape == (3,) and type(fn(x)) is type(x)


def test_loops_and_branches_have_digests(plain_backend: None) -> None:
    """Conditions return a tensor, not a list; a print in a body is seen."""
    looped = jit(lambda s: fdl.while_loop(lambda c: c["n"] < 50, double, s))
    one, two = (
        {"n": torch.tensor(1), "m": torch.tensor(3)},
        {"m": torch.tensor(3), "n": torch.tensor(1)},
    )
    for _ in range(2):
        assert looped(one) == looped(two) == {"n": torch.tensor(64), "m": torch.tensor(192)}
    branched = jit(lambda s: fdl.cond(s["n"] > 0, double, lambda x: x, s))
    assert branched(one) == branched(two) == double(one)


def test_prints_in_a_loop_keep_their_order(
    plain_backend: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(carry: Any, row: dict[str, Tensor]) -> Any:
        for name in row:
            fdl.debug.print(name)
        return carry, tree.map(lambda x: x, row)

    fn = jit(lambda rows: fdl.scan(body, torch.zeros(()), rows)[1])
    fn({"a": torch.ones(1), "b": torch.ones(1)})
    fn({"b": torch.ones(1), "a": torch.ones(1)})
    assert capsys.readouterr().out.split() == ["a", "b", "b", "a"]


class Trainer:
    """Jits a method that reads a tensor of the object, in which it is kept."""

    def __init__(self) -> None:
        self.w = torch.ones(3)
        self.step = jit(self._step)

    def _step(self, x: Tensor) -> Tensor:
        return x * self.w


def test_functions_are_freed_with_what_they_close_over(plain_backend: None) -> None:
    trainer = Trainer()
    for _ in range(3):
        trainer.step(torch.ones(3))
    here = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert here() is None


LEAVES = st.sampled_from([(), (2,), (2, 1), (0,)]).map(torch.ones) | st.none()


@settings(deadline=None, max_examples=60)
@given(value=trees(LEAVES), donate=st.booleans())
def test_any_tree(value: Any, donate: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_inductor, "lower", lambda graph, *_: lambda leaves: graph(*leaves))
        fn = jit(lambda x: {"x": double(x), "n": [x]}, donate_argnums=0 if donate else ())
        expected = value
        value = tree.map(lambda leaf: None if leaf is None else leaf.clone(), value)
        for _ in range(3):
            result = fn(value)
            expected = double(expected)
            assert_equal(result["x"], expected)
            value = result["x"]


@pytest.mark.slow
def test_without_the_extension_calls_are_dispatched_in_python(tmp_path: Path) -> None:
    """A compiler that cannot build it; a warning says why, once."""
    compiler = tmp_path / "g++"
    refusal = "[[ $* == *dispatch.cpp* ]] && { echo 'x.h:1:1: error: no such header' >&2; exit 1; }"
    compiler.write_text(f'#!/bin/bash\n{refusal}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    program = """
import torch, fdl
fn = fdl.jit(lambda s: {"x": s["x"] + 1}, donate_argnums=0)
state = {"x": torch.zeros(2)}
for _ in range(3):
    state = fn(state)
print(state["x"].tolist(), fn.report()[0].route)
"""
    environment = {"CXX": str(compiler), "FDL_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert run.stdout == "[3.0, 3.0] one program\n", run.stderr
    assert run.stderr.count("dispatched in Python, which takes longer (error: no such header)") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the compiler waits in a script of bash")
def test_a_process_does_not_wait_for_the_extension_and_leaves_it_to_the_next(
    tmp_path: Path,
) -> None:
    """The compiler goes on, and keeps the lock, when the process ends that has started it."""
    compiler, go, cache = tmp_path / "g++", tmp_path / "go", tmp_path / "cache"
    wait = f"[[ $* == *dispatch.cpp* ]] && until [ -e {go} ]; do sleep 0.1; done"
    compiler.write_text(f'#!/bin/bash\n{wait}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "FDL_CACHE": str(cache)}
    program = """
import torch, fdl
from fdl._compiler import _dispatch
fn = fdl.jit(lambda x: torch.sin(x) + 0.5)
print(fn(torch.zeros(2)).tolist(), fn.report()[0].cached, len(_dispatch._loaded))
"""

    def run(more: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-c", program + more],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=True,
        )
        assert not done.stderr
        return done.stdout

    def parts() -> list[str]:
        return sorted(path.name[:2] for path in cache.glob("*dispatch*"))

    kept = RELEASE >= (2, 12)
    try:
        assert run() == "[0.5, 0.5] False 0\n"
        assert run() == f"[0.5, 0.5] {kept} 0\n" and not parts()
    finally:
        go.touch()
    ready = "print(_dispatch._extension().result() is not None)"
    assert run(ready).splitlines()[1:] == ["True"] and parts() == ["di"]
    assert run() == f"[0.5, 0.5] {kept} 1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler waits in a script of bash")
def test_without_a_cache_the_compiler_ends_with_the_process(tmp_path: Path) -> None:
    compiler, number = tmp_path / "g++", tmp_path / "number"
    compiler.write_text(f"#!/bin/bash\necho $$ > {number}\nexec sleep 300\n")
    compiler.chmod(0o755)
    program = f"""
import time
from pathlib import Path
from fdl._compiler import _dispatch
_dispatch.start()
while not (Path({str(number)!r}).exists() and Path({str(number)!r}).read_text()):
    time.sleep(0.01)
"""
    environment = os.environ | {"CXX": str(compiler), "FDL_CACHE": "0"}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=100, check=True)
    process = Path("/proc", number.read_text().strip(), "cmdline")
    for _ in range(100):  # until the system has ended it
        if not process.exists() or not process.read_bytes():
            return
        time.sleep(0.05)
    pytest.fail("the compiler is still running")
