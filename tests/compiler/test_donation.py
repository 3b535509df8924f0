"""Memory of the arguments and results of jitted functions: donation, copies, interruptions."""

import _thread
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from fdl import interop, jit, scan, tree
from fdl._compiler import _inductor
from tests.support.asserts import assert_equal


def test_donated_tensors_are_gone_and_others_stay(plain_backend: None) -> None:
    fn = jit(lambda state, x: ({"w": state["w"] + x, "n": state["n"]}, x), donate_argnums=0)
    w, n, x = torch.zeros(3), torch.tensor(1), torch.ones(3)
    view = w[:2]
    state, same = fn({"w": w, "n": n}, x)
    for use in (lambda: w + 1, lambda: w.shape, lambda: n.item(), lambda: fn({"w": w, "n": n}, x)):
        with pytest.raises(RuntimeError, match=r"donated to a jitted function.*returned instead"):
            use()
    assert torch.equal(view, torch.zeros(2))
    assert torch.equal(x, torch.ones(3)) and torch.equal(same, x)
    state, _ = fn(state, x)  # results can be donated again
    assert torch.equal(state["w"], torch.full((3,), 2.0)) and state["n"] == 1


def addresses(state: Any) -> list[int]:
    return [leaf.data_ptr() for leaf in tree.leaves(state)]


def test_results_are_written_where_the_donated_tensors_were() -> None:
    """Swapped, passed through, of two dtypes, by Inductor: no result reads an overwritten value."""
    fn = jit(
        lambda s, x: {"a": s["b"] + x, "b": s["a"] * s["b"], "c": s["c"], "n": s["n"] + 1},
        donate_argnums=0,
    )
    state = {name: torch.randn(40) for name in "abc"} | {"n": torch.tensor(0)}
    expected, x = tree.map(torch.clone, state), torch.randn(40)
    before = sorted(addresses(state))
    for _ in range(3):
        a, b = expected["a"], expected["b"]
        expected = {"a": b + x, "b": a * b, "c": expected["c"], "n": expected["n"] + 1}
        state = fn(state, x)
        assert tree.diff(expected, state, rtol=1e-6) == []
        assert sorted(addresses(state)) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "move",
    [
        torch.rot90,
        lambda x: (x.flip(0) * 2).T.contiguous().T,
        lambda x: x.flip(0).reshape(9).view(3, 3),
        lambda x: x.roll(1, 0),
        lambda x: torch.cat(x.split([1, 2])[::-1]),
    ],
)
def test_values_are_read_before_others_are_written(move: Callable[[Tensor], Tensor]) -> None:
    fn, expected = jit(lambda s: [move(s[0]), s[1] + s[0].T], donate_argnums=0), torch.randn(3, 3)
    total = torch.zeros(3, 3)
    state = [expected.clone(), total.clone()]
    for _ in range(3):
        state = fn(state)
        last, expected = expected, move(expected)
        total = total + last.T
        assert_equal(state, [expected, total])


def mapped(w: Tensor, path: Any) -> Any:
    """Map a tensor to a file; return the file's view of it."""
    np.zeros(len(w), dtype=np.float32).tofile(path)
    w.data = torch.from_file(str(path), shared=True, size=len(w))
    return np.memmap(path, dtype=np.float32, mode="r")


def shared(w: Tensor, _: Any) -> Any:
    """Move a tensor to shared memory; return the view that another process would have."""
    w.share_memory_()
    return torch.tensor([]).set_(torch.UntypedStorage._new_shared_filename_cpu(*handle(w)))


def handle(w: Tensor) -> Any:
    return w.untyped_storage()._share_filename_cpu_()


def from_numpy(w: Tensor, _: Any) -> Any:
    witness = np.zeros(len(w), dtype=np.float32)
    w.data = torch.from_numpy(witness)
    return witness


def saved_for_backward(w: Tensor, _: Any) -> Any:
    one = torch.ones((), requires_grad=True)
    product = (one * w).sum()  # the gradient by `one` is the sum of w
    return lambda: torch.autograd.grad(product, one, retain_graph=True)[0]


