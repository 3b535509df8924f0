"""Each operation for which a region has a rule equals torch's; others are refused.

Oracle: eager torch in float64. A rule without a row fails.
"""

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fdl._compiler._block_axes import MAX_POOL
from fdl._compiler._block_code import COMPARISONS, COPIES, ELEMENTWISE, FMA, MASKS
from fdl._compiler._block_ops import RULES
from fdl._compiler._block_pass import compute_in_blocks
from fdl._compiler._inductor import import_inductor
from tests.support.blocks import Regions

aten, prims = torch.ops.aten, torch.ops.prims
BATCH = 11  # the last block is not full
Function = Callable[[Tensor, Tensor], Any]  # of an image and of activations [11, 4, 6, 7]


def some(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rewritten(fn: Function) -> tuple[Any, Any, set[Any]]:
    """Return what a graph computes with regions and without, and the operations left in it."""
    import_inductor()  # which registers the primitives of pools
    x, w = some(BATCH, 3, 8, 9), some(4, 3, 3, 3)

    def whole(x: Tensor, w: Tensor) -> Any:
        return fn(x, aten.convolution.default(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1))

    module = make_fx(whole, tracing_mode="fake")(x, w)
    expected = module(x, w)
    with Regions().used():
        compute_in_blocks(module)
    module.recompile()
    left = {node.target for node in module.graph.nodes}
    assert aten.convolution.default not in left
    with Regions().used():
        return module(x, w), expected, left


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


# ------------------------------------------------------------------------- each operation's cases


def positive(name: str) -> bool:
    return name in ("log", "sqrt", "rsqrt")


def elementwise(target: Any) -> list[Function]:
    """Return calls of an operation that a region computes; its result is numbers."""
    name, overload = str(target).split(".")[1:]
    numbers = lambda y: y.abs() + 0.01 if positive(name) else y  # noqa: E731
    as_numbers = lambda m, y: aten.where.self(m, y, aten.neg.default(y))  # noqa: E731
    if target is prims.convert_element_type.default:
        return [lambda x, y: target(mask(y), torch.float64)]
    if name == "where":
        return [
            lambda x, y: target(mask(y), y, y * 2),
            lambda x, y: target(mask(y), y, torch.full((), 0.5, dtype=y.dtype)),
            lambda x, y: target(mask(y), torch.full((), -0.5, dtype=y.dtype), x[0, 0, 0, :7]),
        ]
    if name in MASKS:
        operands = (lambda y: [mask(y)],) if "not" in name else (
            lambda y: [mask(y), aten.lt.Scalar(y, 1)],
        )  # fmt: skip
        return [lambda x, y, of=of: as_numbers(target(*of(y)), y) for of in operands]
    if name in COPIES:
        copies: list[Function] = [
            lambda x, y: target(y),
            lambda x, y: as_numbers(target(mask(y)), y),
        ]
        return copies
    if name in COMPARISONS:
        others = [1.0, 0] if overload == "Scalar" else [None, "row", "column"]
        return [lambda x, y, o=o: as_numbers(target(y, other(x, y, o)), y) for o in others]
    if len(target._schema.arguments) == 1 or name in ("neg", "relu", "exp", "reciprocal"):
        return [lambda x, y: target(numbers(y))]
    others = [0.5, 3, -0.0] if overload == "Scalar" else [None, "row", "column", "pixel", "number"]
    both: list[Function] = [lambda x, y, o=o: target(y, other(x, y, o)) for o in others]
    if overload != "Scalar":
        both += [lambda x, y, o=o: target(other(x, y, o), y) for o in others[1:]]
    return both


def other(x: Tensor, y: Tensor, kind: Any) -> Any:
    """Return the second operand: a number, as large as y, or the same for all images."""
    if kind is None:
        return aten.tanh.default(y)
    shared = x[0, 0, 0]  # not of an image: known before the region
    shapes = {"row": shared[:7], "column": x[0, 0, :6, :1], "pixel": x[:1, :1, :1, :1]}
    return {**shapes, "number": shared[0]}.get(kind, kind) if isinstance(kind, str) else kind


def max_pool(y: Tensor, *options: Any) -> Any:
    return prims._low_memory_max_pool_with_offsets.default(y, *options)


def weight(*shape: int) -> Tensor:
    """Return numbers that are the same for all images."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape).sin()


def half(*shape: int) -> Tensor:
    return torch.full(shape, 0.5, dtype=torch.float64)


def rows(y: Tensor) -> Tensor:
    return aten.view.default(y, [BATCH * 4 * 6, 7])


def matrices(y: Tensor) -> Tensor:
    return aten.view.default(y, [BATCH * 4, 6, 7])


def images_inside(y: Tensor) -> Tensor:
    """Return rows as those of `rows`, in another order."""
    return aten.view.default(aten.permute.default(y, [1, 2, 0, 3]).contiguous(), [264, 7])


def images_second(y: Tensor) -> Tensor:
    return aten.permute.default(y, [1, 0, 2, 3]).contiguous()


def channels_first(y: Tensor) -> Tensor:
    return aten.view.default(images_second(y), [4, BATCH * 6, 7])


def transposed(y: Tensor) -> Tensor:
    return aten.permute.default(y, [*range(y.ndim - 2), -1, -2])


def convolution_backward(x: Tensor, y: Tensor) -> Any:
    w = torch.arange(120, dtype=y.dtype).view(5, 4, 2, 3).sin()
    out = aten.convolution.default(y, w, None, [2, 1], [1, 0], [1, 2], False, [0, 0], 1)
    grad = aten.tanh.default(out)
    options = ([2, 1], [1, 0], [1, 2], False, [0, 0], 1, [True] * 3)
    return aten.convolution_backward.default(grad, y, w, [5], *options)


PAIR = [2, 2]
CASES: dict[Any, list[Function]] = {
    aten.view.default: [
        lambda x, y: aten.view.default(y, [BATCH, 4 * 6 * 7]),
        lambda x, y: aten.view.default(y, [BATCH, 2, 12, 7]),
        lambda x, y: aten.view.default(y[:, :, ::2].permute(0, 1, 3, 2).contiguous(), [BATCH, -1]),
        lambda x, y: aten.view.default(y.permute(0, 2, 1, 3).contiguous(), [BATCH, 24, 7]),
    ],
    aten.reshape.default: [lambda x, y: aten.reshape.default(y, [BATCH, -1])],
    aten._unsafe_view.default: [lambda x, y: aten._unsafe_view.default(y, [BATCH, 4, 42])],
    aten.expand.default: [
        lambda x, y: aten.expand.default(y[:, :1], [-1, 3, -1, -1]),
        lambda x, y: aten.expand.default(y[:, :, :1], [BATCH, 4, 5, 7]) * 2,
    ],
    aten.permute.default: [
        lambda x, y: aten.permute.default(y, [0, 3, 1, 2]).contiguous() + 1,
        lambda x, y: aten.permute.default(y, [0, -1, -2, -3]).contiguous() + 1,
        lambda x, y: aten.permute.default(y, [1, 0, 3, 2]).contiguous() + 1,
    ],
    aten.unsqueeze.default: [
        lambda x, y: aten.unsqueeze.default(y, 1) + 1,
        lambda x, y: aten.unsqueeze.default(y, -1) + 1,
    ],
    aten.squeeze.dim: [
        lambda x, y: aten.squeeze.dim(y[:, 1:2], 1) + 1,
        lambda x, y: aten.squeeze.dim(y, -1) + 1,
    ],
    aten.squeeze.dims: [lambda x, y: aten.squeeze.dims(y[:, :1, :, 2:3], [1, -1]) + 1],
    aten.slice.Tensor: [
        lambda x, y: aten.slice.Tensor(y, 1, 1, 3) + 1,
        lambda x, y: aten.slice.Tensor(y, -1, -3) + 1,
        lambda x, y: aten.slice.Tensor(y, 2, -100, 9223372036854775807, 2) + 1,
        lambda x, y: aten.slice.Tensor(y, 3, None, -2, 3) + 1,
    ],
    aten.select.int: [
        lambda x, y: aten.select.int(y, 1, 2) + 1,
        lambda x, y: aten.select.int(y, -1, -2) + 1,
    ],
    aten.cat.default: [
        lambda x, y: aten.cat.default([y, aten.neg.default(y)], 1),
        lambda x, y: aten.cat.default([y, aten.slice.Tensor(y, 3, 0, 2), y], -1),
        lambda x, y: aten.cat.default([y, aten.neg.default(y), y]),
    ],
    aten.convolution.default: [lambda x, y: y],
    aten.convolution_backward.default: [convolution_backward],
    aten.avg_pool2d.default: [
        lambda x, y: aten.avg_pool2d.default(y, [2, 3]),
        lambda x, y: aten.avg_pool2d.default(y, PAIR, [1, 3], [1, 0], True, False),
        lambda x, y: aten.avg_pool2d.default(y, [3, 2], [2, 2], [1, 1], True, True),
        lambda x, y: aten.avg_pool2d.default(y, PAIR, [], [0, 0], False, True, 3),
    ],
    aten.avg_pool2d_backward.default: [
        lambda x, y, o=o: aten.avg_pool2d_backward.default(aten.avg_pool2d.default(y, *o), y, *o)
        for o in (
            (PAIR, PAIR, [0, 0], False, True, None),
            ([3, 2], [1, 2], [1, 1], True, False, None),
            ([3, 2], [2, 2], [1, 1], True, True, None),
            (PAIR, [1, 1], [0, 0], False, True, 5),
        )
    ],
    MAX_POOL: [
        lambda x, y: max_pool(y, PAIR, PAIR, [0, 0], [1, 1], False)[0],
        lambda x, y: max_pool(y, [3, 2], [1, 2], [1, 0], [2, 1], True)[0],
    ],
    aten.sum.dim_IntList: [
        lambda x, y: aten.sum.dim_IntList(y, [0, 2, 3]),
        lambda x, y: aten.sum.dim_IntList(y, [0], True),
        lambda x, y: aten.sum.dim_IntList(y, []),
        lambda x, y: aten.sum.dim_IntList(y, [-1, 1]),
        lambda x, y: aten.sum.dim_IntList(y, [2], True) * y,
    ],
    aten.mean.dim: [
        lambda x, y: aten.mean.dim(y, [2, 3]),
        lambda x, y: aten.mean.dim(y, [-1], True) * y,
    ],
    aten.amax.default: [
        lambda x, y: aten.amax.default(y, [-1], True) * y,
        lambda x, y: aten.amax.default(y, [3, 1]),
        lambda x, y: aten.amax.default(aten.where.self(mask(y), y, torch.full((), torch.nan)), [1]),
        lambda x, y: aten.amax.default(aten.mul.Tensor(y, -torch.inf), [2]),
    ],
    aten.mm.default: [
        lambda x, y: aten.mm.default(rows(y), weight(7, 5)),
        lambda x, y: aten.mm.default(rows(y), transposed(weight(9, 7))),
        lambda x, y: aten.mm.default(weight(10, 7), transposed(rows(y))),
        lambda x, y: aten.mm.default(transposed(rows(y)), rows(aten.tanh.default(y))),
        lambda x, y: aten.mm.default(aten.view.default(y, [BATCH, 168]), weight(168, 3)),
        lambda x, y: aten.mm.default(transposed(y[:, 1, 2]), y[:, 0, 0]),
    ],
    aten.addmm.default: [lambda x, y: aten.addmm.default(weight(5), rows(y), weight(7, 5))],
    aten.bmm.default: [
        lambda x, y: aten.bmm.default(matrices(y), transposed(matrices(aten.tanh.default(y)))),
        lambda x, y: aten.bmm.default(transposed(matrices(y)), matrices(aten.tanh.default(y))),
        lambda x, y: aten.bmm.default(channels_first(y), weight(4, 7, 5)),
        lambda x, y: aten.bmm.default(weight(4, 5, 7), transposed(channels_first(y))),
        lambda x, y: aten.bmm.default(transposed(channels_first(y)), channels_first(y * y)),
    ],
    aten.var_mean.correction: [
        lambda x, y: aten.var_mean.correction(y, [1, 2, 3], correction=0),
        lambda x, y: aten.var_mean.correction(y, [-1], keepdim=True),
        lambda x, y: aten.var_mean.correction(y, [1], correction=0.5)[1],
        lambda x, y: aten.var_mean.correction(y, [0, 2, 3], correction=0),
        lambda x, y: aten.var_mean.correction(y, [0, 2, 3], correction=3, keepdim=True),
        lambda x, y: aten.var_mean.correction(y, [0, 2, 3]),
        lambda x, y: aten.var_mean.correction(y, [0, 2, 3], correction=None),
        lambda x, y: aten.var_mean.correction(y, [0, 2, 3], correction=0.5),
        lambda x, y: aten.var_mean.correction(y, [0, 2, 3], correction=461),
    ],
    getitem: [convolution_backward],
}  # fmt: skip
CASES |= {target: elementwise(target) for target in ELEMENTWISE}
CASES[FMA] = [lambda x, y: prims.fma.default(y, aten.tanh.default(y), aten.neg.default(y))]
# They return indices or float32, or combine a mask with a number.
NEVER = {aten.where.default, aten.where.Scalar, aten.bitwise_and.Scalar, aten.bitwise_or.Scalar}


@pytest.mark.parametrize("target", RULES, ids=str)
def test_each_rule(target: Any) -> None:
    if target in NEVER:
        return
    assert CASES.get(target), f"add cases of {target} to CASES"
    cases = CASES[target]
    got, expected, left = rewritten(lambda x, y: [fn(x, y) for fn in cases])
    assert_equal(got, expected)
    assert target not in {z if z in RULES else str(z) for z in left - {getitem}}


# ----------------------------------------------------------------- what a rule does not read


def mask(y: Tensor) -> Tensor:
    return aten.gt.Scalar(y, 0.1)


REFUSED: dict[str, tuple[Any, Function]] = {
    "alpha": (aten.add.Tensor, lambda x, y: aten.add.Tensor(y, y.tanh(), alpha=2)),
    "alpha of a difference": (aten.sub.Tensor, lambda x, y: aten.sub.Tensor(y, 1.0, alpha=3)),
    "alpha by position": (aten.sub.Scalar, lambda x, y: aten.sub.Scalar(y, 1.0, 3)),
    "rounding": (
        aten.div.Tensor_mode,
        lambda x, y: aten.div.Tensor_mode(y, 0.3, rounding_mode="floor"),
    ),
    "sum in another dtype": (
        aten.sum.dim_IntList,
        lambda x, y: aten.sum.dim_IntList(y, [1], dtype=torch.float32),
    ),
    "sum of masks": (aten.sum.dim_IntList, lambda x, y: aten.sum.dim_IntList(mask(y), [1])),
    "mean in another dtype": (
        aten.mean.dim,
        lambda x, y: aten.mean.dim(y, [1], dtype=torch.float32),
    ),
    "mean of all images": (aten.mean.dim, lambda x, y: aten.mean.dim(y, [0])),
    "to channels last": (
        aten.clone.default,
        lambda x, y: aten.clone.default(y, memory_format=torch.channels_last),
    ),
    "to float32": (
        prims.convert_element_type.default,
        lambda x, y: prims.convert_element_type.default(y, torch.float32),
    ),
    "to integers": (
        prims.convert_element_type.default,
        lambda x, y: prims.convert_element_type.default(mask(y), torch.int64),
    ),
    "product of a mask": (aten.mul.Tensor, lambda x, y: aten.mul.Tensor(y, mask(y))),
    "sum of two masks": (aten.add.Tensor, lambda x, y: aten.add.Tensor(mask(y), mask(-y))),
    "masks compared": (aten.eq.Tensor, lambda x, y: aten.eq.Tensor(mask(y), mask(y + 1))),
    "maximum of masks": (
        aten.maximum.default,
        lambda x, y: aten.maximum.default(mask(y), mask(y + 1)),
    ),
    "exp of a mask": (aten.exp.default, lambda x, y: aten.exp.default(mask(y))),
    "not a number": (aten.logical_not.default, lambda x, y: aten.logical_not.default(y)),
    "numbers combined": (
        aten.logical_and.default,
        lambda x, y: aten.logical_and.default(y, mask(y)),
    ),
    "a mask and a number": (
        aten.bitwise_and.Scalar,
        lambda x, y: aten.bitwise_and.Scalar(mask(y), True),
    ),
    "where of masks": (
        aten.where.self,
        lambda x, y: aten.where.self(mask(y), mask(y + 1), mask(y - 1)),
    ),
    "where of a full mask": (
        aten.where.self,
        lambda x, y: aten.where.self(torch.full((), True), y, y * 2),
    ),
    "a slice of images": (aten.slice.Tensor, lambda x, y: aten.slice.Tensor(y, 0, 2, 7)),
    "cat of some images": (aten.cat.default, lambda x, y: aten.cat.default([y, y[:3]], 0)),
    "an empty slice": (aten.slice.Tensor, lambda x, y: aten.slice.Tensor(y, 3, 2, 2)),
    "integers": (aten.mul.Tensor, lambda x, y: aten.mul.Tensor(y, torch.arange(7))),
    "another dtype": (
        aten.mul.Tensor,
        lambda x, y: aten.mul.Tensor(y, torch.ones(11, 4, 6, 7).cumsum(0)),
    ),
    "a pool of one image": (
        aten.avg_pool2d.default,
        lambda x, y: aten.avg_pool2d.default(aten.select.int(y, 0, 1), PAIR),
    ),
    "a maximum of all images": (aten.amax.default, lambda x, y: aten.amax.default(y, [0])),
    "one image": (aten.select.int, lambda x, y: aten.select.int(y, 0, 3)),
    "beta": (
        aten.addmm.default,
        lambda x, y: aten.addmm.default(weight(5), rows(y), weight(7, 5), beta=2),
    ),
    "a bias of each row": (
        aten.addmm.default,
        lambda x, y: aten.addmm.default(weight(264, 5), rows(y), weight(7, 5)),
    ),
    "a bias of each image": (
        aten.addmm.default,
        lambda x, y: aten.addmm.default(weight(264), weight(10, 7), transposed(rows(y))),
    ),
    "images in another order": (
        aten.mm.default,
        lambda x, y: aten.mm.default(transposed(rows(y)), images_inside(y)),
    ),
    "matrices in another order": (
        aten.bmm.default,
        lambda x, y: aten.bmm.default(
            aten.view.default(y, [44, 6, 7]),
            transposed(aten.view.default(images_second(y), [44, 6, 7])),
        ),
    ),
    "a number as bias": (
        aten.addmm.default,
        lambda x, y: aten.addmm.default(half(5), rows(y), weight(7, 5)),
    ),
    "a full weight": (
        aten.mm.default,
        lambda x, y: aten.mm.default(rows(y), half(7, 5)),
    ),
    "a large weight": (
        aten.mm.default,
        lambda x, y: aten.mm.default(aten.view.default(y, [BATCH, 168]), weight(168, 25)),
    ),
    "a large sum of one product": (
        aten.mm.default,
        lambda x, y: aten.mm.default(transposed(aten.view.default(y, [BATCH, 168])), y[:, 0, 0]),
    ),
    "images with images": (
        aten.mm.default,
        lambda x, y: aten.mm.default(
            aten.view.default(y, [BATCH, 168]), transposed(aten.view.default(y, [BATCH, 168]))
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_rule_does_not_read_is_refused(name: str) -> None:
    target, fn = REFUSED[name]
    got, expected, left = rewritten(fn)
    assert_equal(got, expected)
    assert target in left


@pytest.mark.parametrize(
    "fill",
    [
        lambda: torch.full((4, 1, 1), 2.7, dtype=torch.int64),
        lambda: torch.full((4, 1, 1), 3, dtype=torch.bool),
        lambda: torch.full((4, 1, 1), 0.1, dtype=torch.float32),
        lambda: torch.full((), 0.1, dtype=torch.bfloat16),
        lambda: torch.full((), 1e30, dtype=torch.float16),
        lambda: aten.scalar_tensor.default(-2.7, dtype=torch.int32),
    ],
)
def test_a_number_is_rounded_to_the_dtype_of_its_tensor(fill: Callable[[], Tensor]) -> None:
    got, expected, _ = rewritten(lambda x, y: (y * fill(), fill() + y))
    assert_equal(got, expected)
