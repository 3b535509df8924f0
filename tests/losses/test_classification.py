"""Losses of classifiers and of probabilities against torch.nn.functional, in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, grad_and_value, hessian, jvp, vmap

import fdl
from fdl import data, losses, nn, optim, random
from tests.support.asserts import close, draw
from tests.support.losses import SHAPES, WEIGHTS, compare, weights_of

BCE = losses.binary_cross_entropy_with_logits
SEEDS = st.integers(0, 99)
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 5))
SMOOTHING = st.sampled_from([0.0, 0.1, 1.0])


def labels_of(seed, n, classes, dtype=torch.int64):
    return random.randint(random.key(seed), (n,), 0, classes).to(dtype)


def class_weights_of(seed, classes):
    return draw(seed + 7, classes).abs() + 0.1


# ------------------------------------------------------------------------------ class indices


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, SMOOTHING, st.booleans(), st.sampled_from([None, -100, 0, 2]), st.booleans())
def test_cross_entropy_and_nll_equal_torch(size, seed, smoothing, weighted, ignored, from_logits):
    n, classes = size
    x, labels = 3 * draw(seed, n, classes), labels_of(seed, n, classes)
    if ignored == -100:
        labels[::2] = -100
    c = class_weights_of(seed, classes) if weighted else None
    index = {} if ignored is None else {"ignore_index": ignored}

    def theirs(x, c):
        if from_logits:
            return F.cross_entropy(x, labels, c, label_smoothing=smoothing, **index)
        return F.nll_loss(x, labels, c, **index)

    def ours(x, c):
        options = {"class_weights": c, **index}
        if from_logits:
            return losses.cross_entropy(x, labels, label_smoothing=smoothing, **options)
        return losses.nll(x, labels, **options)

    found, value = grad_and_value(ours)(x, c)
    if ignored is not None and not (labels != ignored).any():  # 0 / 0 for torch
        assert value == 0 and not found.any()
        return
    copy = x.clone().requires_grad_()
    expected = theirs(copy, c)
    expected.backward()
    close(value, expected.detach())
    close(found, copy.grad)


@settings(deadline=None, max_examples=40)
@given(SIZES, SEEDS, WEIGHTS, SMOOTHING)
def test_weights_of_rows_and_of_classes_multiply(size, seed, kind, smoothing):
    """Written out: the sum of the weighted terms over the sum of w times the label's weight."""
    n, classes = size
    x, labels = 3 * draw(seed, n, classes), labels_of(seed, n, classes)
    c, w = class_weights_of(seed, classes), weights_of(kind, n)

    def direct(x, c):
        total = count = 0.0
        for i in range(n):
            terms = -x[i].log_softmax(0) * c
            own = 1.0 if w is None else w[i].item()
            row = (1 - smoothing) * terms[labels[i]] + smoothing * terms.sum() / classes
            total, count = total + own * row, count + own * c[labels[i]]
        return total / count

    def ours(x, c):
        return losses.cross_entropy(x, labels, w, label_smoothing=smoothing, class_weights=c)

    close(grad_and_value(ours, (0, 1))(x, c), grad_and_value(direct, (0, 1))(x, c))


def test_the_derivative_by_a_weight_of_zero_with_class_weights():
    x, labels, c = draw(0, 4, 3), torch.tensor([0, 2, 1, 1]), torch.tensor([0.0, 1.0, 2.0])
    w, h = torch.tensor([1.0, 0.0, 0.5, 0.0]).double(), 1e-6

    def f(w):
        return losses.cross_entropy(x, labels, w, label_smoothing=0.1, class_weights=c)

    numeric = [(f(w + h * row) - f(w - h * row)) / (2 * h) for row in torch.eye(4).double()]
    close(grad(f)(w), torch.stack(numeric), rtol=1e-7)


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, SMOOTHING, st.booleans(), WEIGHTS)
def test_soft_labels_equal_torch(size, seed, smoothing, weighted, weights):
    x, p = 3 * draw(seed, *size), draw(seed + 1, *size).softmax(1)
    c = class_weights_of(seed, size[1]) if weighted else None

    def theirs(x, p, reduction):
        return F.cross_entropy(x, p, c, label_smoothing=smoothing, reduction=reduction)

    def ours(x, p, w):
        return losses.cross_entropy(x, p, w, label_smoothing=smoothing, class_weights=c)

    compare(ours, theirs, (x, p), weights)