SEEN_BY: dict[str, Callable[[Tensor, Any], Any]] = {
    "view": lambda w, _: w[1:],
    "alias": lambda w, _: w.detach(),
    "data": lambda w, _: w.data,
    "numpy": lambda w, _: w.numpy(),
    "asarray": lambda w, _: np.asarray(w),
    "np.from_dlpack": lambda w, _: np.from_dlpack(w),
    "jnp.from_dlpack": lambda w, _: pytest.importorskip("jax.numpy").from_dlpack(w),
    "torch.from_dlpack": lambda w, _: torch.from_dlpack(w),
    "to_jax": lambda w, _: pytest.importorskip("jax") and interop.to_jax(w),
    "capsule": lambda w, _: (lambda c: lambda: torch.from_dlpack(c))(to_dlpack(w)),
    "memoryview": lambda w, _: memoryview(w.numpy()),
    "storage": lambda w, _: (lambda s: lambda: torch.tensor([]).set_(s))(w.untyped_storage()),
    "from_numpy": from_numpy,
    "from_file": mapped,
    "shared memory": shared,
    "backward": saved_for_backward,
}


@pytest.mark.parametrize("size", [4, 1 << 16], ids=["small", "large"])
@pytest.mark.parametrize("fits", [True, False], ids=["written", "not written"])
@pytest.mark.parametrize("other", SEEN_BY)
def test_memory_that_others_see_is_neither_written_to_nor_freed(
    other: str, fits: bool, size: int, plain_backend: None, tmp_path: Any
) -> None:
    w = torch.zeros(size)
    witness = SEEN_BY[other](w, tmp_path / "file")
    fn = jit(lambda w: w + 1 if fits else (w + 1).sum(), donate_argnums=0)
    result = fn(w)
    assert result.sum() == size
    filler = [torch.full((size,), 7.0) for _ in range(20)]  # into memory that was freed
    seen = witness() if callable(witness) else witness
    assert float(np.asarray(seen).sum()) == 0 and len(filler) == 20
    with pytest.raises(RuntimeError, match="donated to a jitted function"):
        w + 1
    del witness, seen
    again = fn(result) if fits else None
    assert again is None or again.sum() == 2 * size


def test_a_base_and_a_row_are_not_written_to(plain_backend: None) -> None:
    base, rows = torch.zeros(4), torch.zeros(2, 4)
    for w, witness in [(base.view(4), base), (rows[0], rows)]:
        assert jit(lambda w: w + 1, donate_argnums=0)(w).sum() == 4 and witness.sum() == 0


def test_memory_that_nobody_sees_any_more_is_reused(plain_backend: None) -> None:
    fn, w = jit(lambda w: w + 1, donate_argnums=0), torch.zeros(4)
    for look in (lambda w: np.from_dlpack(w), lambda w: w[1:], lambda w: w.detach()):
        assert float(look(w).sum()) >= 0
        before = w.data_ptr()
        w = fn(w)
        assert w.data_ptr() == before


class Stopped(BaseException):
    """Like KeyboardInterrupt, which would stop the tests."""


