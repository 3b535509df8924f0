"""Operations without a fake implementation: run by themselves, with compiled pieces around.

Oracle: the function run eagerly.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fdl import jit, scan
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace
from tests.support.asserts import assert_equal, unchanged

pytestmark = pytest.mark.usefixtures("plain_backend")


@torch.library.custom_op("fdltest::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("fdltest::parts", mutates_args=())
def parts(x: Tensor, n: int, also: list[Tensor]) -> tuple[Tensor, Tensor]:
    return x.t().contiguous() * n + also[0], (x.sum(0) > 0) & (also[1] > 0)


LIBRARY = torch.library.Library("fdltest2", "DEF")
LIBRARY.define("tripled(Tensor x) -> Tensor")
LIBRARY.impl("tripled", lambda x: x * 3, "CPU")


@torch.library.custom_op("fdltest::positive", mutates_args=())
def positive(x: Tensor) -> Tensor:
    return x[x > 0]  # the number of results depends on values


@torch.library.custom_op("fdltest::below_five", mutates_args=())
def below_five(x: Tensor) -> Tensor:
    return x[x < 5]  # so does this one, but not for zeros and ones


@torch.library.custom_op("fdltest::picky", mutates_args=())
def picky(x: Tensor) -> Tensor:
    if not x.sum() > 2:
        raise ValueError("too small")
    return x * 2


def in_a_loop(x: Tensor) -> Any:
    def body(c: Tensor, x: Tensor) -> Any:
        inner, y = scan(lambda d, z: (torch.tanh(doubled(d)) + z, d.cos()), c, x)
        return inner, (y, torch.ops.fdltest2.tripled(c).sin())

    return scan(body, torch.cos(x[0]), x.expand(4, 3, 3))


COMPILED: dict[str, Any] = {
    "custom_op": lambda x: doubled(x.cos()) + 1,
    "library": lambda x: torch.ops.fdltest2.tripled(x.cos()) + 1,
    "parts": lambda x: [y.cos() for y in parts(x + 1, 3, [x, x[0]])],
    "both": lambda x: doubled(torch.ops.fdltest2.tripled(x.cos())) * doubled(x),
    "in a loop": in_a_loop,
}
EAGER: dict[str, tuple[Any, str]] = {
    "alone": (doubled, "no fake implementation of fdltest.doubled.default is registered"),
    "values": (
        lambda x: positive(x).sum() + x,
        "shape or strides of a result of fdltest.positive.default depend on values",
    ),
    "zeros": (
        lambda x: picky(x + 9).cos(),
        "fdltest.picky.default has no fake implementation, and fails on zeros: too small",
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_the_rest_is_compiled(name: str) -> None:
    fn, x = COMPILED[name], torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)
    jitted = jit(fn)
    with unchanged(x), pytest.warns(UserWarning, match="no fake implementation of fdltest"):
        assert_equal(jitted(x), fn(x))
    assert_equal(jitted(x * 5), fn(x * 5))
    assert [r.route for r in jitted.report()] == ["compiled pieces"]
    # Nothing stays registered: a fake implementation may be added now.
    with pytest.raises(Exception, match=r"no fake impl|UnsupportedOperator|fdltest2"):
        trace(fn, *flatten(((x,), {})))


@pytest.mark.parametrize("name", EAGER)
def test_what_zeros_do_not_tell_runs_eagerly(name: str) -> None:
    fn, match = EAGER[name]
    x, jitted = torch.linspace(-1, 1, 9).view(3, 3), jit(fn)
    with pytest.warns(UserWarning, match=f"{match}.*it runs eagerly"):
        assert_equal(jitted(x), fn(x))
    assert_equal(jitted(-x), fn(-x))
    assert [r.route for r in jitted.report()] == ["eager"]
    with pytest.raises(RuntimeError, match=rf"jit\(strict=True\): .*{match}"):
        jit(fn, strict=True)(x)


def test_another_shape_than_for_zeros_is_noticed() -> None:
    def fn(x: Tensor) -> Tensor:
        return (below_five(x.flatten()) + 1).cos().sum()

    jitted, x = jit(fn), torch.arange(4.0)
    with pytest.warns(UserWarning, match="compiled in pieces"):
        assert_equal(jitted(x), fn(x))
    text = r"below_five.default returned float32\[2\], but float32\[4\] when it was traced"
    with pytest.warns(UserWarning, match=f"{text}; it runs eagerly"):
        assert_equal(jitted(x + 3), fn(x + 3))
    assert_equal(jitted(x + 3), fn(x + 3))
    (report,) = jitted.report()
    assert report.route == "eager" and len(report.fallbacks) == 2
