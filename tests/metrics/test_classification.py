"""Metrics of classifiers against loops over rows in NumPy, whatever the batches were."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

import fdl
from fdl import data, metrics, nn, optim, parallel, random, tree
from fdl.losses import cross_entropy
from tests.support.asserts import close, draw

FUNCTIONS = {
    "accuracy": metrics.accuracy,
    "top_k_accuracy": functools.partial(metrics.top_k_accuracy, k=2),
    "confusion_matrix": metrics.confusion_matrix,
    "precision_recall_f1": metrics.precision_recall_f1,
    "calibration_error": functools.partial(metrics.calibration_error, bins=4),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


# ------------------------------------------------------------------------------------- oracles


def top_k(z, y, w, k):
    """The stable order of torch.sort, largest first: of equals the first."""
    hits = [int(label) in np.argsort(-row, kind="stable")[:k] for row, label in zip(z, y)]  # noqa: B905
    return sum(w * hits) / sum(w)


def confusion(z, y, w):
    found = np.zeros((z.shape[1], z.shape[1]))
    for row, label, weight in zip(z, y, w, strict=True):
        found[label, max(range(len(row)), key=lambda j: (row[j], -j))] += weight
    return found


def ratio(a, b):
    return a / b if b else 0.0


def scores(z, y, w):
    """Precision, recall and F1 of each class, and their averages, from the definitions."""
    chosen, classes = [int(np.argmax(row)) for row in z], range(z.shape[1])
    each, occurs = [], []
    for c in classes:
        tp = sum(wi for p, t, wi in zip(chosen, y, w, strict=True) if p == c == t)
        fp = sum(wi for p, t, wi in zip(chosen, y, w, strict=True) if p == c != t)
        fn = sum(wi for p, t, wi in zip(chosen, y, w, strict=True) if p != c == t)
        precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
        each.append((precision, recall, ratio(2 * precision * recall, precision + recall)))
        occurs.append(tp + fp + fn > 0)
    macro = np.array(each)[occurs].mean(0)
    right = sum(wi for p, t, wi in zip(chosen, y, w, strict=True) if p == t) / sum(w)
    return np.array(each).T, macro, [right] * 3


def expected_calibration_error(z, y, w, bins):
    """Guo et al., 2017, equations 2, 3 and 5."""
    p = np.exp(z - z.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True)
    confidence, right = p.max(1), z.argmax(1) == y
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i in range(len(y)) if (m - 1) / bins < confidence[i] <= m / bins]
        if sum(w[inside]):
            gap = (w * right)[inside].sum() - (w * confidence)[inside].sum()
            error += abs(gap / w[inside].sum()) * w[inside].sum() / w.sum()
    return error


@st.composite
def rows(draw_from):
    """Logits with ties, labels and integer weights, not all of them 0, in cuts into batches."""
    n, classes = draw_from(st.integers(1, 12)), draw_from(st.integers(2, 4))
    numbers = st.lists(st.integers(-3, 3), min_size=classes, max_size=classes)
    z = np.array(draw_from(st.lists(numbers, min_size=n, max_size=n)), dtype=np.float64)
    y = np.array(draw_from(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    w = np.array(draw_from(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    w[0] = 1
    return z, y, w


@settings(deadline=None, max_examples=60)
@given(rows(), st.integers(1, 20))
def test_equal_loops_over_rows(case, bins):
    z, y, w = case
    logits, labels, weights = torch.tensor(z), torch.tensor(y), torch.tensor(w)
    for weigh in (weights, weights.double(), weights.float()):
        args = logits, labels, weigh
        for k in range(1, z.shape[1] + 1):
            close(metrics.top_k_accuracy(*args, k=k).value.item(), top_k(z, y, w, k))
        assert metrics.top_k_accuracy(*args, k=1) == metrics.accuracy(*args)
        close(metrics.confusion_matrix(*args).value.numpy(), confusion(z, y, w))
        found = metrics.precision_recall_f1(*args)
        for got, expected in zip((found.value, found.macro, found.micro), scores(z, y, w)):  # noqa: B905
            close(torch.stack(got).numpy(), np.array(expected))
        error = metrics.calibration_error(*args, bins=bins).value.item()
        close(error, expected_calibration_error(z, y, w, bins), atol=1e-9)


@each_function
@settings(deadline=None, max_examples=30)
@given(case=rows(), cuts=st.lists(st.integers(0, 12), max_size=3), seed=st.integers(0, 9))
def test_batches_padded_with_anything_and_merged_in_any_order(name, case, cuts, seed):
    z, y, w = map(torch.tensor, case)
    f, expected = FUNCTIONS[name], FUNCTIONS[name](z, y, w)
    cuts = sorted({0, len(y), *(cut for cut in cuts if cut < len(y))})
    size = max(b - a for a, b in itertools.pairwise(cuts))

    def padded(a, b):
        """A batch of `size` rows: those from a to b, and poison."""
        bad = size - (b - a)
        return f(
            torch.cat([z[a:b], torch.full((bad, z.shape[1]), torch.nan).double()]),
            torch.cat([y[a:b], torch.full((bad,), -100)]),
            torch.cat([w[a:b], torch.zeros(bad).long()]),
        )

    parts = [padded(a, b) for a, b in itertools.pairwise(cuts)]
    order = random.permutation(random.key(seed), len(parts)).tolist()
    rtol = 1e-12 if name == "calibration_error" else 0  # counts are whole numbers, exact
    close(sum(parts[i] for i in order), expected, rtol=rtol, atol=rtol)
    close(tree.stack(parts).sum(), expected, rtol=rtol, atol=rtol)


def test_values_of_stacked_sums_are_those_of_the_steps():
    z, y = draw(0, 3, 5, 4), torch.arange(15).view(3, 5) % 4
    for f in (metrics.calibration_error, metrics.confusion_matrix, metrics.precision_recall_f1):
        each = [f(*row) for row in zip(z, y, strict=True)]
        stacked = vmap(f)(z, y)
        close(stacked, tree.stack(each))
        close(stacked.value, tree.stack([one.value for one in each]))
    each = [metrics.precision_recall_f1(*row) for row in zip(z, y, strict=True)]
    close(tree.stack(each).macro, tree.stack([one.macro for one in each]))
    close(tree.stack(each).micro, tree.stack([one.micro for one in each]))


@pytest.mark.slow
def test_in_a_jitted_scan_and_of_a_population():
    z, y = draw(0, 3, 5, 4), torch.arange(15).view(3, 5) % 4
    w = torch.tensor([[True] * 5, [True] * 5, [True, True, False, False, False]])

    def scores_of(*rows):
        return {name: f(*rows) for name, f in FUNCTIONS.items()}

    def both(*rows):
        return fdl.scan(lambda c, row: (c, scores_of(*row)), (), rows)[1], vmap(scores_of)(*rows)

    scanned, batched = fdl.jit(both, strict=True)(z, y, w)
    expected = scores_of(z.flatten(0, 1), y.flatten(), w.flatten())
    for name in FUNCTIONS:
        close(scanned[name].sum(), expected[name])
        close(batched[name].sum(), expected[name])


@each_function
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_labels_are_integers_of_any_width(name, dtype):
    z, y = draw(0, 6, 4), torch.arange(6) % 4
    assert tree.allclose(FUNCTIONS[name](z, y.to(dtype)), FUNCTIONS[name](z, y), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logits_of_any_width_are_summed_in_float64(dtype):
    z, y = (draw(0, 50, 4) * 3).to(dtype), torch.arange(50) % 4
    for f in FUNCTIONS.values():
        found = f(z, y)
        assert all(leaf.dtype == torch.float64 for leaf in tree.leaves(found))
        close(found, f(z.double(), y))
    extreme = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype)
    assert metrics.calibration_error(extreme, torch.tensor([0, 0])).value == 0.5


@each_function
def test_a_nan_that_counts_is_not_right(name):
    z, y = torch.eye(3).double(), torch.arange(3)
    z[0] = torch.nan
    found = FUNCTIONS[name](z, y)
    if name in ("accuracy", "top_k_accuracy"):
        assert found.value == 2 / 3
    elif name == "precision_recall_f1":
        assert found.value[1].tolist() == [0, 1, 1] and found.actual.sum() == 3
        assert found.micro[0] == 1 and found.micro[1] == 2 / 3
    elif name == "confusion_matrix":
        assert found.counts[0].isnan().any() and found.counts[1:].isfinite().all()
    else:
        assert found.value.isnan()


@each_function
def test_nothing_counted_merges(name):
    z, y = torch.full((3, 4), torch.nan).double(), torch.full((3,), -100)
    for nothing in (
        FUNCTIONS[name](z, y, torch.zeros(3)),
        FUNCTIONS[name](z, y, torch.zeros(3, dtype=torch.bool)),
        FUNCTIONS[name](z[:0], y[:0]),
    ):
        assert not any(leaf.any() for leaf in tree.leaves(nothing))
        some = FUNCTIONS[name](draw(0, 5, 4), torch.arange(5) % 4)
        close(nothing + some, some, rtol=0, atol=0)
    if name == "precision_recall_f1":
        assert all(score.isnan() for score in (*nothing.macro, *nothing.micro))
        assert not torch.stack(nothing.value).any()
    elif name != "confusion_matrix":
        assert nothing.value.isnan()


def test_equal_logits_are_not_all_right():
    z = torch.zeros(6, 3)
    assert metrics.top_k_accuracy(z, torch.arange(6) % 3, k=2).value == 2 / 3


def test_edges_of_bins_belong_below():
    """Confidences 0.5 and 1 close their bins: (0, ½] and (½, 1]."""
    z = torch.tensor([[0.0, 0.0], [0.0, torch.inf], [0.0, 800.0]]).double()
    z[1, 1] = 900.0
    assert metrics.calibration_error(z, torch.tensor([0, 1, 1]), bins=2).count.tolist() == [1, 2]


def test_one_logit_for_two_classes():
    z, y = draw(0, 20), (torch.arange(20) % 3 == 0).long()
    both = torch.stack([0 * z, z], 1)
    chosen = (z > 0).long()
    precision, recall, _ = metrics.precision_recall_f1(both, y).value
    close(precision[1], ((chosen == 1) & (y == 1)).sum() / (chosen == 1).sum().double())
    close(recall[1], ((chosen == 1) & (y == 1)).sum() / (y == 1).sum().double())


def test_derivatives_by_weights():
    z, y = draw(0, 4, 3), torch.tensor([0, 2, 1, 1])
    w = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    matrix = draw(1, 3, 3)
    found = grad(lambda w: (metrics.confusion_matrix(z, y, w).counts * matrix).sum())(w)
    close(found, matrix[y, z.argmax(1)])


# ------------------------------------------------------------------------------------- training

MODEL = nn.linear(3, 4)
LOSS = fdl.supervised(MODEL, cross_entropy, FUNCTIONS)


def test_metrics_of_supervised_whatever_the_parts_of_a_batch():
    state = fdl.TrainState.create(MODEL, optim.sgd(0.1), key=random.key(0))
    x, y, mask = draw(0, 8, 3).float(), torch.arange(8) % 4, torch.arange(8) < 5
    expected = fdl.eval_step(LOSS)(state, (x[:5], y[:5]))
    batch = data.Batch(torch.where(mask[:, None], x, torch.nan), y, mask)
    close(fdl.eval_step(LOSS)(state, batch), expected)
    for microbatches in (2, 4):  # the last of 4 counts nothing
        step = parallel.train_step(LOSS, optim.sgd(0.1), None, microbatches=microbatches)
        close(step(state, batch)[1], expected, rtol=1e-6)


# ------------------------------------------------------------------------------------ bad input

Z, Y = torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "accuracy"])
def test_bad_input_raises(name):
    f = FUNCTIONS[name]
    for args, error, text in (
        ((Z[0], Y[:3]), ValueError, rf"{name}: expected logits \[batch, classes\] .* got \[3\]"),
        ((Z, Y[:3]), ValueError, rf"{name}: .* labels \[batch\], got \[6, 3\] and \[3\]"),
        ((Z, Y.float()), TypeError, f"{name}: labels must be integers, got torch.float32"),
        ((Z, Y > 0), TypeError, f"{name}: labels must be integers, got torch.bool"),
        ((Z, Y, torch.ones(3)), ValueError, rf"{name}: weights must have the shape \[6\]"),
        ((Z + 1j, Y), TypeError, f"{name}: logits must be a tensor of real numbers, got"),
        ((Z, Y.tolist()), TypeError, f"{name}: labels must be a tensor .*, got a list"),
    ):
        with pytest.raises(error, match=text):
            f(*args)


@pytest.mark.parametrize("name", ["top_k_accuracy", "confusion_matrix", "precision_recall_f1"])
@pytest.mark.parametrize("label", [3, -1, -100])
def test_a_label_that_counts_and_is_no_class_raises(name, label):
    labels = torch.tensor([0, 1, 2, 0, 1, label])
    for weights in (None, torch.ones(6), torch.ones(6, dtype=torch.bool)):
        with pytest.raises(ValueError, match=f"{name}: labels must be from 0 to 2, one of 3"):
            FUNCTIONS[name](Z, labels, weights)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: metrics.top_k_accuracy(Z, Y, k=0), ValueError, "k must be at least 1, got 0"),
        (
            lambda: metrics.top_k_accuracy(Z, Y),
            ValueError,
            "top_k_accuracy: k must be at most the 3 classes, got 5",
        ),
        (lambda: metrics.top_k_accuracy(Z, Y, k=1.0), TypeError, "k must be an int, got 1.0"),
        (lambda: metrics.calibration_error(Z, Y, bins=0), ValueError, "bins must be at least 1"),
    ],
)
def test_bad_options_raise(call, error, text):
    with pytest.raises(error, match=text):
        call()
