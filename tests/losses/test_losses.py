"""What all losses have in common, and the first of them against torch, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fdl
from fdl import losses, metrics
from tests.support.asserts import close, draw, unchanged

LOGITS, LABELS = draw(0, 7, 4) * 3, torch.tensor([0, 3, 1, 1, 2, 0, 3])
X, Y = draw(1, 7, 3), draw(2, 7, 3)
WEIGHTS = {
    "numbers": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.25, 3.0], dtype=torch.float64),
    "float32": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.25, 3.0]),
    "mask": torch.tensor([True, False, True, True, False, False, True]),
    "integers": torch.tensor([1, 0, 2, 1, 0, 0, 3]),
}


def gradients(f, *inputs):
    """Value and autograd's gradient of the torch side."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = f(*inputs)
    value.backward()
    return value.detach(), tuple(x.grad for x in inputs)


def test_squared_loss_is_elementwise_with_derivative_prediction_minus_target():
    close(losses.squared_loss(X, Y), (X - Y) ** 2 / 2)
    grad = torch.func.grad(lambda x: losses.squared_loss(x, Y).sum())(X)
    close(grad, X - Y)


def test_mse_equals_torch():
    value, grads = gradients(F.mse_loss, X, Y)
    close(losses.mse(X, Y), value)
    close(torch.func.grad(losses.mse, (0, 1))(X, Y), grads)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_equals_torch(smoothing):
    def theirs(z):
        return F.cross_entropy(z, LABELS, label_smoothing=smoothing)

    def ours(z):
        return losses.cross_entropy(z, LABELS, label_smoothing=smoothing)

    value, (grad,) = gradients(theirs, LOGITS)
    close(ours(LOGITS), value)
    close(torch.func.grad(ours)(LOGITS), grad)


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
    grad = torch.func.grad(losses.cross_entropy)(LOGITS, LABELS)
    close(grad, (LOGITS.softmax(1) - F.one_hot(LABELS, 4)) / 7)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_weights_are_those_of_the_examples(weights, smoothing):
    def direct(z):
        each = F.cross_entropy(z, LABELS, label_smoothing=smoothing, reduction="none")
        return sum(w * loss for w, loss in zip(weights.double(), each, strict=True)) / weights.sum()

    def ours(z):
        return losses.cross_entropy(z, LABELS, weights, label_smoothing=smoothing)

    value, (grad,) = gradients(direct, LOGITS)
    with unchanged(LOGITS, LABELS, weights):
        close(ours(LOGITS), value)
        close(torch.func.grad(ours)(LOGITS), grad)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3), (7, 3, 2)], ids=str)
def test_mse_weights_are_those_of_the_examples(weights, shape):
    def direct(x, y):
        each = ((x - y) ** 2).reshape(7, -1).mean(1)
        return sum(w * loss for w, loss in zip(weights.double(), each, strict=True)) / weights.sum()

    x, y = draw(3, *shape), draw(4, *shape)
    value, grads = gradients(direct, x, y)
    with unchanged(x, y, weights):
        close(losses.mse(x, y, weights), value)
        close(torch.func.grad(losses.mse, (0, 1))(x, y, weights), grads)


@given(st.lists(st.booleans(), min_size=7, max_size=7))
def test_a_mask_equals_the_shorter_batch(mask):
    mask = torch.tensor(mask)
    if mask.any():
        close(losses.mse(X, Y, mask), F.mse_loss(X[mask], Y[mask]))
        short = F.cross_entropy(LOGITS[mask], LABELS[mask])
        close(losses.cross_entropy(LOGITS, LABELS, mask), short)
    else:
        assert losses.mse(X, Y, mask) == losses.cross_entropy(LOGITS, LABELS, mask) == 0


def test_nothing_counted_is_zero_with_zero_gradient():
    none = torch.zeros(7, dtype=torch.bool)
    grad, value = torch.func.grad_and_value(losses.cross_entropy)(LOGITS, LABELS, none)
    assert value == 0 and torch.equal(grad, torch.zeros_like(LOGITS))


