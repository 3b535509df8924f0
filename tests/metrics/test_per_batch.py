"""per_batch: functions of other libraries as metrics, exact over padded batches, or refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fdl
from fdl import data, losses, metrics, nn, random
from fdl.metrics import Mean, per_batch
from tests.support.asserts import close, draw

X, Y = draw(0, 11, 3), draw(1, 11, 3)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2, 1, 0, 0])


def accuracy(preds, target, task, num_classes, average="micro"):
    """With the signature of torchmetrics.functional; "macro" does not add up."""
    assert task == "multiclass"
    right = (preds.argmax(-1) == target).float()
    if average == "micro":
        return right.mean()
    classes = F.one_hot(target, num_classes).float()
    counts = classes.sum(0)
    recall = (classes * right[:, None]).sum(0) / counts.clamp(min=1)
    return recall.sum() / (counts > 0).sum()


MICRO = partial(accuracy, task="multiclass", num_classes=3)
MACRO = partial(accuracy, task="multiclass", num_classes=3, average="macro")
ADD_UP = {
    "mse": (F.mse_loss, Y),
    "l1": (F.l1_loss, Y),
    "cross entropy": (F.cross_entropy, LABELS),
    "accuracy": (MICRO, LABELS),
    "cosine": (lambda x, y: F.cosine_similarity(x, y).mean(), Y),
}
each = pytest.mark.parametrize(("fn", "y"), ADD_UP.values(), ids=ADD_UP)


@each
@pytest.mark.parametrize("size", [1, 4, 5, 11, 16])
def test_batches_of_any_size_merge_to_the_value_of_all_rows(fn, y, size):
    metric = per_batch(fn)
    merged = sum(metric(X[i : i + size], y[i : i + size]) for i in range(0, 11, size))
    close(merged.value, fn(X, y).double(), rtol=1e-6 if fn is MICRO else 1e-10)
    assert merged.count == 11 and merged.total.dtype == torch.float64


@each
def test_rows_count_by_their_weights_whatever_is_in_those_of_weight_0(fn, y):
    weights = torch.tensor([0.0, 2, 1, 0, 3, 1, 1, 0.5, 0, 1, 1], dtype=torch.float64)
    x = torch.where(weights[:, None] == 0, torch.nan, X)
    each = torch.stack([fn(X[i : i + 1], y[i : i + 1]) for i in range(11)])
    bad = torch.where((weights == 0).view(-1, *[1] * (y.ndim - 1)), 10**6, y)
    found = per_batch(fn)(x, bad, weights)
    close(found, Mean((each.double() * weights).sum(), weights.sum()))


def test_it_is_a_metric_of_supervised_in_a_jitted_step_on_padded_batches(plain_backend):
    model = nn.linear(3, 3)
    state = fdl.TrainState.create(model, fdl.optim.sgd(0.1), key=random.key(0))
    loss = fdl.supervised(model, losses.cross_entropy, {"theirs": per_batch(MICRO)})
    step, x = fdl.jit(fdl.eval_step(loss)), X.float()
    padded = data.batches((x, LABELS), data.sequential_indices(11, batch_size=4))
    found = sum(step(state, batch)["theirs"] for batch in padded)
    close(found, metrics.accuracy(model.apply(state.params, x), LABELS))


def test_predictions_may_be_trees():
    metric = per_batch(lambda p, y: F.mse_loss(p["a"] + p["b"], y[0]))
    close(metric({"a": X, "b": Y}, (X,)).value, Y.square().mean())


@pytest.mark.parametrize("size", [0, 1])
def test_few_rows(size):
    found = per_batch(F.mse_loss)(X[:size], Y[:size], torch.ones(size, dtype=torch.bool))
    close(found, metrics.mean((X - Y).square()[:size]))


def correlation(x, y):
    """NaN for a single row."""
    x, y = x[:, 0] - x[:, 0].mean(), y[:, 0] - y[:, 0].mean()
    return (x * y).mean() / (x.square().mean() * y.square().mean()).sqrt()


DO_NOT = {
    "macro": (MACRO, LABELS, "accuracy"),
    "root": (lambda x, y: F.mse_loss(x, y).sqrt(), Y, "<lambda>"),
    "sum": (partial(F.mse_loss, reduction="sum"), Y, "mse_loss"),
    "correlation": (correlation, Y, "correlation"),
}


@pytest.mark.parametrize(("fn", "y", "name"), DO_NOT.values(), ids=DO_NOT)
def test_what_does_not_add_up_is_refused_by_name_or_nan_where_no_value_is_seen(fn, y, name):
    for weights in (None, torch.arange(11) < 9):
        with pytest.raises(ValueError, match=f"per_batch: {name}.* is not a mean over rows: "):
            per_batch(fn)(X, y, weights)
    seen = torch.vmap(per_batch(fn))(X[None], y[None])
    assert seen.value.isnan().all() and (seen.count == 11).all()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_those_of_the_function(odd):
    x = torch.where(torch.arange(11)[:, None] == 3, odd, X)
    found = per_batch(F.mse_loss)(x, Y).value
    assert torch.equal(found.nan_to_num(), F.mse_loss(x, Y).nan_to_num()) and not found.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_no_disagreement(dtype):
    x, y = draw(3, 500, 4).to(dtype), draw(4, 500, 4).to(dtype)
    close(per_batch(F.mse_loss)(x, y).value, (x - y).double().square().mean(), rtol=1e-2)


def reads_values(x, y):
    assert x.abs().max() < 100
    return F.mse_loss(x, y)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: per_batch(3), TypeError, "fn must be a function .* got an int"),
        (lambda: per_batch(nn.Model), TypeError, "fn must be a function .* got the class Model"),
        (
            lambda: per_batch(partial(F.mse_loss, reduction="none"))(X, Y),
            TypeError,
            r"mse_loss must return a floating 0-d tensor, got a tensor float64.*; metrics.mean",
        ),
        (lambda: per_batch(lambda x, y: 0.5)(X, Y), TypeError, "must return .* got a float"),
        (lambda: per_batch(F.mse_loss)(X, Y[:5]), ValueError, "same number of rows, got .*labels"),
        (lambda: per_batch(F.mse_loss)(X, 3), TypeError, "expected tensors .*'labels': 'an int'"),
        (lambda: per_batch(F.mse_loss)(X, Y, torch.ones(3)), ValueError, r"the shape \[11\]"),
    ],
)
def test_bad_arguments_are_named(call, error, text):
    with pytest.raises(error, match=f"^per_batch: .*{text}"):
        call()


def test_a_function_that_vmap_cannot_call_says_how_it_was_called():
    with pytest.raises(RuntimeError, match="vmap") as error:
        per_batch(reads_values)(X, Y)
    assert "calls reads_values for each row" in error.value.__notes__[-1]
