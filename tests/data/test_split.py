"""`fdl.data.split`: a data set in two parts, by a key."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl import data, random

KEY = random.key(3)


def numbered(n: int) -> data.Dataset:
    return data.Dataset(torch.arange(n)[:, None].expand(n, 2).float(), torch.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 200), fraction=st.floats(0.01, 0.99))
def test_every_example_is_in_one_part_and_rows_stay_together(n: int, fraction: float) -> None:
    held_out = round(fraction * n)
    if not 0 < held_out < n:
        with pytest.raises(ValueError, match=rf"at least one of the {n} examples in each part"):
            data.split(KEY, numbered(n), fraction)
        return
    train, validation = data.split(KEY, numbered(n), fraction)
    assert (len(train.y), len(validation.y)) == (n - held_out, held_out)
    assert sorted([*train.y.tolist(), *validation.y.tolist()]) == list(range(n))
    for part in (train, validation):
        assert type(part) is data.Dataset
        assert torch.equal(part.x, part.y[:, None].expand(-1, 2).float())


def test_the_second_part_is_the_start_of_the_permutation() -> None:
    order = random.permutation(KEY, 10)
    train, validation = data.split(KEY, numbered(10), 0.3)
    assert torch.equal(validation.y, order[:3])
    assert torch.equal(train.y, order[3:])


@pytest.mark.slow
def test_every_example_is_held_out_equally_often() -> None:
    counts = torch.zeros(10)
    for key in random.split(random.key(0), 1000):
        counts[data.split(key, torch.arange(10), 0.3)[1]] += 1
    # Binomial, 1000 draws of 0.3: a standard deviation of 14.5, and 10 examples looked at.
    assert (counts - 300).abs().max() < 60


def test_a_share_that_floats_cannot_hold_is_rounded_and_not_cut() -> None:
    # 0.29 * 100 is 28.999999999999996 in floats.
    assert len(data.split(KEY, torch.arange(100), 0.29)[1]) == 29


def test_any_tree_is_split() -> None:
    rows = {"x": torch.arange(6), "more": [torch.arange(6) * 10]}
    train, validation = data.split(KEY, rows, 0.5)
    for part in (train, validation):
        assert list(part) == ["x", "more"]
        assert torch.equal(part["more"][0], part["x"] * 10)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"fraction": 0.0}, ValueError, "split: fraction must leave at least one of the 4 "),
        ({"fraction": 1.0}, ValueError, "in each part, got 1.0"),
        ({"fraction": -0.5}, ValueError, "in each part, got -0.5"),
        ({"fraction": float("nan")}, ValueError, "in each part, got nan"),
        ({"fraction": 1}, TypeError, "split: fraction must be a float between 0 and 1, got 1"),
        ({"fraction": "0.1"}, TypeError, "must be a float between 0 and 1, got '0.1'"),
        ({"key": 0}, TypeError, "make a key from a seed"),
        ({"dataset": 4}, TypeError, "one row for each example, got\n  dataset: 4"),
        ({"dataset": {"x": [1, 2]}}, TypeError, "\n  x.0: 1 "),
        ({"dataset": torch.tensor(4)}, TypeError, "of shape \\(\\)"),
        ({"dataset": ()}, ValueError, "got no tensor"),
        (
            {"dataset": {"x": torch.zeros(3), "y": torch.zeros(4)}},
            ValueError,
            "same number of rows, got {'x': 3, 'y': 4}",
        ),
        (
            {"dataset": torch.zeros(3, device="meta")},
            ValueError,
            r"on one device, got \['cpu', 'meta'\]",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"key": KEY, "dataset": torch.arange(4), "fraction": 0.5}
    with pytest.raises(kind, match=message):
        data.split(**arguments | change)
