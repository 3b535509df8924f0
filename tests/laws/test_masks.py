"""What is masked does not count: a law over every public function that takes a mask or weights.

A row that is left out is filled with poison, and nothing may differ from the rows that count alone:
no value, gradient, statistic or weight; eagerly, jitted, in a scan, under vmap.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fdl
from fdl import _training, losses, metrics, nn, optim, random, tree
from fdl._masks import fill_masked
from fdl.data import Batch
from fdl.losses._mean import weighted_mean
from tests.support.asserts import close, draw

KEY = random.key(3)
POISONS = [torch.nan, torch.inf, -torch.inf, 1e30, 0.0]
LABELS = [-100, 10**9]
MASK = torch.tensor([False, True, True, False, True, False])
COUNTED = torch.tensor([1, 2, 4])  # by number, as a traced function can take them
OTHERS = torch.tensor([0, 3, 5])
MASKS = {
    "bool": MASK,
    "weights": MASK.double(),
    "float32": MASK.float(),
    "integers": MASK.long(),
}
each_poison = pytest.mark.parametrize("poison", POISONS)
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def poisoned(x: Tensor, poison: float, label: int = -100) -> Tensor:
    """Fill the rows that do not count."""
    bad = torch.full_like(x, poison if x.is_floating_point() else label)
    return torch.where(MASK.view(-1, *[1] * (x.ndim - 1)), x, bad)


# ------------------------------------------------------------------------------ functions of rows


class Row(NamedTuple):
    f: Callable[..., Any]  # (x, y, mask or None) -> a tree
    x: Tensor
    y: Tensor
    differentiable: bool = True


def normalised(x: Tensor, y: Tensor, mask: Tensor | None) -> Any:
    """All that batch_norm gives for the rows that count, and its buffers."""
    layer = nn.batch_norm(4)
    params, buffers = tree.cast(layer.init(KEY), torch.float64)
    out, new = layer.apply(params, buffers, x, train=True, mask=mask)
    return (out if mask is None else out[COUNTED]), new


def of_batch(f: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """Make a function of a batch one of its parts."""

    def call(x: Tensor, y: Tensor, mask: Tensor | None) -> Any:
        return f(params, Batch(x, y) if mask is None else Batch(x, y, mask))

    return call


NET = nn.sequential(nn.linear(4, 5), nn.tanh, nn.linear(5, 3))
PARAMS = tree.cast(NET.init(KEY), torch.float64)
SUPERVISED = fdl.supervised(NET, losses.cross_entropy, {"accuracy": metrics.accuracy})
LOGITS, INDEX = draw(0, 6, 4), torch.tensor([3, 0, 1, 2, 3, 1])
CLASSES = torch.tensor([2, 0, 1, 2, 0, 1])
STATE = fdl.TrainState.create(NET, optim.sgd(0.1, 0.9), key=KEY, params=PARAMS)

SIGNS = torch.tensor([1, -1, -1, 1, 1, 1])


def signed(x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
    """A loss of pairs whose targets are 1 and −1 where they count."""
    return losses.cosine_embedding(x, x.flip(1), y, w, margin=0.1)


def probable(f: Callable[..., Tensor]) -> Row:
    """The row of a loss of log-probabilities or logits and of probabilities."""
    return Row(f, LOGITS.log_softmax(1), draw(1, 6, 4).softmax(1))


ROWS = {
    "losses.binary_cross_entropy_with_logits": probable(losses.binary_cross_entropy_with_logits),
    "losses.binary_cross_entropy_with_logits(pos_weight)": probable(
        lambda x, y, w: losses.binary_cross_entropy_with_logits(x, y, w, pos_weight=3.0)
    ),
    "losses.cosine_embedding": Row(signed, LOGITS, SIGNS),
    "losses.cross_entropy(class_weights)": Row(
        lambda x, y, w: losses.cross_entropy(
            *(x, y, w), label_smoothing=0.1, class_weights=torch.arange(4.0), ignore_index=2
        ),
        LOGITS,
        INDEX,
    ),
    "losses.cross_entropy(soft)": probable(
        lambda x, y, w: losses.cross_entropy(x, y, w, class_weights=torch.arange(4.0))
    ),
    "losses.huber": Row(losses.huber, LOGITS, draw(1, 6, 4)),
    "losses.kl_div": probable(losses.kl_div),
    "losses.kl_div(log_target)": Row(
        lambda x, y, w: losses.kl_div(x, y, w, log_target=True), LOGITS, draw(1, 6, 4)
    ),
    "losses.l1": Row(losses.l1, LOGITS, draw(1, 6, 4)),
    "losses.nll": Row(losses.nll, LOGITS, INDEX),
    "losses.smooth_l1": Row(losses.smooth_l1, LOGITS, draw(1, 6, 4)),
    **{
        f"losses.triplet_margin(p={p})": Row(
            lambda x, y, w, p=p: losses.triplet_margin(x, y, y.flip(1), w, p=p, swap=True),
            LOGITS,
            draw(1, 6, 4),
        )
        for p in (1, 2, 3, float("inf"))
    },
    "losses.cross_entropy": Row(losses.cross_entropy, LOGITS, INDEX),
    "losses.cross_entropy(label_smoothing)": Row(
        lambda x, y, w: losses.cross_entropy(x, y, w, label_smoothing=0.1), LOGITS, INDEX
    ),
    "losses.mse": Row(losses.mse, LOGITS, draw(1, 6, 4)),
    "losses.weighted_mean": Row(lambda x, y, w: weighted_mean(x, w), LOGITS, INDEX),
    "metrics.per_batch": Row(metrics.per_batch(F.mse_loss), LOGITS, draw(1, 6, 4)),
    "metrics.mean": Row(lambda x, y, w: metrics.mean(x, w), LOGITS, INDEX),
    **{
        f"metrics.{f.__name__}": Row(f, LOGITS, INDEX, differentiable=False)
        for f in (metrics.accuracy, metrics.confusion_matrix, metrics.precision_recall_f1)
    },
    "metrics.calibration_error": Row(metrics.calibration_error, LOGITS, INDEX),
    "metrics.top_k_accuracy": Row(
        lambda x, y, w: metrics.top_k_accuracy(x, y, w, k=2), LOGITS, INDEX, differentiable=False
    ),
    "nn.batch_norm": Row(normalised, LOGITS, INDEX),
    "training.supervised": Row(of_batch(SUPERVISED, PARAMS), LOGITS, CLASSES),
    "training.train_step": Row(
        of_batch(fdl.train_step(SUPERVISED, optim.sgd(0.1, 0.9)), STATE), LOGITS, CLASSES
    ),
    "training.eval_step": Row(of_batch(fdl.eval_step(SUPERVISED), STATE), LOGITS, CLASSES),
}
NO_ROW = {
    "training.StatefulLoss": "a type",
    "training.TrainState": "a type",
    "training.averaged": "has no batch",
    "training.update_bn": "tests/training/test_update_bn.py",
    "losses.squared_loss": "has no weights",
    "losses.l2_penalty": "has no weights",
    "metrics.CalibrationError": "a type",
    "metrics.ConfusionMatrix": "a type",
    "metrics.Mean": "a type",
    "metrics.PrecisionRecallF1": "a type",
}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_every_public_function_that_takes_a_mask_has_a_row():
    modules = {"losses": losses, "metrics": metrics, "training": _training}
    public = {f"{name}.{thing}" for name, module in modules.items() for thing in module.__all__}
    assert public | {"losses.weighted_mean", "nn.batch_norm"} == {
        name.partition("(")[0] for name in ROWS
    } | set(NO_ROW)
    for name in NO_ROW:
        thing = getattr(modules[name.partition(".")[0]], name.partition(".")[2])
        assert not {"mask", "weights"} & inspect.signature(thing).parameters.keys()


def total(found: Any) -> Tensor:
    """All floating values in one number."""
    leaves = [leaf for leaf in tree.leaves(found) if leaf.is_floating_point()]
    return torch.stack([leaf.double().sin().sum() for leaf in leaves]).sum()


@each_row
@each_mask
@each_poison
def test_poison_in_a_masked_row_is_not_noticed(row, mask, poison):
    for label in LABELS:
        x, y = poisoned(row.x, poison), poisoned(row.y, poison, label)
        close(row.f(x, y, mask), row.f(row.x[MASK], row.y[MASK], None))
        if row.differentiable:
            found = grad(lambda x, row=row, y=y: total(row.f(x, y, mask)))(x)
            alone = grad(lambda x, row=row: total(row.f(x, row.y[MASK], None)))(row.x[MASK])
            close(found[MASK], alone)
            assert not found[~MASK].any()


@each_row
def test_poison_is_not_noticed_when_jitted_or_vmapped(row, plain_backend):
    expected = row.f(row.x[MASK], row.y[MASK], None)
    x = torch.stack([poisoned(row.x, poison) for poison in POISONS])
    y = torch.stack([poisoned(row.y, poison) for poison in POISONS])
    jitted = fdl.jit(row.f)
    for i in range(len(POISONS)):
        close(jitted(x[i], y[i], MASK), expected)
    found = vmap(row.f)(x, y, MASK.expand(len(POISONS), -1))
    close(found, tree.map(lambda leaf: torch.stack([leaf] * len(POISONS)), expected))


@each_poison
def test_ignore_index_is_a_mask(poison):
    labels = poisoned(INDEX, poison, -100)
    for weights in MASKS.values():
        close(
            losses.cross_entropy(poisoned(LOGITS, poison), labels, weights),
            F.cross_entropy(poisoned(LOGITS, poison), labels, ignore_index=-100),
        )


# ------------------------------------------------------------------------------ models in training


def embed(params, x, *, train=False, key=None):
    return params["table"][x].mean(1)


def both(params, x, *, train=False, key=None):
    return torch.cat([params["w"] * x["a"].log(), embed(params, x["b"])], 1)


POSITIVE = draw(5, 6, 4).abs() + 0.5
IMAGES = draw(6, 6, 2, 4, 4)
WORDS = random.randint(KEY, (6, 7), 0, 9)
MODELS: dict[str, tuple[Any, Any]] = {
    "matmul": (NET, LOGITS),
    "conv": (
        nn.sequential(nn.conv2d(2, 3, 3), nn.relu, nn.max_pool2d(2), nn.flatten()),
        IMAGES,
    ),
    "batch_norm": (nn.sequential(nn.linear(4, 3), nn.batch_norm(3), nn.relu), LOGITS),
    "two norms of images": (
        nn.sequential(
            nn.conv2d(2, 3, 3), nn.batch_norm(3), nn.sigmoid, nn.batch_norm(3), nn.flatten()
        ),
        IMAGES,
    ),
    "log": (nn.sequential(torch.log, nn.linear(4, 3)), POSITIVE),
    "division by a norm": (
        nn.sequential(nn.linear(4, 3, bias=False), lambda x: x / x.norm(dim=1, keepdim=True)),
        LOGITS,
    ),
    "exp": (nn.sequential(nn.linear(4, 3), torch.exp), LOGITS),
    "norm, then division": (
        nn.sequential(nn.linear(4, 3), nn.batch_norm(3), lambda x: x / x.norm(dim=1, keepdim=True)),
        LOGITS,
    ),
    "integers": (nn.Model(lambda key: {"table": draw(7, 9, 3)}, embed), WORDS),
    "a dict": (
        nn.Model(lambda key: {"table": draw(7, 9, 3), "w": draw(8, 4)}, both),
        {"a": POSITIVE, "b": WORDS},
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def prepared(name: str) -> tuple[Any, Any, Any, Any]:
    model, x = MODELS[name]
    opt = optim.sgd(0.1, 0.9)
    state = tree.cast(fdl.TrainState.create(model, opt, key=KEY), torch.float64)
    loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
    return fdl.train_step(loss, opt), fdl.eval_step(loss), state, x


def close_to(found: Any, expected: Any) -> None:
    close(tree.flatten_dict(found), tree.flatten_dict(expected), rtol=1e-11, atol=1e-13)


@each_model
@each_poison
def test_a_step_is_that_of_the_rows_that_count(name, poison):
    step, evaluate, state, x = prepared(name)
    real = Batch(tree.map(lambda leaf: leaf[MASK], x), CLASSES[MASK])
    expected, seen = step(state, real), evaluate(state, real)
    for mask in (MASKS["bool"], MASKS["weights"]):
        bad = Batch(
            tree.map(lambda leaf: poisoned(leaf, poison), x), poisoned(CLASSES, poison), mask
        )
        close_to(step(state, bad), expected)
        close_to(evaluate(state, bad), seen)


@pytest.mark.parametrize("loss", [losses.squared_loss, lambda p, y: ((p - y) ** 2).sum(1) ** 0.5])
@each_poison
def test_targets_are_replaced_for_losses_without_weights(loss, poison):
    step = fdl.train_step(fdl.supervised(NET, loss), optim.sgd(0.1))
    state, y = fdl.TrainState.create(NET, optim.sgd(0.1), key=KEY, params=PARAMS), draw(9, 6, 3)
    bad = Batch(poisoned(LOGITS, poison), poisoned(y, poison), MASK)
    close_to(step(state, bad), step(state, Batch(LOGITS[MASK], y[MASK])))


@pytest.mark.slow
@each_model
def test_poisoned_steps_in_a_scan_and_of_a_population(name, plain_backend):
    step, _, state, x = prepared(name)
    real = Batch(tree.map(lambda leaf: leaf[MASK], x), CLASSES[MASK])
    bad = [
        Batch(tree.map(lambda leaf: poisoned(leaf, p), x), poisoned(CLASSES, p), MASK)  # noqa: B023
        for p in POISONS
    ]
    expected, after = [], state
    for _ in bad:
        after, found = step(after, real)
        expected.append(found)
    scanned = fdl.jit(lambda state, bad: fdl.scan(step, state, bad))(state, tree.stack(bad))
    close_to(scanned, (after, tree.stack(expected)))
    states = tree.stack([state] * len(POISONS))
    first = step(state, real)
    close_to(vmap(step)(states, tree.stack(bad)), tree.stack([first] * len(POISONS)))
    one_by_one = fdl.transforms.sequential_vmap(step)
    close_to(one_by_one(states, tree.stack(bad)), tree.stack([first] * len(POISONS)))


@each_model
@each_poison
def test_a_batch_without_a_row_that_counts_changes_nothing(name, poison):
    step, evaluate, state, x = prepared(name)
    none = torch.zeros(6, dtype=torch.bool)
    bad = tree.map(
        lambda leaf: torch.full_like(leaf, poison if leaf.is_floating_point() else -100), x
    )
    empty = tree.map(lambda leaf: leaf[:0], x)
    batches = [
        Batch(bad, torch.full((6,), -100), none),
        Batch(bad, CLASSES, none.double()),
    ]
    if name not in ("conv", "two norms of images"):  # torch pools no empty batch
        batches += [Batch(empty, CLASSES[:0]), Batch(empty, CLASSES[:0], none[:0])]
    for batch in batches:
        new, found = step(state, batch)
        close_to(new.params, state.params)  # a gradient of 0, and no momentum yet
        close_to(new.buffers, state.buffers)
        for scores in (found, evaluate(state, batch)):
            assert all(mean.total == 0 and mean.count == 0 for mean in scores.values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([None, *POISONS]), min_size=6, max_size=6))
def test_whichever_rows_are_poisoned(poisons):
    mask = torch.tensor([p is None for p in poisons])
    bad = torch.tensor([[0.0 if p is None else p] for p in poisons], dtype=torch.float64)
    step, _, state, x = prepared("batch_norm")
    batch = Batch(torch.where(mask[:, None], x, bad), torch.where(mask, CLASSES, -100), mask)
    new, found = step(state, batch)
    expected = step(state, Batch(x[mask], CLASSES[mask])) if mask.sum() > 1 else None
    if expected is not None:
        close_to((new, found), expected)
    assert all(leaf.isfinite().all() for leaf in tree.leaves(new))
    assert found["loss"].count == mask.sum()


# ------------------------------------------------------------------------------ single rules


def test_rows_left_out_are_filled_with_the_first_if_it_counts_or_with_harmless_numbers():
    x = {"a": draw(0, 6, 2), "b": INDEX, "c": torch.tensor(1.0), "d": "text"}
    first = torch.tensor([True, False, True, False, False, True])
    found = fill_masked(first, x)
    assert torch.equal(found["a"][first], x["a"][first])
    assert torch.equal(found["a"][~first], x["a"][0].expand(3, 2))
    assert torch.equal(found["b"][~first], x["b"][0].expand(3))
    assert found["c"] is x["c"] and found["d"] == "text"
    for mask in (~first, first & False):
        found = fill_masked(mask, {"f": x["a"], "i": INDEX, "b": first, "s": x["a"][:, 0]})
        assert torch.equal(found["f"][mask], x["a"][mask])
        assert torch.equal(found["f"][~mask][0], torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert not found["i"][~mask].any() and not found["b"][~mask].any()
        assert found["s"][~mask].eq(1).all()
        assert (found["i"].dtype, found["b"].dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize(
    "f",
    [
        lambda w: losses.cross_entropy(LOGITS, INDEX, w),
        lambda w: losses.cross_entropy(LOGITS, LOGITS.flip(0).softmax(1), w),
        lambda w: losses.binary_cross_entropy_with_logits(LOGITS, LOGITS.flip(0).sigmoid(), w),
        lambda w: losses.kl_div(LOGITS, LOGITS.flip(0).softmax(1), w),
        lambda w: losses.cosine_embedding(LOGITS, LOGITS.flip(1), SIGNS, w),
        lambda w: losses.triplet_margin(LOGITS, LOGITS.flip(0), LOGITS.flip(1), w),
        lambda w: losses.huber(LOGITS, LOGITS.roll(1, 0), w),
        lambda w: losses.mse(LOGITS, LOGITS.roll(1, 0), w),
        lambda w: weighted_mean(LOGITS, w),
        lambda w: metrics.mean(LOGITS, w).total,
    ],
    ids=[
        *("cross_entropy", "soft", "binary", "kl_div", "cosine", "triplet"),
        *("huber", "mse", "weighted_mean", "mean"),
    ],
)
def test_the_derivative_by_a_weight_of_zero_is_that_of_its_row(f):
    """As learning to weight examples wants it (Ren et al., 2018), whose weights start at 0."""
    for weights in (torch.zeros(6), MASK.double(), torch.ones(6)):
        weights, h = weights.double(), 1e-6
        steps = h * torch.eye(6, dtype=torch.float64)
        numeric = torch.stack([(f(weights + s) - f(weights - s)) / (2 * h) for s in steps])
        if not weights.any():  # a sum of 0 divides by 1
            numeric = torch.stack([f(torch.eye(6, dtype=torch.float64)[i]) for i in range(6)])
        close(grad(f)(weights), numeric, rtol=1e-7, atol=1e-8)