def test_soft_labels_of_float32_are_smoothed_in_float64():
    x, p = draw(0, 6, 4), F.one_hot(labels_of(1, 6, 4), 4)
    found = losses.cross_entropy(x, p.float(), label_smoothing=0.1)
    close(found, losses.cross_entropy(x, p.double(), label_smoothing=0.1))


def test_one_hot_labels_are_labels():
    x, labels = draw(0, 6, 4), labels_of(1, 6, 4)
    hard, soft = (
        grad_and_value(losses.cross_entropy)(x, y) for y in (labels, F.one_hot(labels, 4).double())
    )
    close(soft, hard)


def test_a_class_that_is_ruled_out_adds_nothing():
    """Its logit is −∞, and its probability or weight is 0, for which torch returns NaN."""
    x = torch.tensor([[1.0, -torch.inf, 0.5], [0.0, 2.0, -torch.inf]], dtype=torch.float64)
    p = torch.tensor([[0.25, 0.0, 0.75], [0.5, 0.5, 0.0]], dtype=torch.float64)
    assert F.cross_entropy(x, p).isnan()
    kept = torch.stack([x[0, [0, 2]], x[1, [0, 1]]])
    q = torch.stack([p[0, [0, 2]], p[1, [0, 1]]])
    found, value = grad_and_value(losses.cross_entropy)(x, p)
    expected, least = grad_and_value(losses.cross_entropy)(kept, q)
    close(value, least)
    close(found[0, [0, 2]], expected[0])
    assert found[0, 1] == found[1, 2] == 0
    close(losses.kl_div(x.log_softmax(1), p), losses.kl_div(kept.log_softmax(1), q))
    c = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    spread = losses.cross_entropy(x[:1], torch.tensor([0]), label_smoothing=0.1, class_weights=c)
    terms = -x[0].log_softmax(0)
    close(spread, 0.9 * terms[0] + 0.1 * (terms[0] + 2 * terms[2]) / 3)


@pytest.mark.parametrize("weights", ["mask", "numbers"])
def test_a_masked_nan_beside_a_target_of_zeros_is_not_noticed(weights):
    """As in padded rows: 0 · NaN must not pass for a finite loss with finite derivatives."""
    w = weights_of(weights, 5)
    masked = (w == 0)[:, None]
    x, zeros = draw(0, 5, 3), torch.zeros(5, 3).double()
    for poison in (torch.nan, torch.inf, -torch.inf):
        bad = torch.where(masked, poison, x)
        target = torch.where(masked, zeros, x.flip(1).softmax(1))
        for f in (losses.cross_entropy, BCE, losses.kl_div):
            found, value = grad_and_value(f)(bad, target, w)
            expected, same = grad_and_value(f)(x, target, w)
            close(value, same)
            assert not found[masked[:, 0]].any() and found.isfinite().all()
            close(found[~masked[:, 0]], expected[~masked[:, 0]])


def test_ignored_rows_may_hold_anything():
    x, labels = draw(0, 6, 3), torch.tensor([0, 255, 1, 2, 255, 1], dtype=torch.uint8)
    kept = labels != 255
    bad = torch.where(kept[:, None], x, torch.nan)
    c = class_weights_of(0, 3)
    f = functools.partial(losses.cross_entropy, class_weights=c, label_smoothing=0.1)
    expected, value = grad_and_value(f)(x[kept], labels[kept])
    for weights in (None, torch.ones(6), torch.ones(6, dtype=torch.int32), kept, kept | True):
        for call in (f, fdl.jit(f)):
            found = grad_and_value(lambda x: call(x, labels, weights, ignore_index=255))(bad)  # noqa: B023
            close(found[1], value)
            close(found[0][kept], expected)
            assert not found[0][~kept].any()
    # No label of 8 bits is −100, though −100 becomes 156 in 8 bits.
    few = torch.tensor([0, 1, 2, 2, 1, 0], dtype=torch.uint8)
    close(losses.nll(x, few, ignore_index=-100), losses.nll(x, few))
    with pytest.raises(ValueError, match="index 156 is out of bounds"):
        losses.nll(x, few + 156, ignore_index=-100)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_labels_are_integers_of_any_width(dtype):
    x, labels, c = draw(0, 6, 4), labels_of(1, 6, 4), class_weights_of(2, 4)
    for f in (losses.cross_entropy, losses.nll):
        expected = f(x, labels, class_weights=c, ignore_index=2)
        close(f(x, labels.to(dtype), class_weights=c, ignore_index=2), expected)
    y, z = labels % 2, x[:, 0]
    close(BCE(z, y.to(dtype)), BCE(z, y.double()))


