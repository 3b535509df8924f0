"""`cond`, `switch`, `while_loop`, `fori_loop`, `associative_scan`: the laws of `jax.lax`."""

from collections.abc import Callable
from functools import reduce
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import fdl
from fdl import associative_scan, cond, fori_loop, jit, scan, switch, tree, while_loop
from fdl._compiler._signature import flatten, unflatten
from fdl._compiler._trace import trace
from tests.support.asserts import assert_equal, draw

W = draw(1, 3)
X = draw(2, 3).abs() + 0.1


class Traced:
    """Runs the graph that `jit` would compile, and keeps the names of its operations."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.operations: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        leaves, spec = flatten((args, {}))
        program = trace(self.f, leaves, spec)
        self.operations = {
            getattr(node.target, "__name__", "")
            for module in program.graph.modules()
            for node in getattr(getattr(module, "graph", None), "nodes", ())
        }
        return unflatten(program.graph(*leaves, *program.constants), program.spec)


RUNS: dict[str, Callable[..., Any]] = {"eager": lambda f: f, "traced": Traced}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


# ---------------------------------------------------------------------------------------- branches


def root(x: Tensor) -> Tensor:
    return cond(x > 0, torch.sqrt, torch.zeros_like, x)


def closed_root(x: Tensor) -> Tensor:
    return cond(x > 0, lambda: torch.sqrt(x), lambda: torch.zeros_like(x))


@runs
@pytest.mark.parametrize("f", [root, closed_root])
def test_a_branch_not_taken_does_not_spoil_gradients(run: Any, f: Callable[..., Tensor]) -> None:
    x = torch.tensor([4.0, 0.0, -1.0])
    expected = torch.tensor([0.25, 0.0, 0.0])
    assert_equal(run(vmap(grad(f)))(x), expected)
    assert_equal(run(grad(lambda x: vmap(f)(x).sum()))(x), expected)
    assert_equal(run(lambda x: jvp(vmap(f), (x,), (torch.ones(3),)))(x)[1], expected)
    second = torch.tensor([-1 / 32, 0.0, 0.0])
    assert_equal(run(vmap(grad(grad(f))))(x), second)


def rich(x: Tensor, y: Tensor) -> Tensor:
    """Branches with several results of mixed dtypes, closures, None and a static operand."""

    def yes(tensors: Any, factor: float) -> Any:
        a, b = tensors["a"], tensors["b"]
        return {"out": (a * b + W).sin() * factor, "n": torch.tensor(3), "none": None}

    def no(tensors: Any, factor: float) -> Any:
        return {"out": tensors["a"] - y.exp() * factor, "n": (y > 0).sum(), "none": None}

    result = cond(x.sum() > y.sum(), yes, no, {"a": x, "b": y}, 2.0)
    assert result["none"] is None
    return (result["out"] * result["n"]).sum()


def by_index(x: Tensor, y: Tensor) -> Tensor:
    branches = [torch.sin, torch.cos, lambda x: x * y, lambda x: x.clone(), torch.exp]
    return switch((x[0] * 4 - y[0]).long(), branches, x).sum()


def in_a_scan(x: Tensor, y: Tensor) -> Tensor:
    def step(c: Tensor, i: Tensor) -> Any:
        return cond(c.sum() > i, lambda c: c * 0.5 + W * i, lambda c: c * y + x, c), c.sum()

    return scan(step, x, torch.arange(8.0, dtype=torch.float64))[1].sum()


def in_a_branch(x: Tensor, y: Tensor) -> Tensor:
    def loop(c: Tensor) -> Tensor:
        return scan(lambda c, i: (c * y[i % 3], ()), c, torch.arange(6))[0]

    return cond(x.sum() > 1, loop, lambda c: cond(y[0] > 0, torch.sin, torch.neg, c), x).sum()


BRANCHES = [rich, by_index, in_a_scan, in_a_branch]


@pytest.mark.usefixtures("real_loops")
@pytest.mark.parametrize("f", BRANCHES)
def test_branches_equal_eager_ones_and_only_one_runs(f: Callable[..., Tensor]) -> None:
    def along(x: Tensor, y: Tensor) -> Tensor:
        return jvp(lambda x: grad(f)(x, y), (x,), (x + 1,))[1]

    for g in (f, grad(f, (0, 1)), along):
        for x, y in ((X, W), (X * 0.1, W + 1), (-X, W * -2)):
            traced = Traced(g)
            assert_equal(traced(x, y), g(x, y))
            assert "cond" in traced.operations
    xs = torch.stack([X, -X, X * 0.1, X + W])
    for g in (f, grad(f, (0, 1)), along):
        expected = tree.stack([g(x, W) for x in xs])
        assert_equal(vmap(g, (0, None))(xs, W), expected)
        assert_equal(Traced(vmap(g, (0, None)))(xs, W), expected)
        # The predicate does not depend on the member: still one branch.
        traced = Traced(lambda k, g=g: vmap(lambda k: tree.map(lambda z: z * k, g(X, W)))(k))
        assert_equal(traced(W), tree.stack([tree.map(lambda z, k=k: z * k, g(X, W)) for k in W]))


@runs
def test_an_index_is_clamped(run: Any) -> None:
    f = run(lambda i, x: switch(i, [torch.sin, torch.cos, torch.neg], x))
    for i, expected in ((-5, X.sin()), (0, X.sin()), (1, X.cos()), (2, -X), (9, -X)):
        assert_equal(f(torch.tensor(i), X), expected)
    assert_equal(switch(9, [torch.sin, torch.neg], X), -X)


def test_only_the_branch_that_is_taken_runs() -> None:
    def fail(x: Tensor) -> Tensor:
        raise AssertionError

    assert_equal(cond(torch.tensor(True), torch.neg, fail, X), -X)
    assert_equal(cond(False, fail, torch.neg, X), -X)
    assert_equal(vmap(lambda x: cond(torch.tensor(2), torch.neg, fail, x))(X), -X)
    out_of_range = Traced(lambda i, x: cond(i < 3, lambda: x[i], lambda: x[0] * 0))
    assert_equal(out_of_range(torch.tensor(7), X), X[0] * 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: cond(X, torch.sin, torch.cos, X),
            TypeError,
            r"pred must be a 0-d tensor, .*\[3\]",
        ),
        (lambda: cond("x", torch.sin, torch.cos, X), TypeError, "0-d tensor, got str"),
        (lambda: switch(0, [], X), ValueError, "branches must not be empty"),
        (lambda: switch(X[0], [torch.sin], X), TypeError, "index must be an int or a 0-d integer"),
    ],
)
def test_errors_of_branches(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_results_of_branches_must_be_alike() -> None:
    for no in (lambda x: x[:2], lambda x: x.float()):
        with pytest.raises(ValueError, match="must have the same structure, shapes and dtypes"):
            Traced(lambda x, no=no: cond(x[0] > 0, torch.sin, no, x))(X)
        with pytest.raises(ValueError, match="must have the same structure, shapes and dtypes"):
            vmap(lambda x, no=no: cond(x[0] > 0, torch.sin, no, x))(X[None])
    with pytest.raises(ValueError, match="result of false_fn"):
        Traced(lambda x: cond(x[0] > 0, torch.sin, lambda x: (x,), x))(X)
    with pytest.raises(ValueError, match="an operand of cond in place"):
        Traced(lambda x: cond(x[0] > 0, torch.sin, lambda x: x.zero_(), x))(X)


# ------------------------------------------------------------------------------------------- loops


def collatz(n: Tensor) -> Any:
    return while_loop(
        lambda c: c[0] > 1,
        lambda c: (torch.where(c[0] % 2 == 0, c[0] // 2, 3 * c[0] + 1), c[1] + 1),
        (n, torch.tensor(0)),
    )


@runs
def test_each_member_of_a_loop_stops_by_itself(run: Any) -> None:
    n = torch.tensor([1, 7, 4, 27])
    assert_equal(run(vmap(collatz))(n), (torch.ones_like(n), torch.tensor([0, 16, 2, 111])))
    assert_equal(run(collatz)(n[3]), (n[0], torch.tensor(111)))
    # A finished member keeps its carry, although its step is NaN; one without a turn as well.
    f = vmap(lambda x: while_loop(lambda x: x > 0, lambda x: x.sqrt() - 1, x))
    expected = torch.tensor([-1.0, 0.0, -0.5, 2**0.5 - 2])
    start = torch.tensor([-1.0, 1.0, -0.5, (2**0.5 - 1) ** 2])
    assert_equal(run(f)(start), torch.where(start > 0, expected, start))
    slopes = run(lambda x: jvp(f, (x,), (torch.ones(4),)))(start)[1]
    assert_equal(slopes, torch.where(start > 0, 0.5 / start.abs().sqrt(), 1.0))


def closed(x: Tensor) -> Tensor:
    return while_loop(lambda c: (c * W.abs()).sum() < 9, lambda c: c * 2 + W.abs() * x, x)


def nested(x: Tensor) -> Tensor:
    def body(c: Any) -> Any:
        turns, c = c
        c = fori_loop(0, 3, lambda i, z: z + W[i].abs() * z, c) * 1.1
        return turns + 1, cond(c[0] > c[1], lambda c: c * 1.5, lambda c: c.flip(0) * 1.2, c)

    return while_loop(lambda c: c[1].sum() < 50, body, (torch.tensor(0), x))[1]


def loop_in_a_scan(x: Tensor) -> Tensor:
    return scan(lambda c, r: (closed(c * 0.1 + r), c.sum()), x, torch.ones(6, 3).double())[1]


def newton(x: Tensor) -> Tensor:
    a = x[0]
    one = torch.ones_like(a)
    return while_loop(lambda y: (y * y - a).abs() > 1e-12, lambda y: (y + a / y) / 2, one)


@pytest.mark.usefixtures("real_loops")
@pytest.mark.parametrize("f", [closed, nested, loop_in_a_scan, newton])
def test_loops_equal_python_ones(f: Callable[[Tensor], Tensor]) -> None:
    xs = torch.stack([X, X * 2, X * 100])

    def along(x: Tensor) -> Tensor:
        return jvp(f, (x,), (x + 1,))[1]

    def twice(x: Tensor) -> Tensor:
        return jvp(along, (x,), (x * x,))[1]

    for g in (f, along, twice):
        traced = Traced(g)
        assert_equal(traced(X), g(X))
        assert "while_loop" in traced.operations
        expected = torch.stack([g(x) for x in xs])
        assert_equal(vmap(g)(xs), expected)
        assert_equal(Traced(vmap(g))(xs), expected)
    assert_equal(Traced(vmap(vmap(f)))(xs[None]), torch.stack([f(x) for x in xs])[None])
    assert_equal(
        Traced(lambda x: jvp(vmap(f), (x,), (x + 1,))[1])(xs), torch.stack([*map(along, xs)])
    )


def test_the_derivative_of_newtons_method() -> None:
    slope = jvp(newton, (X,), (torch.ones_like(X),))[1]
    assert_equal(slope, 0.5 / X[0].sqrt())


@runs
def test_no_gradient_in_reverse_mode(run: Any) -> None:
    for f in (closed, lambda x: while_loop(lambda c: c.sum() < 9, lambda c: c + x, X)):
        with pytest.raises(NotImplementedError, match="use fori_loop with ints or scan"):
            run(grad(lambda x, f=f: f(x).sum()))(X)
        with pytest.raises(NotImplementedError, match="use fori_loop with ints or scan"):
            run(vmap(grad(lambda x, f=f: f(x).sum())))(X[None])
    detached = run(grad(lambda x: (closed(x.detach()) * x).sum()))
    assert_equal(detached(X), closed(X))


@runs
def test_fori_loop_with_ints_and_tensors(run: Any) -> None:
    def loop(lower: Any, upper: Any, x: Tensor) -> Tensor:
        return fori_loop(lower, upper, lambda i, c: c * W.sum() + i * x, x)

    def by_hand(lower: int, upper: int, x: Tensor) -> Tensor:
        return reduce(lambda c, i: c * W.sum() + i * x, range(lower, upper), x)

    for lower, upper in ((0, 5), (-2, 3), (4, 4), (5, 2)):
        expected = by_hand(lower, upper, X)
        assert_equal(run(lambda x, a=lower, b=upper: loop(a, b, x))(X), expected)
        assert_equal(run(loop)(torch.tensor(lower), torch.tensor(upper), X), expected)
        assert_equal(run(lambda b, x, a=lower: loop(a, b, x))(torch.tensor(upper), X), expected)
        slopes = [
            grad(lambda x, f=f, a=lower, b=upper: f(a, b, x).sum())(X) for f in (loop, by_hand)
        ]
        assert_equal(*slopes)
    ends = torch.tensor([0, 5, 2])
    expected = torch.stack([by_hand(0, int(n), X) for n in ends])
    assert_equal(run(vmap(lambda n: loop(0, n, X)))(ends), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: while_loop(lambda x: x < 9, lambda x: x + 1, X), TypeError, "return a 0-d tensor"),
        (
            lambda: while_loop(lambda x: x[0] < 9, lambda x: x[:2], X),
            ValueError,
            "body_fun must keep",
        ),
        (lambda: while_loop(lambda x: True, lambda x: x, 3), TypeError, "every leaf of init"),
        (
            lambda: fori_loop(0, 2, lambda i, x: x.float(), X),
            ValueError,
            "fori_loop: body_fun must",
        ),
        (lambda: fori_loop(0, 2.0, lambda i, x: x, X), TypeError, "upper must be an int or a 0-d"),
    ],
)
def test_errors_of_loops(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    with pytest.raises(error, match=message):
        Traced(lambda x: (call(), x)[1])(X)


# ---------------------------------------------------------------------------------------- prefixes


def combine(x: Any, y: Any) -> Any:
    """Do not commute, on leaves of several dtypes."""
    return {"m": x["m"] @ y["m"], "last": y["last"], "n": x["n"] + y["n"]}


def elements(n: int) -> Any:
    return {
        "m": draw(3, n, 2, 2),
        "last": torch.arange(n, dtype=torch.int32),
        "n": torch.ones(n, dtype=torch.float16),
    }


@runs
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 9])
def test_prefixes_equal_a_loop(n: int, reverse: bool, run: Any) -> None:
    elems = elements(n)
    got = run(lambda e: associative_scan(combine, e, reverse=reverse))(elems)
    rows = [tree.map(lambda x, i=i: x[i], elems) for i in range(n)]
    rows = list(accumulate(rows[::-1] if reverse else rows, combine))
    expected = tree.stack(rows[::-1] if reverse else rows) if rows else elems
    assert_equal(got, expected)
    axis_last = tree.map(lambda x: x.movedim(0, -1), elems)

    def along_last(x: Any, y: Any) -> Any:
        first = tree.map(lambda z: z.movedim(-1, 0), (x, y))
        return tree.map(lambda z: z.movedim(0, -1), combine(*first))

    moved = run(lambda e: associative_scan(along_last, e, reverse, axis=-1))(axis_last)
    assert_equal(tree.map(lambda x: x.movedim(-1, 0), moved), expected)


@runs
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_derivatives_of_prefixes(n: int, run: Any) -> None:
    m = draw(4, n, 2, 2)

    def loss(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda m: (f(m).sin() * torch.arange(1.0, n + 1).view(n, 1, 1)).sum()

    first = loss(lambda m: associative_scan(torch.matmul, m))
    second = loss(lambda m: torch.stack(list(accumulate(m.unbind(), torch.matmul))))
    assert_equal(run(grad(first))(m), grad(second)(m))
    for f in (first, second):
        assert f(m).isfinite()
    along = [jvp(grad(f), (m,), (m + 1,))[1] for f in (first, second)]
    assert_equal(*along)
    assert_equal(run(lambda m: jvp(grad(first), (m,), (m + 1,))[1])(m), along[1])


def test_nan_stays_in_its_component_and_unused_results_have_no_gradient() -> None:
    x, y = draw(5, 6), draw(6, 6)
    y[2] = torch.nan

    def both(x: Tensor) -> Any:
        return associative_scan(lambda a, b: (a[0] * b[0], a[1] + b[1]), (x, y))

    assert both(x)[0].isfinite().all() and both(x)[1].isnan().tolist() == [False] * 2 + [True] * 4
    assert_equal(grad(lambda x: both(x)[0].sum())(x), grad(lambda x: x.cumprod(0).sum())(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: associative_scan(torch.add, (X, X[:2])),
            ValueError,
            "one common size along axis 0",
        ),
        (
            lambda: associative_scan(torch.add, X, axis=1),
            ValueError,
            "one common size along axis 1",
        ),
        (lambda: associative_scan(lambda x, y: x[:0], X), ValueError, "fn must keep the structure"),
        (lambda: associative_scan(torch.add, [1]), TypeError, "every leaf of elems"),
    ],
)
def test_errors_of_prefixes(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.usefixtures("real_loops")
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: Tensor, y: Tensor) -> Any:
        xs = torch.stack([x, x * 2, x * 100])
        return (
            [grad(g, (0, 1))(x, y) for g in (rich, in_a_scan)],
            [vmap(closed)(xs), nested(x), jvp(loop_in_a_scan, (x,), (y,))],
            vmap(grad(lambda x: root(x[0])))(xs),
            fori_loop(torch.tensor(0), (y * 3).long().abs().sum(), lambda i, c: c * 0.9 + i, x),
            associative_scan(combine, elements(5)),
        )

    compiled = jit(f, strict=True)
    for x, y in ((X, W), (X * 0.1, W + 1)):  # the loops end for positive x only
        assert_equal(compiled(x, y), f(x, y))
    monkeypatch.setenv("FDL_JIT", "0")
    assert_equal(compiled(X, W), f(X, W))
    assert [report.route for report in compiled.report()] == ["one program"]


@pytest.mark.slow
@pytest.mark.usefixtures("real_loops")
def test_the_same_value_twice() -> None:
    """Equal results of branches, carries, rows and initial values have memory of their own."""

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y

    def f(x: Tensor, n: Tensor) -> Any:
        rows, same = torch.arange(3.0, dtype=x.dtype), (x * 3, x * 3)
        return (
            cond(n > 0, twice, lambda c: (c, c + 1), x),
            cond(n > 0, lambda c: (c * 2, c * 2), lambda c: (c, c), x),
            cond(n > 0, lambda c: 2 * ((c * 2)[:1],), lambda c: (c[:1], c[1:2]), x),
            while_loop(lambda c: c[2] < 4, lambda c: (*twice(c[0] + c[1]), c[2] + 1), (*same, n)),
            scan(lambda c, row: (twice(c[0] + c[1] * row), twice(c[0])), same, rows),
            scan(lambda c, row: ((c[0] * 2 + row, c[1]), c), (x, x), rows),
            scan(lambda c, row: ((c[0] + x, c[1] - row), c), (0 * x.detach(), 0 * x), rows),
        )

    compiled = jit(f, strict=True)
    for n in (torch.tensor(1), torch.tensor(-1)):
        assert_equal(compiled(X, n), f(X, n))
        for leaf in tree.leaves(compiled(X, n)):
            leaf.add_(1)  # changes nothing else
        assert_equal(compiled(X, n), f(X, n))


def test_a_program_stops_early(plain_backend: None) -> None:
    turns = fdl.jit(
        lambda n: while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] + 2), (n * 0, n))
    )
    assert_equal(turns(torch.tensor(4)), (torch.tensor(4), torch.tensor(12)))


@pytest.mark.slow
@pytest.mark.parametrize("donate", [(), 0])
def test_results_have_memory_of_their_own_without_a_turn(donate: Any) -> None:
    """Of a loop that stops at once, and of a branch that returns what it is given."""
    weight = torch.ones(3)

    def stopped(x: Tensor, n: Tensor) -> Any:
        halve = lambda c: (c[0] / 2, c[1] - 1)  # noqa: E731
        y = x * 1.5
        loops = [while_loop(lambda c: c[1] > 0, halve, (z, n))[0] for z in (x, y, weight)]
        return *loops, y, fdl.cond(n > 0, lambda x: x * 2, lambda x: x, x)

    fn, n = fdl.jit(stopped, donate_argnums=donate), torch.tensor(0)
    assert_equal(fn(torch.ones(3), torch.tensor(1))[1], torch.full((3,), 0.75))
    x = torch.ones(3)
    results = fn(x, n)
    memory = [z.untyped_storage().data_ptr() for z in (*results, weight, *[x] * (donate == ()))]
    assert len(set(memory)) == len(memory)
    assert_equal(results, (*(torch.full((3,), z) for z in (1.0, 1.5, 1.0, 1.5, 1.0)),))
