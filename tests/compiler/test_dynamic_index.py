"""Indices that are tensors: what eager torch does, in a trace, under transformations, in loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

from fdl import jit, scan, tree
from fdl._compiler._counters import Counters
from fdl._compiler._signature import flatten, unflatten
from fdl._compiler._trace import trace
from fdl._torch_compat import RELEASE
from tests.support.asserts import assert_equal, draw

X = draw(1, 2, 3, 4)
AT, BACK = torch.tensor(1), torch.tensor(-2)
ROWS = torch.tensor([0, 2, 1])
EDGES = torch.tensor([1, 3])


def traced(f: Callable[..., Any]) -> Callable[..., Any]:
    """Run the graph that `jit` would compile."""

    def call(*args: Any) -> Any:
        leaves, spec = flatten((args, {}))
        program = trace(f, leaves, spec)
        return unflatten(program.graph(*leaves, *program.constants), program.spec)

    return call


# ------------------------------------------------------------------------------------ reads, writes

READS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "x[i]": lambda x, i, j: x[i],
    "x[j]": lambda x, i, j: x[j],
    "x[:, i]": lambda x, i, j: x[:, i],
    "x[i, :, j]": lambda x, i, j: x[i, :, j],
    "x[..., j]": lambda x, i, j: x[..., j],
    "x[i, rows]": lambda x, i, j: x[i, ROWS],
    "x[i, :, rows]": lambda x, i, j: x[i, :, ROWS],
    "x[rows, :, i]": lambda x, i, j: x[ROWS[:2] * 0, :, i],
    "None": lambda x, i, j: x[None, i, ..., None, j],
    "list": lambda x, i, j: x[:, [0, j, i]],
    "nested list": lambda x, i, j: x[[[0, i], [i, 0]], [[j], [i]]],
    "closed over": lambda x, i, j: x[AT],
    "made inside": lambda x, i, j: x[torch.tensor(1)],
    "int8": lambda x, i, j: x[i.to(torch.int8)],
    "int32": lambda x, i, j: x[:, j.to(torch.int32)],
    "x[:, i:i + 2]": lambda x, i, j: x[:, i : i + 2],
    "x[i * 1:(i + 1) * 1]": lambda x, i, j: x[i * 1 : (i + 1) * 1],
    "step": lambda x, i, j: x[..., i - 1 : i + 3 : 2],
    "from the end": lambda x, i, j: x[..., j - 1 : j + 1],
    "window": lambda x, i, j: x[..., -1 + i : i],
    "two counters": lambda x, i, j: x[..., i * 3 + j : i * 3 + j + 2],
    "rsub": lambda x, i, j: x[..., 2 - i : -i + 5],
    "one edge read twice": lambda x, i, j: x[..., EDGES[0] : EDGES[0] + 2],
    "empty": lambda x, i, j: x[:, i:i],
    "narrow": lambda x, i, j: torch.narrow(x, 2, j, 2),
    "x.narrow": lambda x, i, j: x.narrow(dim=-1, start=i, length=3),
    "narrow, uint8": lambda x, i, j: x.narrow(1, i.to(torch.uint8), 1),
    "x.select": lambda x, i, j: x.select(-1, j),
    "select": lambda x, i, j: torch.select(x, dim=1, index=i),
    "take": lambda x, i, j: torch.take(x, j),
    "index_select": lambda x, i, j: x.index_select(1, i),
}


def zero(x: Tensor, i: Tensor, j: Tensor) -> None:
    x[i] = 0.0


def add(x: Tensor, i: Tensor, j: Tensor) -> None:
    x[i] += x[i - 1]


def broadcast(x: Tensor, i: Tensor, j: Tensor) -> None:
    x[:, i] = x[0, 0]


def two_axes(x: Tensor, i: Tensor, j: Tensor) -> None:
    x[i, :, j] = x[0, :, 0]
    x[i, j] = 5


def with_rows(x: Tensor, i: Tensor, j: Tensor) -> None:
    x[i, :, ROWS] = x[0, :, :3] * 3
    x[[0, i], :, i : i + 2] = x[0, 0, :2] * 7


def with_mask(x: Tensor, i: Tensor, j: Tensor) -> None:
    x[i, x[0] > 0] = -1


def a_slice(x: Tensor, i: Tensor, j: Tensor) -> None:
    x[:, i : i + 2, j] *= 3
    x[i, ..., i : i + 2] = x[i, :, 0:1]


def chained(x: Tensor, i: Tensor, j: Tensor) -> None:
    x[i][j] = 7.0
    x[i][0].add_(5)


def view_after_change(x: Tensor, i: Tensor, j: Tensor) -> None:
    row = x[i]
    x.mul_(2)
    x[0] = row


def views(x: Tensor, i: Tensor, j: Tensor) -> None:
    row = x[i]
    row += 1
    x[i] *= 2
    x[0, 0] = row[0]
    x[1, 1] = row[1].neg_()


def views_of_views(x: Tensor, i: Tensor, j: Tensor) -> None:
    row = x[i]
    element = row[j]
    element.mul_(2)
    row.add_(1)
    x[0, 0], x[0, 1] = element, row[0]


def methods(x: Tensor, i: Tensor, j: Tensor) -> None:
    x.select(0, i).zero_()
    x.narrow(1, i, 2).copy_(x[0, 0])


def copies(x: Tensor, i: Tensor, j: Tensor) -> None:
    """Change copies in place: `x` is as it was."""
    x[i, ROWS].zero_()
    x[:, [0, i]].zero_()
    x.index_select(0, i).zero_()
    x.take(i).add_(4)


def changed_counter(x: Tensor, i: Tensor, j: Tensor) -> None:
    k = i.clone()
    end = k + 1
    k -= 1
    x[0, k : k + 2] = 3.0
    x[0, end : end + 1] = 4.0


WRITES = [
    *(zero, add, broadcast, two_axes, with_rows, with_mask, a_slice, chained, view_after_change),
    *(views, views_of_views, methods, copies, changed_counter),
]


def on_a_copy(write: Callable[..., None]) -> Callable[..., Tensor]:
    def f(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        x = x.clone()
        write(x, i, j)
        return x

    return f


NO_FORWARD_MODE = ("zero", "two_axes", "chained", "changed_counter")  # in torch 2.11
CASES = READS | {f.__name__: on_a_copy(f) for f in WRITES}
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_equals_eager_and_so_do_derivatives(name: str) -> None:
    f = CASES[name]

    def loss(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (f(x, i, j) ** 2).sum()

    def along(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return jvp(lambda x: grad(loss)(x, i, j), (x,), (x + 1,))[1]

    has_forward_mode = name not in NO_FORWARD_MODE or RELEASE >= (2, 12)
    for g in (f, grad(loss), along)[: 2 + has_forward_mode]:
        assert_equal(traced(g)(X, AT, BACK), g(X, AT, BACK))


@cases
def test_under_vmap_each_member_has_its_own_index(name: str) -> None:
    if name == "with_mask" and RELEASE < (2, 12):
        pytest.skip("vmap takes no mask in torch 2.11")
    f = CASES[name]
    in_range = (
        torch.tensor([1, 1, 0]) if name in ("x[i]", "x[:, i]", "add") else torch.tensor([1, 1])
    )
    n = len(in_range)
    xs, js = torch.stack([X, X + 1, X - 1])[:n], torch.tensor([-2, -1, -2])[:n]
    if "end" in name or name == "narrow":
        js = js[::2].expand(n) if n == 2 else js * 0 - 2
    for dims in [(0, 0, None), (0, None, 0), (0, 0, 0), (None, 0, 0)]:
        if dims[0] is None and name not in READS:
            continue  # as in eager torch, a write into an unbatched tensor is an error
        args = [
            a if d == 0 else b
            for d, a, b in zip(dims, (xs, in_range, js), (X, AT, BACK), strict=True)
        ]

        def loop(g: Callable[..., Tensor], dims: Any = dims, args: Any = args) -> Tensor:
            rows = zip(
                *(a if d == 0 else [a] * n for d, a in zip(dims, args, strict=True)), strict=True
            )
            return torch.stack([g(*row) for row in rows])

        def slope(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return grad(lambda x: (f(x, i, j) ** 2).sum())(x)

        for g in (f, slope):
            assert_equal(traced(vmap(g, in_dims=dims))(*args), loop(g))


@st.composite
def indices(draw: Any) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Draw a shape and an index, in which an int in brackets stands for a 0-d tensor."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    index: list[Any] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        number = st.integers(-size, size - 1)
        item: Any = draw(st.one_of(number, number.map(lambda k: [k]), st.just(slice(None))))
        index += [None] * draw(st.integers(0, 1)) + [item]
    if draw(st.booleans()):
        index.append(...)
    if draw(st.booleans()):
        index[draw(st.integers(0, len(index))) :] = []
    return shape, tuple(index)


@settings(max_examples=40, deadline=None)
@given(indices(), st.sampled_from([torch.int64, torch.int32, torch.int16]))
def test_any_index_reads_and_writes_as_in_eager_torch(drawn: Any, dtype: torch.dtype) -> None:
    shape, index = drawn
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    numbers = [torch.tensor(item[0], dtype=dtype) for item in index if isinstance(item, list)]

    def f(x: Tensor, numbers: list[Tensor]) -> tuple[Tensor, Tensor]:
        rest = iter(numbers)
        at = tuple(next(rest) if isinstance(item, list) else item for item in index)
        new = x.clone()
        new[at] = x[at] * 2 + 1
        return x[at].clone(), new

    assert_equal(traced(f)(x, numbers), f(x, numbers))


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("f", "i"),
    [
        (lambda x, i: x[i], 2),
        (lambda x, i: x[i], -3),
        (lambda x, i: x[:, i], 3),
        (lambda x, i: x[:, i : i + 2], 2),  # eager torch cuts it off: one column
        (lambda x, i: x[:, i : i + 2], -2),  # eager torch: x[:, -2:0], none
        (lambda x, i: x[:, i : i + 2], -4),
        (lambda x, i: x.narrow(1, i, 2), 2),
        (lambda x, i: x.narrow(1, i, 2), -4),
        (lambda x, i: x.select(0, i), 2),
        (lambda x, i: on_a_copy(zero)(x, i, i), 2),
        (lambda x, i: on_a_copy(a_slice)(x, i, i), -4),
    ],
)
def test_positions_out_of_range_are_errors(f: Callable[..., Tensor], i: int) -> None:
    with pytest.raises(IndexError, match="out of range: expected"):
        traced(f)(X, torch.tensor(i))


def test_a_slice_longer_than_the_axis_is_an_error_at_once() -> None:
    with pytest.raises(
        IndexError, match=r"a slice of 5 elements leaves axis 1 of shape \[2, 3, 4\]"
    ):
        traced(lambda x, i: x[:, i : i + 5])(X, AT)
    with pytest.raises(IndexError, match="too many indices for tensor of dimension 3"):
        traced(lambda x, i: x[i, i, i, i])(X, AT)
    with pytest.raises(IndexError, match="Dimension out of range"):
        traced(lambda x, i: x.select(3, i))(X, AT)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, i: x[:i],
        lambda x, i: x[i:],
        lambda x, i: x[:, i : 2 * i],
        lambda x, i: x[i + 1 : i],
        lambda x, i: x[i : i + x.long()[0, 0, 0]],
        lambda x, i: x[0 : i - i + 1],
    ],
)
def test_a_slice_of_unknown_length_names_the_line_and_narrow(f: Callable[..., Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"at test_dynamic_index.py:\d+: .* torch.narrow\(x"):
        traced(f)(X, AT)


def test_bytes_and_bools_are_masks_as_in_eager_torch() -> None:
    for dtype in (torch.bool, torch.uint8):
        with pytest.raises(
            RuntimeError, match=r"asks for the value of a tensor \(.*boolean index\)"
        ):
            traced(lambda x, i: x[i])(X, AT.to(dtype))


def test_python_sequences_ask_for_values() -> None:
    with pytest.raises(RuntimeError, match="asks for the value of a tensor"):
        traced(lambda x, i: x * [1, 2, 3][i])(X, AT)


def test_functions_that_read_a_tensor_as_numbers_ask_for_values() -> None:
    with pytest.raises(RuntimeError, match=r"value of a tensor .* at test_dynamic_index.py:\d+"):
        traced(lambda x, i: torch.tensor_split(x, i.expand(2)))(X, AT)


def test_an_argument_is_not_changed_through_an_index() -> None:
    with pytest.raises(ValueError, match="in place"):
        traced(lambda x, i: x[i].zero_())(X, AT)


# ---------------------------------------------------------------------------------------- in loops


def walk(x: Tensor, w: Tensor) -> Any:
    def body(carry: Any, i: Tensor) -> Any:
        state, total = carry
        total = total.clone()
        total[i] += (x[i] @ w).sum()
        block = x[i : i + 2] + x[:, i : i + 1].mean()
        return (state * 0.5 + x[i], total), (block.sum(), total[i])

    return scan(body, (torch.zeros_like(w[0]), torch.zeros_like(w[0])), torch.arange(11))


def norm(x: Tensor, w: Tensor) -> Tensor:
    (state, total), (blocks, _) = walk(x, w)
    return (state**2).sum() + (total * blocks.sum()).sum()


LOOPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scan": walk,
    "grad of scan": grad(norm, (0, 1)),
    "vmap of scan": lambda x, w: vmap(walk)(torch.stack([x, x * 2]), torch.stack([w, w + 1])),
    "scan of grad": lambda x, w: scan(
        lambda c, i: (c - 0.1 * grad(lambda c: (c[i] * x[i]).sum())(c), c[i]), w, torch.arange(12)
    ),
}


@pytest.mark.usefixtures("real_loops")
@pytest.mark.parametrize("name", LOOPS)
def test_counters_of_loops(name: str, plain_backend: None) -> None:
    x, w = draw(3, 12, 12), draw(4, 12, 12)
    assert_equal(jit(LOOPS[name])(x, w), LOOPS[name](x, w), 1e-5)


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = draw(3, 12, 12), draw(4, 12, 12)

    def f(x: Tensor, w: Tensor, i: Tensor, j: Tensor) -> Any:
        y = x[:6].view(2, 3, 12)
        reads = {name: READS[name](y, i, j) for name in ("x[i, :, rows]", "step", "narrow", "list")}
        return reads, on_a_copy(with_rows)(y, i, j), walk(x, w), grad(norm)(x, w)

    compiled = jit(f, strict=True)
    assert_equal(compiled(x, w, AT, BACK), f(x, w, AT, BACK), 1e-5)
    with pytest.raises(IndexError, match="out of range"):
        compiled(x, w, AT + 2, BACK)
    monkeypatch.setenv("FDL_JIT", "0")
    assert tree.allclose(compiled(x, w, AT, BACK), f(x, w, AT, BACK))


# ----------------------------------------------------------------------------------------- counters


def test_differences_that_do_not_depend_on_values() -> None:
    counters, i, k = Counters(), torch.tensor(3), torch.tensor(4)

    def call(name: str, *args: Any) -> Tensor:
        result = torch.tensor(0)
        counters.note(name, args, result)
        return result

    nearly = call("add", call("mul", i, 8), call("mul", 2, k))
    assert counters.difference(call("sub", nearly, 5), nearly) == -5
    assert counters.difference(call("__rsub__", i, 7), call("neg", i)) == 7
    assert counters.difference(call("mul", i, i), call("mul", i, i)) is None
    assert counters.difference(call("mul", i, 2), i) is None
    assert counters.difference(i, k) is None
    assert counters.difference(call("getitem", i, 0), call("getitem", i, 0)) == 0
    assert counters.difference(call("getitem", i, 0), call("getitem", i, 1)) is None
    before = call("add", i, 1)
    counters.forget()
    assert counters.difference(before, i) is None


def test_one_hot_checks_labels_and_takes_closed_over_ones() -> None:
    labels = torch.tensor([[1, 2], [0, 3]])
    for fn in (lambda x, i: x + F.one_hot(labels, 6), lambda x, i: F.one_hot(labels + i[:1], 6)):
        i = torch.tensor([1, 1])
        assert_equal(traced(fn)(torch.zeros(6), i), fn(torch.zeros(6), i))
    for fn in (lambda x, i: F.one_hot(labels, 3), lambda x, i: F.one_hot(i, 3)):
        with pytest.raises(IndexError, match="0 <= index < 3"):
            traced(fn)(torch.zeros(3), labels)
    with pytest.raises(RuntimeError, match="LongTensor"):
        traced(lambda x, i: F.one_hot(i.int(), 6))(torch.zeros(3), labels)
    with pytest.raises(RuntimeError, match="asks for the value of a tensor"):
        traced(lambda x, i: F.one_hot(i))(torch.zeros(3), labels)


def test_one_hot_under_a_gradient() -> None:
    fn = grad(lambda x: (F.one_hot(x.argmax(-1), 4) * x).sum())
    assert_equal(traced(lambda x, i: fn(x))(X[0], AT), fn(X[0]))
