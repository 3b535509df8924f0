"""Who owns the memory of what goes into a jitted function and comes out of it."""

from typing import Any

import numpy as np
import pytest
import torch
from laws import assert_equal
from torch import Tensor

from fdl import jit, scan, tree


def test_donated_tensors_are_gone_and_others_stay(plain_backend: None) -> None:
    fn = jit(lambda state, x: ({"w": state["w"] + x, "n": state["n"]}, x), donate=0)
    w, n, x = torch.zeros(3), torch.tensor(1), torch.ones(3)
    view = w[:2]
    state, same = fn({"w": w, "n": n}, x)
    for use in (lambda: w + 1, lambda: w.shape, lambda: n.item(), lambda: fn({"w": w, "n": n}, x)):
        with pytest.raises(RuntimeError, match=r"donated to a jitted function.*returned instead"):
            use()
    assert torch.equal(view, torch.zeros(2))
    assert torch.equal(x, torch.ones(3)) and torch.equal(same, x)
    state, _ = fn(state, x)  # what came back is as good as new
    assert torch.equal(state["w"], torch.full((3,), 2.0)) and state["n"] == 1


def addresses(state: Any) -> list[int]:
    return [leaf.data_ptr() for leaf in tree.leaves(state)]


def test_results_are_written_where_the_donated_tensors_were() -> None:
    """Swapped, passed through, of two forms, by Inductor: never a result that reads a new value."""
    fn = jit(
        lambda s, x: {"a": s["b"] + x, "b": s["a"] * s["b"], "c": s["c"], "n": s["n"] + 1}, donate=0
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


@pytest.mark.parametrize("other", ["view", "base", "numpy", "from_numpy", "row"])
def test_memory_that_others_see_is_not_written_to(other: str, plain_backend: None) -> None:
    w = torch.zeros(4)
    witness: Any = None
    if other == "view":
        witness = w[1:]
    elif other == "base":
        witness, w = w, w.view(4)
    elif other == "numpy":
        witness = w.numpy()
    elif other == "from_numpy":
        witness = np.zeros(4, dtype=np.float32)
        w = torch.from_numpy(witness)
    else:
        witness = torch.zeros(2, 4)
        w = witness[0]
    got = jit(lambda w: w + 1, donate=0)(w)
    assert got.sum() == 4 and float(witness.sum()) == 0


def test_donated_arguments_may_not_share_memory(plain_backend: None) -> None:
    w = torch.zeros(4)
    with pytest.raises(ValueError, match="shares memory with another argument"):
        jit(lambda a, b: (a + 1, b), donate=0)(w, w[:2])


def test_a_call_that_fails_takes_nothing(plain_backend: None) -> None:
    fn, w = jit(lambda w, x: w @ x, donate=(0,)), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        fn(w, torch.ones(3))
    assert w.sum() == 4


@pytest.mark.parametrize(
    "donate, args, match",
    [
        (2, 2, r"donate=\(2,\) must be positions of the 2 arguments"),
        ((0, -1), 2, r"donate=\(0, -1\) must be positions"),
        (0, "same", "donated tensor is passed twice"),
        ((0, 1), "same", "donated tensor is passed twice"),
    ],
    ids=["absent", "negative", "kept too", "donated twice"],
)
def test_donate_errors(donate: Any, args: Any, match: str) -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match=match):
        jit(lambda a, b: a["x"] + b, donate=donate)(
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
