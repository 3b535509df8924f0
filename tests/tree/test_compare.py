"""`tree.diff` and `tree.allclose`: each kind of difference, with its path."""

import numpy as np
import pytest
import torch

from fdl import tree

W, B = torch.arange(6.0).reshape(2, 3), torch.tensor([1.0, 2.0])
NAN = float("nan")
MANY = np.arange(9999)  # whose text leaves out most


@pytest.mark.parametrize(
    ("a", "b", "lines"),
    [
        ({"w": W, "b": B}, {"b": B, "w": W}, []),
        ({"w": W}, {}, ["w: expected float32[2, 3], got nothing"]),
        ({}, {"a": {"w": W}}, ["a.w: expected nothing, got float32[2, 3]"]),
        (B, B.reshape(2, 1), [": expected float32[2], got float32[2, 1]"]),
        ([B], [B.double()], ["0: expected float32[2], got float64[2]"]),
        ([B], [B + torch.tensor([0.0, 0.5])], ["0: 1 of 2 values differ, by at most 0.5"]),
        ([torch.tensor([NAN, 1.0])], [torch.tensor([NAN, 1.0])], []),
        (
            [torch.tensor([NAN, 1.0])],
            [torch.tensor([NAN, 3.0])],
            ["0: 1 of 2 values differ, by at most 2"],
        ),
        ([torch.tensor([NAN])], [torch.tensor([1.0])], ["0: 1 of 1 values differ, by at most nan"]),
        ([torch.tensor(True)], [torch.tensor(False)], ["0: 1 of 1 values differ, by at most 1"]),
        ([torch.tensor(5)], [torch.tensor(7)], ["0: 1 of 1 values differ, by at most 2"]),
        ({"n": 1}, {"n": 2}, ["n: expected int 1, got int 2"]),
        ({"n": "sgd", "m": None}, {"n": "sgd", "m": None}, []),
        ({"n": W}, {"n": 2}, ["n: expected float32[2, 3], got int 2"]),
        ({"n": MANY}, {"n": MANY + (MANY == 5)}, ["n: the arrays differ in values"]),
        ({"n": MANY}, {"n": MANY.copy()}, []),
    ],
    ids=[
        *("key-order", "missing", "unexpected", "shape", "dtype", "value", "equal-nan"),
        *(
            "beside-nan",
            "nan",
            "bool",
            "int",
            "other-leaf",
            "same-other-leaf",
            "tensor-other",
            "array",
            "equal-array",
        ),
    ],
)
def test_diff_names_what_differs(a, b, lines):
    assert tree.diff(a, b) == lines
    assert tree.allclose(a, b) == (not lines)


def test_diff_within_tolerance_and_without_values():
    a, b = {"w": torch.tensor([1.0, 100.0])}, {"w": torch.tensor([1.1, 100.1])}
    assert tree.diff(a, b, atol=0.11) == []
    assert tree.diff(a, b, rtol=0.01) == ["w: 1 of 2 values differ, by at most 0.1"]
    assert tree.diff(a, b, values=False) == []
    assert tree.allclose(a, b, rtol=0, atol=0.11) and not tree.allclose(a, b)
