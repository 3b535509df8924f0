"""Rewritten programs equal the function: a table for each rewrite.

Oracle: the same function run by eager torch, values and derivatives. A rule of `_passes` without a
table fails.
"""

from collections.abc import Callable, Iterator
from itertools import chain, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp

from fdl import jit, scan, tree
from fdl._compiler._passes import RULES, RULES_OF_PRODUCTS, TINY
from fdl._compiler._products import LONGEST, SMALL
from fdl._compiler._rows import LONGEST as LONGEST_ROW

aten = torch.ops.aten

Case = tuple[Callable[..., Any], tuple[Tensor, ...]]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}


def some(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def below(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(high + len(shape)))


def with_derivative(fn: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the value, and the gradients for a cotangent whose entries all differ."""

    def both(*args: Tensor) -> Any:
        wanted = [i for i, x in enumerate(args) if x.is_floating_point()]

        def of_wanted(*xs: Tensor) -> Tensor:
            given = dict(zip(wanted, xs, strict=True))
            return fn(*(given.get(i, x) for i, x in enumerate(args)))

        if not wanted:
            return fn(*args)
        out, pull = vjp(of_wanted, *(args[i] for i in wanted))
        return out, pull((torch.arange(out.numel()).reshape(out.shape) % 7 - 2.5).to(out.dtype))

    return both


def check(cases: dict[str, Case]) -> None:
    """Compile all cases as one program, and compare it with what eager torch computes."""
    functions = {name: with_derivative(fn) for name, (fn, _) in cases.items()}

    def everything(args: dict[str, tuple[Tensor, ...]]) -> Any:
        return {name: fn(*args[name]) for name, fn in functions.items()}

    args = {name: row[1] for name, row in cases.items()}
    got = jit(everything, strict=True)(args)
    for name, fn in functions.items():
        for a, b in zip(tree.leaves(got[name]), tree.leaves(fn(*args[name])), strict=True):
            tolerance = TOLERANCE.get(b.dtype, 1e-12)
            scale = b.abs().max().item() if b.numel() else 0
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance * (1 + scale), equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


# -------------------------------------------------------------------------------- rules of a graph


def products(with_bias: bool) -> Iterator[tuple[str, Case]]:
    sizes = {"tiny": (3, 4, 5), "larger": (20, 30, 40), "empty sum": (3, 0, 4), "row": (1, 70, 80)}
    assert SMALL > 20 * 30 * 40 > TINY > 3 * 4 * 5
    for dtype, (size, (m, k, n)) in product((*INTEGERS, *FLOATS), sizes.items()):
        whole = dtype in (torch.float32, torch.float64)
        if not whole and (size == "row" or (size != "tiny" and dtype in INTEGERS)):
            continue

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return some(*shape, dtype=dtype)

        name = f"{dtype}, {size}".removeprefix("torch.")
        if not with_bias:
            yield name, (torch.mm, (new(m, k), new(k, n)))
            if dtype == torch.float32 or size == "tiny":
                yield f"{name}, strides", (torch.mm, (new(k, m).T, new(2 * k, n)[::2]))
                expanded = new(1, m).expand(k, m)
                yield f"{name}, expanded", (lambda a, b: a.T @ b, (expanded, new(k, n)))
            continue
        every = [(), (1,), (n,), (m, 1), (1, n), (m, n)]
        for shape in every if dtype == torch.float32 else [(n,)]:
            row = (new(*shape), new(m, k), new(k, n))
            yield f"{name}, bias {shape}", (torch.addmm, row)
        if whole or size == "tiny":
            yield f"{name}, scaled", (lambda c, a, b: torch.addmm(c, a, b, beta=2, alpha=3), row)


def small_and_large() -> Iterator[tuple[str, Case]]:
    """Products of shapes at which the loop of `fdl::product` takes another path."""
    sizes = {
        "few rows": (3, 40, 50), "rows left over": (13, 33, 31), "one column": (80, 70, 1),
        "17 columns": (9, 40, 17), "49 columns": (20, 20, 49), "one term": (90, 1, 80),
        "longest sum": (3, LONGEST, 4), "a longer one": (3, LONGEST + 1, 4),
        "large": (110, 100, 100), "narrow and long": (250, 784, 10),
        "few long rows": (10, 250, 784), "for threads": (131, 67, 83),
        "pairs of rows": (131, 515, 9), "pairs, three columns": (33, 70, 3),
    }  # fmt: skip
    assert SMALL < 110 * 100 * 100
    for name, (m, k, n) in sizes.items():
        layouts = {
            "": ((m, k), (k, n)),
            ", a transposed": ((k, m), (k, n)),
            ", b transposed": ((m, k), (n, k)),
        }
        for strides, (a, b) in layouts.items():
            x, y = some(*a, dtype=torch.float32), some(*b, dtype=torch.float32)
            x, y = (x.T if a != (m, k) else x), (y.T if b != (k, n) else y)
            yield f"{name}{strides}", (torch.mm, (x, y))
            bias = some(n, dtype=torch.float32)
            yield f"{name}{strides}, with a bias", (torch.addmm, (bias, x, y))
    x = some(30, 3 * 40, dtype=torch.float32)
    yield "columns of a larger one", (lambda x: x[3:, 40:80].T @ x[3:, :40], (x,))


def batches() -> Iterator[tuple[str, Case]]:
    for dtype, (b, m, k, n) in product(
        (torch.float16, torch.float32, torch.float64, torch.int64),
        ((1, 3, 4, 5), (6, 9, 17, 20), (2, 0, 3, 4), (3, 4, 0, 5), (40, 30, 33, 31)),
    ):
        x, y = some(b, m, k, dtype=dtype), some(b, k, n, dtype=dtype)
        name = f"{dtype}, {b} of {m} × {k} × {n}".removeprefix("torch.")
        yield name, (torch.bmm, (x, y))
        yield f"{name}, strides", (lambda x, y: x.mT @ y.mT, (x.mT.contiguous(), y.mT.contiguous()))
        yield f"{name}, one for all", (lambda x, y: x @ y[:1].expand_as(y), (x, y))
    heads = some(5, 7, 3 * 2 * 8, dtype=torch.float32)

    def attention(x: Tensor) -> Tensor:
        q, k, v = x.view(5, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(5, 7, 16)

    yield "attention", (attention, (heads,))


def scatters() -> Iterator[tuple[str, Case]]:
    for n, classes in ((1, 1), (4, 3)):
        for name, row in with_indices(n, classes).items():
            yield f"{name}, {n} of {classes}", row
    pictures = some(2, 3, 6, 8)
    yield "of no dimension", (lambda x, i: x.gather(0, i), (some(), torch.tensor(0)))
    yield "max_pool1d", (lambda x: F.max_pool1d(x, 2), (some(2, 3, 9),))
    yield "max_pool3d", (lambda x: F.max_pool3d(x, 2, 1), (some(1, 2, 4, 3, 4),))
    for k, s, p, d, over in product((2, 3), (1, 2, 3), (0, 1), (1, 2), (False, True)):
        if (k, s) != (3, 1) and (d == 1 or s == k):
            options = (k, s, p, d, over)
            pool = (lambda x, options=options: F.max_pool2d(x, *options), (some(2, 2, 9, 8),))
            yield f"max_pool2d {options}", pool
    for shape in ((48,), (2, 48), (1, 2, 48)):  # pictures that share the row that is added to
        yield f"indices of pooling, {shape}", (add_pooled(shape), (pictures,))
    yield "max_unpool2d", (unpool, (pictures,))
    yield "unfold, fold", (lambda x: F.fold(F.unfold(x, 2), (6, 8), 2), (pictures,))


def with_indices(n: int, classes: int) -> dict[str, Case]:
    x, y, columns, rows = some(n, classes), below(classes, n), below(classes, 7), below(n, 7)
    repeated, one_each, wide = below(classes, n, 5), below(classes, n, 1), some(n, 7)
    found: dict[str, Case] = {
        "a label": (lambda x, y: x.gather(1, y[:, None]), (x, y)),
        "labels that repeat": (lambda x, y: x.gather(1, y), (x, repeated)),
        "along rows": (lambda x, y: x.gather(0, y), (x, below(n, 1, classes))),
        "a corner": (lambda x, y: x.gather(0, y), (x, below(n, 1, 1))),
        "take_along_dim": (lambda x, y: x.take_along_dim(y, 1), (x, repeated)),
        "take": (lambda x, y: x.take(y), (x, below(n * classes, 7))),
        "into ones": (
            lambda y, s: s.new_ones(n, classes).scatter_add(1, y, s),
            (one_each, some(n, 1)),
        ),
        "class weights": (
            lambda x, y, w: F.cross_entropy(x, y, w.detach()),
            (x, y, some(classes).abs()),
        ),
        "pixels": (F.nll_loss, (some(n, classes, 3, 2), below(classes, n, 3, 2))),
        "embedding": (lambda w, i: F.embedding(i, w, padding_idx=0), (x, rows)),
        "index": (lambda x, i: x[i], (x, rows - n // 2)),
        "index_select": (lambda x, i: x.index_select(1, i), (x, columns)),
        "index_add": (lambda x, i, s: x.index_add(1, i, s), (x, columns, wide)),
        "index_put": (
            lambda x, i, s: x.index_put((i,), s, accumulate=True),
            (x, rows, some(7, classes)),
        ),
        "put": (
            lambda x, i, s: x.put(i, s, accumulate=True),
            (x, below(n * classes, 7), some(7)),
        ),
    }
    for dtype in (torch.float16, torch.float64, torch.int32):
        found[f"into zeros, {dtype}".replace("torch.", "")] = (
            lambda y, s: s.new_zeros(n, classes).scatter_add(1, y, s),
            (one_each, some(n, 1, dtype=dtype)),
        )
    for options in ({"label_smoothing": 0.1}, {"reduction": "sum"}, {"ignore_index": -100}):
        found[f"cross_entropy {list(options)}"] = (
            lambda x, y, options=options: F.cross_entropy(x, y, **options),
            (x, y),
        )
    for how in ("sum", "mean", "amax"):
        found[f"scatter_reduce {how}"] = (
            lambda x, i, s, how=how: x.scatter_reduce(1, i, s, how),
            (x, repeated, some(n, 5)),
        )
    return found


def add_pooled(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def fn(x: Tensor) -> Tensor:
        values, index = F.max_pool2d(x, 2, return_indices=True)
        rows = (*shape[:-1], -1)
        into = torch.zeros(shape, dtype=x.dtype)
        return into.scatter_add(len(shape) - 1, index.reshape(rows), values.reshape(rows))

    return fn


def unpool(x: Tensor) -> Tensor:
    values, index = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, index, 2)


def average_pools(axes: int) -> Iterator[tuple[str, Case]]:
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
    x = some(2, 2, *(7, 6, 5)[:axes])
    for k, s, p, over, count in product((2, 3), (2, 3), (0, 1), (False, True), (False, True)):
        if s > k or not (over or p) or (axes == 3 and (not over or (k, s) != (3, 2))):
            continue
        case = (lambda x, o=(k, s, p, over, count): pool(x, *o), (x,))
        yield f"{k}, {s}, {p}, ceil {over}, count {count}", case
    given = (lambda x: pool(x, 2, 2, 0, True, True, divisor_override=5), (x,))
    yield "a divisor that is given", given
    if axes == 2:
        yield "two kernels", (lambda x: pool(x, (3, 2), (2, 3), (1, 0), True), (x,))
        yield "one axis", (lambda x: F.avg_pool1d(x[0], 3, 2, ceil_mode=True), (x[..., 0],))
        yield "float16", (lambda x: pool(x, 3, 2, 1, True), (x.half(),))


def permutations() -> Iterator[tuple[str, Case]]:
    """A permutation that changes nothing, as a constant of a loop: the program used to crash."""

    xs = some(11)

    def loop(w: Tensor) -> Tensor:
        return scan(lambda c, x: (torch.tanh(c @ w) + x, ()), w, xs)[0]

    yield "argument", (lambda x: loop(x.permute(0, 1)), (some(3, 3),))
    yield "computed", (lambda x: loop((x + 1).permute(0, -1)), (some(3, 3),))
    yield "others", (lambda x: (x.permute(1, 0) @ x).permute(-2, -1), (some(3, 3),))


def rows_of_tables() -> Iterator[tuple[str, Case]]:
    """Rows that are read ahead, and those of tables that are too small, or not contiguous."""
    rows = torch.tensor([0, -1, 1, 4999, -5000, 17, 17])
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        yield f"{dtype}", (lambda x, i: x[i], (some(5000, 21, 28, dtype=dtype), rows))
    yield "bools", (lambda x, i: (x > 0)[i].float(), (some(5000, 21, 28), rows))
    table = some(6000, 100, dtype=torch.float32)
    yield "a part", (lambda x, i: x[100:5300, 3:99][i], (table, rows))
    yield "a row each", (lambda x, i: scan(lambda c, j: (c, x[j]), (), i)[1], (table, rows))
    yield "more rows", (lambda x, i: x[i] * 2, (table, below(6000, 700)))
    yield "no rows", (lambda x, i: x[i], (table, rows[:0]))
    yield (
        "in batches",
        (
            lambda x, i: scan(lambda c, j: (c + x[j].sum(1), ()), torch.zeros(7), i)[0],
            (table, below(6000, 9, 7)),
        ),
    )
    yield "int32", (lambda x, i: x[i], (table, rows.int()))
    yield "a matrix of rows", (lambda x, i: x[i], (table, rows.view(1, 7)))
    yield "columns", (lambda x, i: x[:, i], (table, below(100, 5)))
    yield (
        "transposed",
        (lambda x, i: x.t()[i], (some(300, 5000, dtype=torch.float32), below(300, 9))),
    )
    yield "two indices", (lambda x, i: x[i, i], (some(5000, 5000, dtype=torch.float32), rows))
    yield "short rows", (lambda x, i: x[i], (some(100, 3), below(100, 9)))
    yield (
        "long rows",
        (lambda x, i: x[i], (some(300, LONGEST_ROW, dtype=torch.float32), below(300, 9))),
    )
    yield "small", (lambda x, i: torch.vmap(lambda j: x[j])(i), (table, rows))


TABLES: dict[Any, Callable[[], Iterator[tuple[str, Case]]]] = {
    aten.permute.default: permutations,
    aten.mm.default: lambda: chain(products(False), small_and_large()),
    aten.addmm.default: lambda: products(True),
    aten.bmm.default: batches,
    aten.scatter_add.default: scatters,
    aten.index.Tensor: rows_of_tables,
    aten.avg_pool2d_backward.default: lambda: average_pools(2),
    aten.avg_pool3d_backward.default: lambda: average_pools(3),
}


def test_every_rule_has_a_table() -> None:
    # In test_decompositions.py: x + 0, x * 0, and numbers in 16 bits.
    elsewhere = {aten.add.Tensor, aten.mul.Tensor, aten.full.default}
    assert TABLES.keys() | elsewhere == (RULES | RULES_OF_PRODUCTS).keys()


@pytest.mark.slow
@pytest.mark.parametrize("rule", TABLES, ids=str)
def test_a_rule_keeps_values_and_derivatives(rule: Any) -> None:
    check(dict(TABLES[rule]()))


def test_windows_that_share_a_pixel_add_up() -> None:
    """Windows of two pixels, two apart: each even pixel is in four of them."""
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1
    got = jit(grad(lambda x: F.max_pool2d(x, 2, 2, dilation=2).sum()))(x)
    assert got[0, 0, 2, 2] == 4 and got.sum() == 4


def test_a_window_that_hangs_over_is_divided_by_what_it_holds() -> None:
    got = jit(grad(lambda x: F.avg_pool1d(x, 3, 2, ceil_mode=True).sum()))(torch.ones(1, 1, 6))
    right = torch.tensor([1 / 3, 1 / 3, 2 / 3, 1 / 3, 5 / 6, 1 / 2])
    torch.testing.assert_close(got[0, 0], right, rtol=1e-6, atol=0)


def test_products_of_integers_wrap_as_they_do_eagerly() -> None:
    a, b = torch.tensor([[200, 100, 3]], dtype=torch.uint8), torch.tensor([[2], [1], [1]]).byte()
    got = jit(torch.mm)(a, b)
    assert got.dtype == torch.uint8 and got.item() == (400 + 100 + 3) % 256


# ------------------------------------------------------------- arguments that lie in memory anyhow


def test_the_same_signature_at_another_place_in_memory() -> None:
    """No alignment, equal sizes or sharing of the first call is assumed."""
    fn = lambda a, b: (a * 2 + b.sin(), a.sum(), (a * b).cumsum(0))  # noqa: E731
    jitted = jit(fn, strict=True)
    base = some(66, dtype=torch.float32)
    pairs = [(base[:-2], base[2:]), (base[1:-1], base[2:]), (base[2:], base[2:])]
    pairs += [(base[1:-1].clone(), base[:-2]), (base[:-2], base[1:-1])]
    kept = jitted(*pairs[0])
    before = tree.map(torch.clone, kept)
    for a, b in pairs:
        assert tree.diff(fn(a, b), jitted(a, b), rtol=1e-5, atol=1e-6) == []
    assert tree.diff(before, kept) == [] and len(jitted.report()) == 1


def test_any_layout_and_sizes_that_were_equal_at_first() -> None:
    layer = lambda x, w, b: torch.relu(x @ w + b).sum(1)  # noqa: E731
    conv = lambda x, w: F.conv2d(x, w, padding=1).mean((2, 3))  # noqa: E731
    jitted, jitted_conv = jit(layer, strict=True), jit(grad(lambda x, w: conv(x, w).sum()))
    for rows in (64, 63):
        for x in (some(rows, 64), some(64, rows).T, some(1, 64).expand(rows, 64)):
            args = (x, some(64, 64), some(64))
            assert tree.diff(layer(*args), jitted(*args), rtol=1e-10, atol=1e-10) == []
    w, x = some(4, 3, 3, 3), some(2, 3, 5, 5)
    for z in (x, x.contiguous(memory_format=torch.channels_last), x[:1].expand(2, 3, 5, 5)):
        expected = grad(lambda x, w: conv(x, w).sum())(z, w)
        torch.testing.assert_close(jitted_conv(z, w), expected, rtol=1e-10, atol=1e-10)
