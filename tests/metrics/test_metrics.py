"""Metrics: running means that are exact whatever the batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdl import metrics, tree
from fdl.metrics import Mean
from tests.support.asserts import close, draw, unchanged

VALUES = st.lists(st.integers(-1000, 1000), min_size=1, max_size=20)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def test_mean_is_total_and_count():
    m = metrics.mean(torch.tensor([1.0, 2.0, 6.0]))
    assert m == Mean(double(9.0), double(3.0)) and m.value == 3
    assert m.total.dtype == m.count.dtype == torch.float64
    assert metrics.mean(torch.tensor([True, False])).value == 0.5


@given(VALUES, st.data())
def test_merging_unequal_batches_gives_the_mean_of_all(values, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    batches = [values[i:j] for i, j in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    merged = Mean(double(0.0), double(0.0))
    for batch in batches:
        merged = merged + metrics.mean(torch.tensor(batch, dtype=torch.float32))
    # Sums of small integers are exact, so nothing is left to tolerance.
    assert merged.total == sum(values) and merged.count == len(values)
    assert merged.value == sum(values) / len(values)
    stacked = tree.stack([metrics.mean(torch.tensor(b, dtype=torch.float32)) for b in batches])
    assert stacked.total.shape == (len(batches),)
    assert stacked.sum() == merged


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 4)), min_size=1, max_size=9))
def test_weights_count_as_repetitions(pairs):
    values = torch.tensor([float(v) for v, _ in pairs])
    counts = torch.tensor([n for _, n in pairs])
    repeated = metrics.mean(values.repeat_interleave(counts))
    for weights in (counts, counts.float(), counts.double()):
        with unchanged(values, weights):
            assert metrics.mean(values, weights) == repeated
    assert metrics.mean(values, counts > 0) == metrics.mean(values[counts > 0])


def test_a_mean_over_a_mask_ignores_what_it_hides():
    values = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    assert metrics.mean(values, torch.tensor([1, 0, 1, 0])).value == 2
    assert metrics.mean(values, torch.tensor([True, False, True, False])).value == 2


def test_further_axes_are_averaged_as_well():
    values = draw(0, 4, 3, 2)
    close(metrics.mean(values).value, values.mean())
    weights = double([1.0, 0, 2, 0])
    close(metrics.mean(values, weights).value, (values[0].mean() + 2 * values[2].mean()) / 3)
    assert metrics.mean(values).count == 4


def test_nothing_counted_is_nan_and_merges():
    nothing = metrics.mean(torch.ones(3), torch.zeros(3))
    assert nothing.value.isnan() and nothing.count == 0
    assert (nothing + metrics.mean(torch.tensor([2.0]))).value == 2


def test_a_long_run_keeps_single_counts():
    # In float32 the sum would stop growing at 2**24.
    total = Mean(double(2.0**24), double(2.0**24)) + metrics.mean(torch.tensor([1.0]))
    assert total.count == 2**24 + 1 and total.value == 1


def test_accuracy_counts_the_largest_logit():
    logits, labels = draw(1, 50, 4), torch.arange(50) % 4
    mask = torch.arange(50) % 3 > 0
    hits = [int(max(range(4), key=row.__getitem__)) == int(y) for row, y in zip(logits, labels)]  # noqa: B905
    assert 0 < sum(hits) < 50
    with unchanged(logits, labels, mask):
        assert metrics.accuracy(logits, labels) == Mean(double(sum(hits)), double(50))
        kept = [hit for hit, m in zip(hits, mask.tolist(), strict=True) if m]
        assert metrics.accuracy(logits, labels, mask) == Mean(double(sum(kept)), double(len(kept)))
    assert metrics.accuracy(logits, logits.argmax(1)).value == 1


@pytest.mark.parametrize("labels", [[0, 0, 1], [1, 1, 1]])
def test_a_row_with_nan_is_never_right(labels):
    nan = torch.nan
    logits = torch.tensor([[nan, nan], [nan, 1.0], [0.0, torch.inf]])
    assert metrics.accuracy(logits, torch.tensor(labels)) == Mean(double(1.0), double(3.0))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: metrics.mean(torch.ones(3), torch.ones(2)), r"shape \[3\], .* got \[2\]"),
        (lambda: metrics.mean(torch.ones(3, 2), torch.ones(3, 2)), r"shape \[3\], .* got \[3, 2\]"),
        (
            lambda: metrics.accuracy(torch.ones(3, 2), torch.ones(3, 1).long()),
            r"accuracy: expected logits \[batch, classes\] and labels \[batch\], got \[3, 2\] and ",
        ),
        (
            lambda: metrics.accuracy(torch.ones(3, 2), torch.tensor(1)),
            r"got \[3, 2\] and \[\]",
        ),
        (
            lambda: metrics.accuracy(torch.ones(3, 2), torch.ones(3).long(), torch.ones(2)),
            r"weights must have the shape \[3\], one number per example, got \[2\]",
        ),
    ],
    ids=["length", "axes", "labels", "one-label", "accuracy-weights"],
)
def test_bad_input_raises(call, text):
    with pytest.raises(ValueError, match=text):
        call()