# -------------------------------------------------------------------------- binary, divergence


@settings(deadline=None, max_examples=60)
@given(SHAPES, SEEDS, WEIGHTS, st.sampled_from([None, "scalar", "one", "each"]))
def test_binary_cross_entropy_equals_torch(shape, seed, weights, kind):
    z, y = 5 * draw(seed, *shape), draw(seed + 1, *shape).sigmoid()
    last = 1 if len(shape) == 1 else shape[-1]
    pos = {None: None, "scalar": torch.tensor(2.5).double(), "one": torch.tensor([0.3]).double()}
    pos = {**pos, "each": draw(seed + 2, last).abs()}[kind]

    def theirs(z, y, reduction):
        return F.binary_cross_entropy_with_logits(z, y, pos_weight=pos, reduction=reduction)

    compare(lambda z, y, w: BCE(z, y, w, pos_weight=pos), theirs, (z, y), weights)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 4))
    | st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2)),
    *(SEEDS, WEIGHTS, st.booleans()),
)
def test_kl_div_equals_torch(shape, seed, weights, log_target):
    q, p = draw(seed, *shape).log_softmax(1), draw(seed + 1, *shape).log_softmax(1)

    def theirs(q, p, reduction):
        if reduction == "mean":
            return F.kl_div(q, p, reduction="batchmean", log_target=log_target)
        return F.kl_div(q, p, reduction=reduction, log_target=log_target).flatten(1).sum(1)

    ours = functools.partial(losses.kl_div, log_target=log_target)
    compare(ours, theirs, (q, p if log_target else p.exp()), weights)