@pytest.mark.parametrize("fits", [True, False], ids=["written", "not written"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_call_leaves_the_old_values_or_none(
    when: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is raised once the program, which is not Python, has returned."""
    stopped = True

    def lower(graph: Any, *_: Any) -> Any:
        def program(inputs: list[Tensor]) -> Any:
            results = graph(*inputs) if when == "after" or not stopped else None
            if stopped:
                raise Stopped
            return results

        return program

    monkeypatch.setattr(_inductor, "lower", lower)
    fn = jit(lambda s: {"w": s["w"] + 1 if fits else (s["w"] + 1)[:2].clone()}, donate_argnums=0)
    for _ in range(2):  # while it is made, and when it has been
        state = {"w": torch.zeros(4)}
        stopped = True
        with pytest.raises(Stopped):
            fn(state)
        if fits:
            with pytest.raises(RuntimeError, match="donated to a jitted function"):
                state["w"].sum()
        else:
            assert state["w"].tolist() == [0.0] * 4
        stopped = False
        assert fn({"w": torch.zeros(4)})["w"].sum() == (4 if fits else 2)


def test_ctrl_c_in_a_long_program(plain_backend: None) -> None:
    """With a real signal, which arrives while operations run and is raised between two of them."""

    def interrupting(w: Tensor) -> Tensor:
        for _ in range(20):
            w = (w @ w).clamp(0, 1)
        return w

    fn, w = jit(interrupting, donate_argnums=0), torch.zeros(256, 256)
    w = fn(w)
    # In the background of a shell SIGINT is ignored, and the loop would have no end.
    old, deadline = signal.signal(signal.SIGINT, signal.default_int_handler), time.monotonic() + 60
    timer = threading.Timer(0.01, _thread.interrupt_main)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            while time.monotonic() < deadline:
                given = w
                w = fn(w)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)
    try:
        assert given.sum() == 0 or given is w
    except RuntimeError as error:
        assert "donated" in str(error)


def test_what_fails_while_it_runs_has_taken_its_arguments(plain_backend: None) -> None:
    """As with an index out of range: the memory may already have been written to."""
    fn = jit(lambda w, i: w + w[i].sum(), donate_argnums=0)
    w = fn(torch.zeros(4), torch.tensor([0]))
    with pytest.raises(IndexError):
        fn(w, torch.tensor([9]))
    with pytest.raises(RuntimeError, match="donated to a jitted function"):
        w.sum()


def test_donated_arguments_may_not_share_memory(plain_backend: None) -> None:
    w = torch.zeros(4)
    with pytest.raises(ValueError, match="shares memory with another argument"):
        jit(lambda a, b: (a + 1, b), donate_argnums=0)(w, w[:2])


def test_a_call_that_fails_takes_nothing(plain_backend: None) -> None:
    fn, w = jit(lambda w, x: w @ x, donate_argnums=(0,)), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        fn(w, torch.ones(3))
    assert w.sum() == 4


@pytest.mark.parametrize(
    "donate, args, match",
    [
        (2, 2, r"donate_argnums=\(2,\) must be positions of the 2 arguments"),
        ((0, -1), 2, r"donate_argnums=\(0, -1\) must be positions"),
        (0, "same", "donated tensor is passed twice"),
        ((0, 1), "same", "donated tensor is passed twice"),
    ],
    ids=["absent", "negative", "kept too", "donated twice"],
)
def test_donate_errors(donate: Any, args: Any, match: str) -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match=match):
        jit(lambda a, b: a["x"] + b, donate_argnums=donate)(
            {"x": x}, x if args == "same" else torch.ones(2)
        )
    assert x.sum() == 2


CLOSED = torch.ones(3)


def test_results_share_no_memory() -> None:
    def fn(x: Tensor, y: Tensor) -> dict[str, Any]:
        fresh = x + y
        return {
            "argument": x,
            "view": x[1:],
            "transposed": y.view(1, 3).T,
            "scan": scan(lambda c, z: (c, z), {"x": x}, y),
            "closed over": CLOSED,
            "twice": [fresh, fresh, x + y, fresh[:2]],
            "constants": [torch.zeros(3), torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])],
        }

    compiled = jit(fn)
    x, y = torch.arange(3.0), torch.arange(3.0, 6.0)
    for _ in range(2):  # the second call runs what the first one compiled
        got = compiled(x, y)
        assert_equal(got, fn(torch.arange(3.0), torch.arange(3.0, 6.0)))
        for leaf in tree.leaves(got):
            before = [other.clone() for other in tree.leaves(got) if other is not leaf]
            leaf.add_(100)
            after = [other for other in tree.leaves(got) if other is not leaf]
            assert_equal(after, before)
    assert torch.equal(x, torch.arange(3.0)) and torch.equal(y, torch.arange(3.0, 6.0))
    assert torch.equal(CLOSED, torch.ones(3))


@pytest.mark.parametrize("argnums", ["a", 1.0, None, [0, "b"], {0}])
def test_donate_argnums_are_positions(argnums: Any) -> None:
    with pytest.raises(TypeError, match="donate_argnums must be a position or a sequence of pos"):
        jit(lambda x: x, donate_argnums=argnums)
