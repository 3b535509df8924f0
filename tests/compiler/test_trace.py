"""Tracing: arguments and results of any shape and layout, closures, purity."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, jvp, vmap

from fdl import jit, nn, random, scan, tree
from fdl._compiler._graph import MOVE
from fdl._compiler._trace import trace
from tests.support.asserts import draw, unchanged

X = draw(1, 4, 3)
CLOSED = draw(2, 3)

pytestmark = pytest.mark.usefixtures("real_loops")


# -------------------------------------------------------------- equal to the function, every layout


def changes_its_own(x: Tensor) -> Tensor:
    y = x * 2
    y[0] = y[0] * 3
    part = y[1:]
    part.mul_(x[0])
    return y.add_(1)


def changes_its_own_in_a_body(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    new = carry.clone()
    new[1:] += x[1:]
    return new.mul_(0.5), x.clone().zero_()


def has_literals(x: Tensor) -> tuple[Any, ...]:
    changed = torch.tensor([1.0, 2.0])
    changed.add_(1)
    one = torch.tensor(1.0)
    one.add_(torch.tensor(2))
    return x + torch.tensor(3.0) + torch.tensor([1, 2, 3]) + torch.tensor([[0.5]]), changed, one


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x * 3
    return (x * scale + x.detach() ** 3).sum()


KEY = random.key(3)
DROPOUT = nn.dropout(0.5)

FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "empty trees": (lambda x, y: {"a": [], "b": (), "c": x, "d": y}, ({}, ((), []))),
    "no arguments": (lambda: (torch.zeros(2), torch.arange(3)), ()),
    "no results": (lambda x: (), (X,)),
    "0-d": (lambda x: (x + 1, x.view(1), scan(lambda c, z: (c * z, c), x, X[0])), (X[0, 0],)),
    "zero-size": (
        lambda x: (x * 2, x.sum(), x.T, scan(lambda c, row: (c + row.sum(), row), X[0, 0], x.T)),
        (X[:0],),
    ),
    "views": (
        lambda x: (x[None], x.T, x.expand(2, 4, 3), x[::2], x[0, 0], x.flip(0), x.detach(), x),
        (X,),
    ),
    "strides": (
        lambda a, b, c: (a + b.T, c * 2, c.sum(0), scan(lambda s, x: (s + x, s * x), c[0], c)),
        (X, X.reshape(3, 4), X[0].expand(4, 3)),
    ),
    "every other": (lambda a: scan(lambda s, x: (s + x, s), a[0], a), (draw(3, 4, 6)[:, ::2],)),
    "arguments that overlap": (lambda a, b: (a[1:] + b, a, b), (X, X[1:])),
    "the same twice": (lambda x: [x.exp()] * 2, (X,)),
    "dtypes": (
        lambda *xs: scan(
            lambda c, _: ([~c[0], *(z + 1 for z in c[1:])], c), list(xs), (), length=3
        ),
        (
            torch.tensor([True, False]),
            torch.tensor([0, 254], dtype=torch.uint8),
            torch.ones(2, dtype=torch.int16),
            torch.ones(2, dtype=torch.bfloat16),
            torch.ones(2, dtype=torch.float16),
        ),
    ),
    "changes its own": (changes_its_own, (X,)),
    "in a body": (lambda c, xs: scan(changes_its_own_in_a_body, c, xs), (X[0], X)),
    "one tensor added to several": (
        lambda x, y: torch._foreach_add([x, x.exp()], y[0, 0], alpha=2),
        (X, X),
    ),
    "grad": (grad(lambda x: changes_its_own(x).sin().sum()), (X,)),
    "vmap": (vmap(changes_its_own, 1, 1), (X,)),
    "vmap of grad": (vmap(grad(lambda x: changes_its_own(x).sin().sum())), (X,)),
    "grad of a jitted one": (grad(jit(lambda x: x.sin().sum())), (X,)),
    "vmap of a jitted one": (vmap(jit(lambda x: x.sin().sum())), (X,)),
    "without grad": (grad(without_grad), (X,)),
    "literals": (has_literals, (X,)),
    "literals in a body": (lambda xs: scan(lambda c, x: (c + 1, has_literals(x)), X, xs), (X,)),
    "closed over": (lambda x: (x + CLOSED, CLOSED, CLOSED[1:], CLOSED.sum()), (X,)),
    "closed over in a body": (
        lambda c: scan(lambda c, x: (c + x * CLOSED, (CLOSED, c)), c, X),
        (X[0],),
    ),
    "a carry that is closed over": (
        lambda x, xs: scan(lambda c, row: (c * x + row, (c - x, xs[0])), x, xs),
        (X[0], X),
    ),
    "views of one tensor closed over": (
        lambda x, xs: (
            scan(lambda c, row: (c + row * x * xs[0] + x[1:].sum(), c), x * 2, xs),
            scan(lambda c, row: ((c[0] + row, c[1]), (c[1], x)), (x, x), xs),
            torch.zeros(3).add_(1),
        ),
        (X[0], X),
    ),
    "a carry that is twice the same": (
        lambda x, xs: scan(lambda c, row: ((c[0] + row, c[1] * row), (c, x)), (x, x), xs),
        (X[0], X),
    ),
    "rows that are twice the same": (
        lambda xs: scan(lambda c, row: (c + row[0], row[1] * xs[1]), xs[0], (xs, xs)),
        (X,),
    ),
    "carries and rows that are transposed": (
        lambda x, xs: scan(
            lambda c, row: ((c[0] + row, c[1]), [z.reshape(-1) for z in (*c, row)]),
            (x, x.exp()),
            xs,
        ),
        (draw(3, 3, 2).T, draw(4, 4, 3, 2).mT),
    ),
    "a closed-over carry": (lambda: scan(lambda c, x: (c, x + c), CLOSED, X), ()),
    "keys": (
        lambda key, x: scan(
            lambda key, x: (random.split(key)[0], x * random.uniform(key, (3,))), key, x
        ),
        (KEY, X),
    ),
    "dropout": (
        lambda key, x: grad(lambda x: DROPOUT.apply({}, x, train=True, key=key).sum())(x),
        (KEY, X),
    ),
    "complex": (
        lambda z: (z * 1j, z.conj(), z.real, torch.view_as_real(z)),
        (torch.complex(X, X + 1),),
    ),
}
each = pytest.mark.parametrize("name", FUNCTIONS)


def assert_same(got: Any, expected: Any) -> None:
    assert tree.diff(expected, got, rtol=1e-12, atol=1e-14) == []


@pytest.mark.slow
@each
def test_traced_equals_eager(name: str, plain_backend: None) -> None:
    fn, args = FUNCTIONS[name]
    jitted = jit(fn)
    with unchanged(args, CLOSED, X):
        for _ in range(2):
            assert_same(jitted(*args), fn(*args))


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    functions = {name: row for name, row in FUNCTIONS.items() if name != "complex"}
    args = {name: row[1] for name, row in functions.items()}

    def everything(args: Any) -> Any:
        return {name: fn(*args[name]) for name, (fn, _) in functions.items()}

    jitted = jit(everything, strict=True)
    with unchanged(args, CLOSED, X):
        assert_same(jitted(args), everything(args))


def test_a_sign_that_is_yet_to_be_applied_is() -> None:
    """The imaginary part of a conjugate shares the memory of the number itself."""
    jitted = jit(lambda x: x * 2)
    for x in (X, torch.complex(X, X + 1).conj().imag, X):
        assert_same(jitted(x), x * 2)


def test_nested_jvp_of_a_row_is_traced_more_than_once(plain_backend: None) -> None:
    def first(x: Tensor) -> Tensor:
        return jvp(lambda x: (x * x).sin(), (x,), (torch.ones_like(x),))[1]

    def second(rows: Tensor) -> Tensor:
        return jvp(first, (rows[1],), (torch.ones_like(rows[1]),))[1]

    square = X[1] ** 2
    for _ in range(3):  # torch caches what it computes on fake tensors
        assert_same(jit(lambda rows: second(rows))(X), 2 * square.cos() - 4 * square * square.sin())


def test_keywords_are_arguments(plain_backend: None) -> None:
    jitted = jit(lambda x, *, minus, scale: (x - minus) * scale)
    got = jitted(X, scale=CLOSED, minus=X[0])
    assert_same(got, (X - X[0]) * CLOSED)
    assert_same(jitted(scale=X, x=X, minus=CLOSED), (X - CLOSED) * X)


def test_a_program_of_inference_mode_leaves_others_alone(plain_backend: None) -> None:
    jitted = jit(lambda x: scan(lambda c, z: (c + z, c), x[0], x))
    with torch.inference_mode():
        jitted(X)
    got, _ = jitted(X)
    assert not got.is_inference()
    got += 1


# ----------------------------------------------------------------------------- what is closed over


def test_closed_over_tensors_are_read_at_each_call(plain_backend: None) -> None:
    w, number, init = torch.ones(3), torch.tensor(2.0), torch.zeros(3)
    jitted = jit(lambda xs: (scan(lambda c, x: (c + w * x, number), init, xs), w))
    for _ in range(3):
        expected = init + 2 * w
        (last, ys), same = jitted(torch.ones(2, 3))
        assert torch.equal(last, expected) and torch.equal(ys, number.expand(2))
        assert torch.equal(same, w)
        w.mul_(3), number.add_(1), init.sub_(1)
    assert len(jitted.report()) == 1


def test_a_closed_over_tensor_of_another_signature_is_traced_again(plain_backend: None) -> None:
    w = torch.ones(3)
    jitted = jit(lambda x: x * w.sum())
    assert jitted(torch.tensor(2.0)) == 6
    w.data = torch.ones(5)
    assert jitted(torch.tensor(2.0)) == 10
    assert [r.why for r in jitted.report()] == [
        "the first call",
        "the closed-over tensors have another signature",
    ]


def test_a_closed_over_tensor_that_was_donated_raises(plain_backend: None) -> None:
    w = torch.ones(3)
    jitted, gives = jit(lambda x: x + w), jit(lambda w: w * 2, donate_argnums=0)
    jitted(X)
    with pytest.raises(ValueError, match="donated tensor is also closed over"):
        jit(lambda x: (x + w, w * 3), donate_argnums=0)(w)
    kept = jit(lambda x: x + w, donate_argnums=0)
    kept(torch.zeros(3))
    with pytest.raises(ValueError, match="donated tensor is also closed over"):
        kept(w)
    assert torch.equal(w, torch.ones(3))
    gives(w)
    with pytest.raises(RuntimeError, match="was donated to a jitted function"):
        jitted(X)


def test_a_closed_over_tensor_that_requires_grad_raises(plain_backend: None) -> None:
    w = torch.ones(3, requires_grad=True)
    jitted, x = jit(lambda x: x * w), torch.ones(3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"closes over a tensor that requires grad.*argument"):
            jitted(x)
        with pytest.raises(ValueError, match="closes over a tensor that requires grad"):
            jitted(x.clone().requires_grad_())
        with torch.no_grad():
            assert torch.equal(jitted(x), x)


# ------------------------------------------------------------------------------------------- purity


def changes_closed_over(x: Tensor) -> Tensor:
    CLOSED.add_(1)
    return x + CLOSED


def changes_the_enclosing(x: Tensor) -> Any:
    total = torch.zeros(3, dtype=x.dtype)

    def body(carry: Tensor, row: Tensor) -> tuple[Tensor, Any]:
        total.add_(row)
        return carry + row, ()

    return scan(body, x[0], x), total


IMPURE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "argument": (lambda x: x.mul_(2), r"changes x in place; a jitted function must be pure"),
    "view of it": (lambda x: (x[0].zero_(), x + 1)[1], r"changes x in place"),
    "through grad": (grad(lambda x: (x.detach().zero_(), x.sum())[1]), r"changes x in place"),
    "through vmap": (vmap(lambda x: x.add_(1)), r"changes x in place"),
    "in a dict": (lambda x, w=None: ({"a": x}["a"].add_(1), x)[1], "changes x in place"),
    "closed over": (changes_closed_over, "changes a closed-over tensor in place"),
    "number": (lambda x: (NUMBER.add_(1), x)[1], "changes a closed-over tensor in place"),
    "carry": (
        lambda x: scan(lambda c, row: (c.add_(row), ()), x[0], x),
        "changes the carry of a scan in place",
    ),
    "row": (
        lambda x: scan(lambda c, row: (c + row.mul_(2), ()), x[0], x),
        "changes the row of xs in a scan in place",
    ),
    "closed over in a body": (
        lambda x: scan(lambda c, row: (c + CLOSED.mul_(row), ()), x[0], x),
        "changes a closed-over tensor in place",
    ),
    "made outside the body": (changes_the_enclosing, "changes a closed-over tensor in place"),
}
NUMBER = torch.tensor(1.0)


@pytest.mark.parametrize("name", IMPURE)
def test_changing_what_it_has_not_made_raises(name: str) -> None:
    fn, match = IMPURE[name]
    with unchanged(X, CLOSED, NUMBER), pytest.raises(ValueError, match=match):
        jit(fn)(X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * float(CLOSED[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.as_tensor(x.numpy()),
        lambda x: torch.as_tensor(np.sin(x)),
    ],
    ids=["if", "closed over", "mask", "nonzero", "numpy", "a function of NumPy"],
)
def test_asking_for_values_raises(fn: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"jit: \S*<lambda> asks for the value of a tensor"):
        jit(fn)(X)


def test_what_is_changed_in_place_has_the_name_of_a_parameter() -> None:
    def step(params: dict[str, Tensor], *xs: Tensor, scale: Tensor) -> Tensor:
        params["w"].add_(1)
        xs[1].mul_(scale)
        return scale.sub_(1)

    with pytest.raises(ValueError, match=r"changes params\.w, xs\.1, scale in place"):
        jit(step)({"v": X, "w": X}, X, X + 1, scale=X)


def test_a_literal_is_made_on_the_device_it_is_moved_to() -> None:
    """A copy from the CPU could not be captured in a CUDA graph."""

    def fn(x: Tensor) -> list[Tensor]:
        return [torch.tensor([1.0, 2.0]).to("meta"), torch.tensor(3.0).to("meta"), x]

    leaves, spec = pytree.tree_flatten(((X,), {}))
    traced = trace(fn, leaves, spec)
    assert [leaf.device.type for leaf in traced.constants] == ["meta"]
    assert [leaf.device.type for leaf in traced.results] == ["meta", "meta", "cpu"]
    assert not any(node.target is MOVE for node in traced.graph.graph.nodes)
