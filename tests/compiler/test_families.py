"""Computations on many leaves are one kernel, and equal those on each leaf, bit by bit.

Oracle: the same computation jitted for each leaf alone, which is too few leaves for a family; and
eager torch to rounding.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fdl import jit, optim, scan, tree
from fdl._compiler._families import FEWEST
from fdl._torch_compat import RELEASE
from fdl.tree import Tree

SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (5,),
    (0,),
    (16,),
    (3, 7),
    (2, 0, 3),
    (17, 33),
    (64, 64),
    (2, 3, 4, 5),
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def leaves(
    dtype: torch.dtype = torch.float32, seed: int = 0, shapes: Any = SHAPES
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        str(i): torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for i, shape in enumerate(shapes)
    }


def positive(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.abs() for name, leaf in params.items()}


COMPUTATIONS: dict[str, Callable[..., Any]] = {
    "ema": lambda a, b: a * 0.9 + b * 0.1,
    "functions": lambda a, b: (torch.tanh(a) + b.exp()) / (a.abs().sqrt() + 1e-3),
    "masks": lambda a, b: torch.where(a > b, a, -0.0 * b),
    "negative zero": lambda a, b: a * 0 + (-0.0),
    "cast": lambda a, b: (a.double(), b.float() * 2, a > 0),
    "two results": lambda a, b: (a + b, (a + b) * a),
    "norms": lambda a, b: ((a.double() ** 2).sum(), b.sum()),
    "reshaped": lambda a, b: (a.reshape(-1) * 2 + b.flatten()).reshape(a.shape),
    "constants": lambda a, b: a + torch.ones_like(a) * 3 - torch.zeros_like(b),
    "an integer and a float": lambda a, b: (a + 1, b * 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_a_family_equals_each_leaf(name: str, dtype: torch.dtype):
    fn = COMPUTATIONS[name]
    a, b = leaves(dtype), leaves(dtype, 1)
    together = jit(lambda a, b: {key: fn(a[key], b[key]) for key in a}, strict=True)
    got = together(a, b)
    alone = jit(fn, strict=True)
    for key in a:
        for x, y in zip(tree.leaves(got[key]), tree.leaves(alone(a[key], b[key])), strict=True):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert torch.equal(x.view(-1).double(), y.view(-1).double()), (name, key)
            if RELEASE >= (2, 12):  # torch 2.11 alone loses the sign of a zero
                assert torch.equal(x.double().signbit(), y.double().signbit())
    wanted = {key: fn(a[key], b[key]) for key in a}
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-5)
    tree.map(
        lambda x, y: torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance), got, wanted
    )


@pytest.mark.slow
def test_an_update_of_200_leaves_is_four_kernels():
    shapes = [SHAPES[i % len(SHAPES)] for i in range(200)]
    params, grads = leaves(shapes=shapes), leaves(seed=1, shapes=shapes)
    params = {name: leaf.flatten().clone() for name, leaf in params.items()}
    grads = {name: leaf.flatten() for name, leaf in grads.items()}
    opt = optim.adam(1e-2)
    state = opt.init(params)

    def step(params: Tree, state: Tree, grads: Tree) -> Any:
        updates, state = opt.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    wanted = step(params, state, grads)
    jitted = jit(step, donate_argnums=(0, 1), strict=True)
    params, state = tree.map(torch.clone, (params, state))
    memory = {leaf.data_ptr() for leaf in tree.leaves(params) if leaf.numel()}
    got = jitted(params, state, grads)
    assert jitted.report()[0].kernels <= 4
    assert {leaf.data_ptr() for leaf in tree.leaves(got[0]) if leaf.numel()} == memory  # in place
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6), got, wanted)


def run_donated(fn: Callable[..., Any], *trees: Any) -> None:
    """Compare a function with its jitted form, which may write to the memory of all arguments."""
    wanted = fn(*trees)
    got = jit(fn, donate_argnums=tuple(range(len(trees))), strict=True)(
        *tree.map(torch.clone, trees)
    )
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6), got, wanted)


def of(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *trees: tree.map(fn, *trees)


ALIASING: dict[str, Callable[..., Any]] = {
    "in place": lambda a, b: (of(lambda x, y: x + 2 * y)(a, b), b),
    "swapped": lambda a, b: (b, a),
    "swapped after a step": lambda a, b: (of(lambda x, y: x + 2 * y)(a, b), a),
    "the other's memory": lambda a, b: (of(torch.exp)(b), of(torch.sin)(a)),
    "both need both": lambda a, b: (of(lambda x, y: x - y)(a, b), of(lambda x, y: x * y)(a, b)),
    "neighbours": lambda a, b: (
        {key: a[str((int(key) + 1) % len(a))].exp() for key in a},
        b,
    ),
    "read afterwards": lambda a, b: (of(lambda x, y: x + y)(a, b), of(lambda x: x.cumsum(0))(a)),
    "read by a product": lambda a, b: (of(lambda x, y: x + y)(a, b), of(lambda x, y: x @ y)(a, b)),
    "new values are read": lambda a, b: (
        new := of(lambda x, y: x + y)(a, b),
        of(lambda x: x @ x)(new),
    ),
    "an overwritten leaf is reduced": lambda a, b: (
        of(lambda x, y: x * y)(a, b),
        sum(x.sum() for x in a.values()) * b["0"],
    ),
    "a slice is read": lambda a, b: (
        of(lambda x, y: x + y)(a, b),
        of(lambda x: x * x[:1])(a),
    ),
    "one leaf used by all": lambda a, b: (of(lambda x: x * a["1"])(a), b),
    "tied": lambda a, b: ({key: a["0"] * y for key, y in b.items()}, a),
    "not contiguous": lambda a, b: (of(lambda x, y: x.T + y)(a, b), of(lambda x: x.T * 2)(b)),
    "a chain": lambda a, b: (of(lambda x: x + 1)(of(lambda x: x @ x)(of(lambda x: x * 2)(a))), b),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIASING)
def test_donated_memory_is_read_before_it_is_written(name: str):
    shapes = [(5, 5)] * (FEWEST + 2)
    run_donated(ALIASING[name], leaves(torch.float64, 0, shapes), leaves(torch.float64, 1, shapes))


@pytest.mark.slow
def test_leaves_that_are_not_contiguous():
    a = {str(i): torch.randn(6, 4).T for i in range(3)} | {
        str(i): torch.randn(4, 12)[:, ::2] for i in range(3, 9)
    }
    a |= {str(i): torch.randn(10)[i - 9 :] for i in range(9, 14)}
    fn = of(lambda x: x * 2 + 1)
    tree.map(
        lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0),
        jit(fn, strict=True)(a),
        fn(a),
    )


@pytest.mark.slow
def test_a_family_in_a_scan():
    a, xs = leaves(torch.float64), torch.randn(23, 4, dtype=torch.float64)

    def body(carry: Tree, x: Tensor) -> tuple[Tree, Tensor]:
        new = tree.map(lambda leaf: leaf * 0.9 + torch.tanh(leaf) * x.sum(), carry)
        return new, x @ x

    # Larger than what is unrolled.
    a = {key: leaf.reshape(-1).repeat(30) for key, leaf in a.items()} | {
        "large": torch.ones(5000).double()
    }
    wanted = scan(body, a, xs)
    jitted = jit(lambda carry, xs: scan(body, carry, xs), donate_argnums=0, strict=True)
    got = jitted(tree.map(torch.clone, a), xs)
    tree.map(lambda x, y: torch.testing.assert_close(x, y), got, wanted)
    assert jitted.report()[0].kernels < len(a)


@pytest.mark.slow
def test_several_threads_compute_the_same():
    shapes = [(1000 + 37 * i,) for i in range(400)]
    a, b = leaves(shapes=shapes), leaves(seed=1, shapes=shapes)
    fn = jit(of(lambda x, y: torch.tanh(x) * 0.9 + y), strict=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = fn(a, b)
        torch.set_num_threads(1)
        one = jit(of(lambda x, y: torch.tanh(x) * 0.9 + y), strict=True)(a, b)
    finally:
        torch.set_num_threads(threads)
    assert tree.map(torch.equal, several, one) == dict.fromkeys(a, True)