def test_kl_div_where_a_probability_is_0():
    q, p = draw(0, 2, 3).log_softmax(1), torch.tensor([[0.0, 0.4, 0.6], [1.0, 0, 0]]).double()
    close(losses.kl_div(q, p), F.kl_div(q, p, reduction="batchmean"))
    close(losses.kl_div(q, p.log(), log_target=True), F.kl_div(q, p, reduction="batchmean"))
    for options in ({}, {"log_target": True}):
        target = p.log() if options else p
        f = functools.partial(losses.kl_div, **options)
        for found in grad(f, (0, 1))(q, target):
            assert found.isfinite().all()
    assert losses.kl_div(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[1.0, 0.0]])) == 0
    both = torch.tensor([[0.0, -torch.inf]])
    assert losses.kl_div(both, both, log_target=True) == 0
    assert losses.kl_div(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.5, 0.5]])).isinf()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_logits_neither_overflow_nor_vanish(dtype):
    z = torch.tensor([1e4, -1e4, 1e4, -1e4, 1e30, -1e30, torch.inf, -torch.inf], dtype=dtype)
    y = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    each = torch.tensor([0, 0, 1.0, 1, 0, 0, 0, 0], dtype=dtype) * z.abs().nan_to_num()
    for i in range(8):
        assert BCE(z[i : i + 1], y[i : i + 1]) == each[i]
    slopes = torch.tensor([0, 0, 1, -1, 0, 0, 0, 0], dtype=dtype) / 8
    close(grad(BCE)(z, y), slopes, rtol=1e-2)
    sure = torch.tensor([20.0, -20.0], dtype=torch.float64)
    exact = (-sure[:1].abs()).exp().log1p()[0]
    close(BCE(sure, torch.tensor([1, 0])), exact, atol=0)
    wrong = torch.tensor(
        [21.0, -23.0], dtype=torch.float64
    )  # torch's softplus is linear from 20 on
    close(grad(BCE)(wrong, torch.tensor([0, 1])), (wrong.sigmoid() - (wrong < 0).double()) / 2)
    curved = torch.tensor([0.0, 1e4, -1e4], dtype=torch.float64)
    second = torch.tensor([0.25, 0, 0], dtype=torch.float64).diag() / 3
    close(hessian(BCE)(curved, torch.tensor([1, 0, 1])), second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_losses_keep_the_dtype_and_agree_with_float64(dtype):
    x, y = draw(0, 6, 3).to(dtype), draw(1, 6, 3).softmax(1).to(dtype)
    labels, c = labels_of(2, 6, 3), class_weights_of(3, 3).float()
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    for f in (
        lambda x, y: losses.cross_entropy(x, y, class_weights=c, label_smoothing=0.1),
        lambda x, y: losses.cross_entropy(x, labels, class_weights=c, ignore_index=1),
        lambda x, y: losses.nll(x.log_softmax(1), labels, class_weights=c),
        lambda x, y: BCE(x, y, pos_weight=c),
        lambda x, y: BCE(x, y, pos_weight=2.0),
        lambda x, y: losses.kl_div(x, y),
        lambda x, y: losses.huber(x, y),
        lambda x, y: losses.cosine_embedding(x, y, 2 * (labels % 2) - 1),
        lambda x, y: losses.triplet_margin(x, y, -y, p=3),
    ):
        assert f(x, y).dtype == grad(f)(x, y).dtype == dtype
        close(f(x, y).double(), f(x.double(), y.double()), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------ in all modes

ROWS = {
    "soft": lambda x, w: losses.cross_entropy(x, x.flip(1).softmax(1), w, label_smoothing=0.1),
    "class weights": lambda x, w: losses.cross_entropy(
        *(x, torch.tensor([0, 1, 2, 1]), w),
        label_smoothing=0.1,
        class_weights=torch.tensor([0.5, 1.0, 2.0]),
        ignore_index=1,
    ),
    "nll": lambda x, w: losses.nll(x.log_softmax(1), torch.tensor([0, 1, 2, 1]), w),
    "bce": lambda x, w: BCE(x, x.flip(1).sigmoid(), w, pos_weight=torch.tensor([1.0, 2.0, 3.0])),
    "kl": lambda x, w: losses.kl_div(x.log_softmax(1), x.flip(1).softmax(1), w),
}


@pytest.mark.parametrize("f", ROWS.values(), ids=ROWS)
def test_under_vmap_jvp_jit_and_scan(f, plain_backend):
    x, v = draw(0, 3, 4, 3), draw(1, 3, 4, 3)
    w = torch.tensor([[True, False, True, True]] * 3)
    each = [grad_and_value(f)(*row) for row in zip(x, w, strict=True)]
    grads, values = (torch.stack(part) for part in zip(*each, strict=True))
    close(vmap(grad_and_value(f))(x, w), (grads, values))
    close(fdl.jit(vmap(grad_and_value(f)))(x, w), (grads, values))

    def epoch(x, w):
        return fdl.scan(lambda c, row: (c, grad_and_value(f)(*row)), (), (x, w))[1]

    close(fdl.jit(epoch)(x, w), (grads, values))
    _, tangent = jvp(lambda x: f(x, w[0]), (x[0],), (v[0],))
    close(tangent, (grads[0] * v[0]).sum())


def test_training_with_binary_cross_entropy_and_a_padded_batch():
    model, opt = nn.linear(3, 1), optim.sgd(0.1)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    x, y = draw(0, 8, 3).float(), (draw(1, 8, 1) > 0)
    loss = fdl.supervised(model, functools.partial(BCE, pos_weight=3.0))
    mask = torch.arange(8) < 5
    padded = data.Batch(torch.where(mask[:, None], x, torch.nan), y, mask)
    expected, value = fdl.train_step(loss, opt)(state, (x[:5], y[:5]))
    found, same = fdl.train_step(loss, opt)(state, padded)
    close(found.params, expected.params, rtol=1e-6)
    close(same["loss"], value["loss"], rtol=1e-6)
    for y in (padded.y, padded.y.float()):  # no row counts: filled ones must not be refused
        nothing = fdl.eval_step(loss)(state, data.Batch(padded.x, y, mask & False))
        assert nothing["loss"].total == 0


# --------------------------------------------------------------------------------- bad input

X, LABELS = torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
BAD = {
    "smoothed soft labels": (
        lambda: losses.cross_entropy(X, X, ignore_index=0),
        *(ValueError, "ignore_index is for labels that are class indices"),
    ),
    "soft labels of another shape": (
        lambda: losses.cross_entropy(X, torch.zeros(6, 2)),
        *(TypeError, r"probabilities \[batch, classes\] for logits \[6, 3\], .* float32\[6, 2\]"),
    ),
    "bool labels": (
        lambda: losses.cross_entropy(X, LABELS > 0),
        *(TypeError, r"labels must be integers \[batch\], or .* got a tensor bool\[6\]"),
    ),
    "class weights": (
        lambda: losses.cross_entropy(X, LABELS, class_weights=torch.ones(6)),
        *(ValueError, r"class_weights must have the shape \[3\], one .* class, got \[6\]"),
    ),
    "class weights of soft labels": (
        lambda: losses.cross_entropy(X, X, class_weights=torch.ones(1)),
        *(ValueError, r"class_weights must have the shape \[3\], .* got \[1\]"),
    ),
    "class weights in a list": (
        lambda: losses.nll(X, LABELS, class_weights=[1.0, 2.0, 3.0]),
        *(TypeError, "nll: class_weights must be a tensor of real numbers, got a list"),
    ),
    "floating labels": (
        lambda: losses.nll(X, LABELS.float()),
        *(TypeError, "nll: labels must be integers, got torch.float32"),
    ),
    "shape of labels": (
        lambda: losses.nll(X, LABELS[:4]),
        *(ValueError, r"nll: expected log_probs \[batch, classes\] .* got \[6, 3\] and \[4\]"),
    ),
    "a label that is no class": (
        lambda: losses.nll(X, LABELS + 1),
        *(ValueError, "nll: labels must be from 0 to 2, one of 3 classes.*index 3 is"),
    ),
    "a label that is no class, weighted": (
        lambda: losses.nll(X, LABELS - 1, class_weights=torch.ones(3)),
        *(ValueError, "nll: labels must be from 0 to 2, one of 3 classes.*index -1 is"),
    ),
    "pos_weight of a batch": (
        lambda: BCE(X, X, pos_weight=torch.ones(6, 3)),
        *(ValueError, r"pos_weight \[6, 3\] must broadcast against .* one example, \[3\]; weights"),
    ),
    "pos_weight of rows": (
        lambda: BCE(X[:, 0], X[:, 0], pos_weight=torch.ones(6)),
        *(ValueError, r"pos_weight \[6\] must broadcast"),
    ),
    "pos_weight of other classes": (
        lambda: BCE(X, X, pos_weight=torch.ones(2)),
        *(ValueError, r"pos_weight \[2\] must broadcast"),
    ),
    "labels of hinge losses": (
        lambda: BCE(X, X - 1),
        *(ValueError, r"target must be in \[0, 1\], got -1.0"),
    ),
    "a class as target": (
        lambda: BCE(X, (X + 2).to(torch.uint8)),
        *(ValueError, r"logits: target must be in \[0, 1\], got 2"),
    ),
    "pos_weight in a list": (
        lambda: BCE(X, X, pos_weight=[1.0, 2.0, 3.0]),
        *(TypeError, "logits: pos_weight must be a number or a tensor, got a list"),
    ),
    "ignore_index": (
        lambda: losses.nll(X, LABELS, ignore_index=1.0),
        *(TypeError, "nll: ignore_index must be an int, got a float"),
    ),
    "weights in a list": (
        lambda: losses.cross_entropy(X, LABELS, [1] * 6),
        *(TypeError, "cross_entropy: weights must be a tensor of real numbers, got a list"),
    ),
    "weights": (
        lambda: BCE(X, X, torch.ones(3)),
        *(ValueError, r"weights must have the shape \[6\], .* got \[3\]"),
    ),
    "log-probabilities as probabilities": (
        lambda: losses.kl_div(X, X - 1),
        *(ValueError, "kl_div: target must be probabilities, at least 0, got -1.0"),
    ),
    "one axis": (
        lambda: losses.kl_div(X[:, 0], X[:, 0]),
        *(ValueError, r"kl_div: log_probs must be \[batch, classes, ...\], got \[6\]"),
    ),
    "shapes": (
        lambda: losses.kl_div(X, X[:, :1]),
        *(ValueError, r"kl_div: log_probs \[6, 3\] and target \[6, 1\] must have the same shape"),
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input_raises(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_what_does_not_count_is_not_checked():
    mask = torch.arange(6) < 3
    y = torch.where(mask, 1.0, 99.0)
    for weights in (mask, mask.double(), mask.long()):
        close(BCE(X[:, 0], y, weights), BCE(X[:3, 0], y[:3]), rtol=1e-6)
        assert losses.kl_div(X, X + torch.where(mask, 1.0, -9.0)[:, None], weights) == 0