@pytest.mark.curriculum("S1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits_neither_overflow_nor_vanish(dtype):
    logits = torch.tensor([[1e4, -1e4], [-1e30, 1e30], [0, 1e3]], dtype=dtype)
    labels = torch.tensor([1, 1, 0])
    each = torch.tensor([2e4, 0, 1e3], dtype=dtype)
    for i in range(3):
        value = losses.cross_entropy(logits[i : i + 1], labels[i : i + 1])
        close(value, each[i], rtol=1e-6)
    grad = torch.func.grad(losses.cross_entropy)(logits, labels)
    close(grad, torch.tensor([[1.0, -1], [0, 0], [-1, 1]], dtype=dtype) / 3, rtol=1e-6)
    # A confident and right prediction keeps its small loss: log(1 + e⁻²⁰) where 1 − p rounds to 0.
    sure = losses.cross_entropy(torch.tensor([[20.0, 0]], dtype=torch.float64), torch.tensor([0]))
    close(sure, torch.tensor(-20.0, dtype=torch.float64).exp().log1p())


def test_l2_penalty_is_half_the_sum_of_squares_with_gradient_w():
    params = {"a": draw(5, 3, 2), "b": [draw(6, 4), draw(7).reshape(())]}
    flat = torch.cat([params["a"].flatten(), params["b"][0], params["b"][1][None]])
    close(losses.l2_penalty(params), flat @ flat / 2)
    grads = torch.func.grad(losses.l2_penalty)(params)
    close(grads, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_losses_keep_the_dtype(dtype):
    x, y, z = X.to(dtype), Y.to(dtype), LOGITS.to(dtype)
    for weights in (None, WEIGHTS["mask"], WEIGHTS["numbers"]):
        assert losses.mse(x, y, weights).dtype == dtype
        assert losses.cross_entropy(z, LABELS, weights).dtype == dtype
    assert losses.l2_penalty({"w": x}).dtype == losses.squared_loss(x, y).dtype == dtype


@pytest.mark.parametrize("weights", [None, "mask", "numbers"])
@pytest.mark.parametrize("jitted", [False, True])
def test_sixteen_bits_are_added_up_in_more(weights, jitted):
    def mean(loss, x, y):
        w = {None: None, "mask": torch.arange(len(x)) >= 0, "numbers": torch.ones(len(x))}[weights]
        f = torch.func.grad_and_value(lambda x, y: loss(x, y, w))
        return (fdl.jit(f) if jitted else f)(x, y)

    half = {"dtype": torch.float16}
    _, value = mean(losses.mse, torch.full((2, 1), 200.0, **half), torch.zeros(2, 1, **half))
    assert value == 40000
    _, value = mean(
        losses.mse, torch.tensor([[300.0]] + [[0.0]] * 9, **half), torch.zeros(10, 1, **half)
    )
    assert value == 9000  # 300² alone overflows
    labels = torch.zeros(65536, dtype=torch.int64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        grad, value = mean(losses.cross_entropy, torch.zeros(65536, 10, dtype=dtype), labels)
        close(value, torch.tensor(10.0).log().to(dtype), rtol=1e-6)
        expected = (torch.full((10,), 0.1) - F.one_hot(labels[:1], 10)[0]) / 65536
        close(grad[-1].float(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_are_integers_of_any_width(dtype):
    expected = losses.cross_entropy(LOGITS, LABELS)
    close(losses.cross_entropy(LOGITS, LABELS.to(dtype)), expected)
    assert metrics.accuracy(LOGITS, LABELS.to(dtype)) == metrics.accuracy(LOGITS, LABELS)


@pytest.mark.parametrize("label", [4, -1, -100])
def test_a_label_that_counts_and_is_no_class_raises(label):
    labels, weights = torch.tensor([0, label, 1, 1, 2, 0, 3]), torch.ones(7)
    for call in (losses.cross_entropy, torch.func.grad(losses.cross_entropy)):
        for w in (None, weights, weights.bool()):
            with pytest.raises(
                ValueError, match=rf"labels must be from 0 to 3, .*index {label} is"
            ):
                call(LOGITS, labels, w)


def test_a_mean_of_nothing_is_zero():
    for loss, y in ((losses.mse, X[:0]), (losses.cross_entropy, LABELS[:0])):
        for weights in (None, torch.ones(0), torch.ones(0, dtype=torch.bool)):
            grad, value = torch.func.grad_and_value(loss)(X[:0], y, weights)
            assert value == 0 and grad.shape == (0, 3)


# Shapes that torch would broadcast, by function: those of its two arguments.
OF_LABELS = {"cross_entropy", "nll"} | {
    name for name in metrics.__all__ if name.islower() and name not in {"mean", "per_batch"}
}
EMBEDDING = {"cosine_embedding", "triplet_margin"}  # of three arguments: test_embedding.py
OF_ELEMENTS = set(losses.__all__) - OF_LABELS - EMBEDDING - {"l2_penalty"}
BROADCAST = {
    **{name: [((7,), (7, 1)), ((7, 4), (7, 1)), ((7, 4), ())] for name in OF_LABELS},
    **{
        name: [((7,), (7, 1)), ((7, 1), (7,)), ((7, 1), ()), ((7, 4), (7, 1))]
        for name in OF_ELEMENTS
    },
}


@pytest.mark.parametrize(
    ("name", "shapes"), [(name, pair) for name in sorted(BROADCAST) for pair in BROADCAST[name]]
)
def test_nothing_is_broadcast(name, shapes):
    function = getattr(losses if name in losses.__all__ else metrics, name)
    dtype = torch.int64 if name in OF_LABELS else torch.float32
    first, second = torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=dtype)
    texts = (str(list(shape)).replace("[", r"\[") for shape in shapes)
    with pytest.raises(ValueError, match=f"{name}: .*{'.*'.join(texts)}"):
        function(first, second)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: losses.mse(X, Y[:, :1]),
            ValueError,
            r"mse: prediction \[7, 3\] and target",
        ),
        (
            lambda: losses.squared_loss(X, Y[0]),
            ValueError,
            r"target \[3\] must have the same shape",
        ),
        (lambda: losses.mse(X, Y, torch.ones(7, 1)), ValueError, r"shape \[7\], .* got \[7, 1\]"),
        (
            lambda: losses.cross_entropy(LOGITS, LABELS, torch.ones(4)),
            ValueError,
            r"weights must have the shape \[7\], one number per example, got \[4\]",
        ),
        (
            lambda: losses.cross_entropy(LOGITS, LABELS.double()),
            TypeError,
            r"labels must be integers \[batch\], or probabilities \[batch, classes\] for logits "
            r"\[7, 4\], got a tensor float64\[7\]",
        ),
        (
            lambda: losses.cross_entropy(LOGITS, LABELS[:, None]),
            ValueError,
            r"logits \[batch, classes\] and labels \[batch\], got \[7, 4\] and \[7, 1\]",
        ),
        (lambda: losses.cross_entropy(LOGITS[0], LABELS), ValueError, r"got \[4\] and \[7\]"),
        (
            lambda: losses.cross_entropy(LOGITS, LABELS, label_smoothing=1.5),
            ValueError,
            r"label_smoothing must be in \[0, 1\], got 1.5",
        ),
        (lambda: losses.l2_penalty({"a": {}}), ValueError, "l2_penalty: params has no leaves"),
    ],
    ids=[
        *("mse-shape", "squared-shape", "mse-weights", "weights", "label-dtype", "label-shape"),
        *("logit-shape", "smoothing", "no-leaves"),
    ],
)
def test_bad_input_raises(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_losses_of_elements_and_of_weights_leave_sixteen_bits_at_the_end_only():
    w = torch.tensor([300.0]).half()  # 300² is not a number of float16, 300² / 2 is
    for loss in (losses.squared_loss(w, torch.zeros_like(w)), losses.l2_penalty({"w": w})):
        assert loss.dtype == torch.float16 and loss.item() == torch.tensor(45_000.0).half()
