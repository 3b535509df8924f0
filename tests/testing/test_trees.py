"""`testing.assert_trees_close`: what must fail does, both ways round; messages explain."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl.testing import assert_trees_close
from tests.support.asserts import Pair, draw

NAN, INF = math.nan, math.inf
W = draw(1, 3, 2)

INFINITE = torch.tensor([complex(INF, 0)])


def of(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)


DIFFERENT = {
    "empty against a number": (of(), of(1.0)),
    "an empty dict against a leaf": ({}, {"a": of(1.0)}),
    "an empty dict against a lone leaf": ({}, of(1.0)),
    "an empty list against an empty dict": ([], {}),
    "NaN against a number": (of(NAN, 1.0), of(2.0, 1.0)),
    "NaN beside another value": (of(NAN, 1.0), of(NAN, 2.0)),
    "NaN of Python against a number": ({"a": NAN}, {"a": 1.0}),
    "infinities of two signs": (of(INF), of(-INF)),
    "1e30 against an infinity": (of(1e30), of(INF)),
    "the largest number against an infinity": (of(1.7e308), of(INF)),
    "a gap that overflows": (of(1.7e308), of(-1.7e308)),
    "complex infinities": (INFINITE, -INFINITE),
    "None against 0": ({"a": None}, {"a": 0.0}),
    "None against a tensor 0": ({"a": None}, {"a": of(0.0)}),
    "None against nothing": ({"a": None}, {}),
    "a factor of 2 at a scale of 1e-6": (of(1e-6), of(2e-6)),
    "a factor of 2 in 32 bits": (
        of(1e-6, dtype=torch.float32), of(2e-6, dtype=torch.float32)
    ),
    "a subnormal number against 0": (of(5e-324), of(0.0)),
    "dtype": (of(1.0), of(1.0, dtype=torch.float32)),
    "shape": (of(1.0), of([1.0])),
    "bool against int": (torch.tensor([True]), torch.tensor([1])),
    "int64 beyond 2**53": (torch.tensor([2**53]), torch.tensor([2**53 + 1])),
    "True against 1": ([True], [1]),
    "list against tuple": ([of(1.0)], (of(1.0),)),
    "tuple against NamedTuple": ((of(1.0), of(2.0)), Pair(of(1.0), of(2.0))),
    "a float against a tensor": ([1.0], [of(1.0)]),
    "strings": ({"a": "adam"}, {"a": "sgd"}),
}  # fmt: skip
EQUAL = {
    "keys in another order": ({"a": W, "b": ()}, {"b": (), "a": W.clone()}),
    "both infinite": (of(INF, -INF), of(INF, -INF)),
    "zeros of both signs": (of(0.0), of(-0.0)),
    "both empty": ({"a": torch.ones(0, 2)}, {"a": torch.ones(0, 2)}),
    "rounding": (W, W * (1 + 1e-9)),
    "rounding in 32 bits": (W.float(), W.float() * (1 + 1e-6)),
    "rounding in 16 bits": (W.bfloat16(), W.bfloat16() * 1.01),
    "one that has a gradient": (W, W.clone().requires_grad_()),
    "others": ({"a": "adam", "b": None, "c": 3}, {"a": "adam", "b": None, "c": 3}),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_fails_both_ways_round(one, other):
    for pair in ((one, other), (other, one)):
        with pytest.raises(AssertionError, match=r"assert_trees_close: \d difference"):
            assert_trees_close(*pair)


@pytest.mark.parametrize(("one", "other"), EQUAL.values(), ids=EQUAL)
def test_what_is_equal_passes_both_ways_round(one, other):
    assert_trees_close(one, other)
    assert_trees_close(other, one)


def test_nan_is_equal_to_nan_only_on_request():
    for values in ([of(NAN, 1.0)], [NAN]):
        with pytest.raises(AssertionError):
            assert_trees_close(values, values)
        assert_trees_close(values, values, equal_nan=True)
    with pytest.raises(AssertionError):
        assert_trees_close(of(NAN), of(1.0), equal_nan=True)


@settings(max_examples=30)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 1), st.floats(0, 1e3))
def test_the_tolerance_is_that_of_the_formula(x, y, rtol, atol):
    close = abs(x - y) <= atol + rtol * abs(y)
    try:
        assert_trees_close(of(x), of(y), rtol=rtol, atol=atol)
    except AssertionError:
        assert not close
    else:
        assert close


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        (W.T, "w: expected float64[3, 2], got float64[2, 3]; got.permute(1, 0) is expected"),
        (3 * W, "got is 3 times expected"),
        (-W, "got has the opposite sign"),
        (0 * W, "got is all 0"),
        (W / 0, "0 of the values are NaN"),
        (W.log() * NAN, "6 of the values are NaN, 0 expected"),
        (W.flip(0), "relative gap"),
    ],
)
def test_the_message_explains(actual, words):
    with pytest.raises(AssertionError) as raised:
        assert_trees_close({"w": actual}, {"w": W})
    found = words in str(raised.value)
    assert found != words.startswith("0 of")
    assert (";" in str(raised.value)) == (words != "relative gap" and found)


def test_a_line_has_the_worst_value():
    x = torch.zeros(2, 3)
    y = x.index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), torch.tensor([0.25, -0.5]))
    with pytest.raises(AssertionError) as raised:
        assert_trees_close(
            [{"w": y, "n": torch.tensor(3)}], [{"w": x + 2 * y, "n": torch.tensor(5)}]
        )
    assert str(raised.value) == (
        "assert_trees_close: 2 differences\n"
        "  0.n: expected 5, got 3, relative gap 0.4\n"
        "  0.w: 2 of 6 values differ, most at [1, 2]: expected -1, got -0.5, relative gap 0.5; "
        "got is 0.5 times expected"
    )


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool], ids=str)
def test_integers_without_a_sign_have_a_gap(dtype):
    x, y = (torch.tensor(values).to(dtype) for values in ([0, 1], [1, 1]))
    assert_trees_close(x, x)
    with pytest.raises(AssertionError, match=r"1 of 2 values differs, at \[0\]: expected "):
        assert_trees_close(x, y)


def test_a_long_list_is_cut():
    many = {f"w{i}": of(float(i)) for i in range(30)}
    with pytest.raises(AssertionError, match=r"30 differences(\n  w.*){20}\n  … and 10 more$"):
        assert_trees_close(many, {name: x + 1 for name, x in many.items()})


def test_errors():
    with pytest.raises(ValueError, match="rtol must be finite and at least 0, got nan"):
        assert_trees_close(W, W, rtol=NAN)
    with pytest.raises(ValueError, match="atol must be finite and at least 0, got -1"):
        assert_trees_close(W, W, atol=-1)
    with pytest.raises(TypeError, match="rtol must be a number, got a str"):
        assert_trees_close(W, W, rtol="high")
    with pytest.raises(TypeError, match=r"a must be a tensor, got numpy float64\[2\]; convert"):
        assert_trees_close({"a": np.ones(2)}, {"a": np.ones(2)})
