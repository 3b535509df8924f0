"""Training as a pure function: the state, the loss of a model, steps with and without buffers."""

import functools

import pytest
import torch

import fdl
from fdl import losses, metrics, nn, optim, random, tree
from fdl.data import Batch
from fdl.tree._map import match
from tests.support.asserts import close, draw, equal_bits, unchanged

KEY = random.key(7)
X, LABELS = draw(0, 6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
MASK = torch.tensor([True, True, False, True, False, False])
NET = nn.sequential(nn.linear(3, 5), nn.relu, nn.dropout(0.5), nn.linear(5, 2))
PARAMS = tree.cast(NET.init(KEY), torch.float64)
OPT = optim.sgd(0.1, 0.9)
F64 = torch.float64


# ------------------------------------------------------------------------------ TrainState.create


def test_create_splits_the_key_once():
    init_key, run_key = random.split(KEY)
    with unchanged(KEY):
        state = fdl.TrainState.create(NET, OPT, key=KEY)
    assert tree.diff(state.params, NET.init(init_key)) == []
    assert torch.equal(state.key, run_key)
    assert tree.diff(state.opt_state, OPT.init(state.params)) == []
    assert state.buffers == {}
    assert state.step.dtype == torch.int64 and state.step == 0 and state.step.shape == ()


def test_create_takes_parameters_of_another_floating_dtype():
    state = fdl.TrainState.create(NET, OPT, key=KEY, params=PARAMS)
    assert tree.diff(state.params, PARAMS) == []
    assert torch.equal(state.key, random.split(KEY)[1])
    momentum = optim.slots(state.opt_state)["momentum_buffer"]
    assert {leaf.dtype for leaf in tree.leaves(momentum)} == {torch.float64}


def test_a_model_that_draws_float64_takes_parameters_as_well():
    model = nn.Model(lambda key: {"w": torch.ones(2).double()}, NET.apply)
    for dtype in (torch.float32, torch.float64):
        params = {"w": torch.zeros(2, dtype=dtype)}
        assert fdl.TrainState.create(model, OPT, key=KEY, params=params).params is params


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda p: {"0": p["0"]}, ["3.bias: expected float32[2], got nothing", "3.weight: "]),
        (lambda p: {**p, "4": p["0"]}, ["4.bias: expected nothing, got float32[5]", "4.weight: "]),
        (
            lambda p: tree.map(lambda leaf: leaf[:1], p),
            ["0.bias: expected float32[5], got float32[1]", "3.weight: expected float32[2, 5]"],
        ),
        (
            lambda p: {**p, "3": tree.map(lambda leaf: leaf.long(), p["3"])},
            ["3.bias: expected float32[2], got int64[2]", "3.weight: expected float32[2, 5]"],
        ),
    ],
    ids=["missing", "unexpected", "shape", "integers"],
)
def test_parameters_that_do_not_fit_raise_and_every_path_is_listed(change, lines):
    with pytest.raises(ValueError, match="params do not fit the model") as error:
        fdl.TrainState.create(NET, OPT, key=KEY, params=change(PARAMS))
    for line in lines:
        assert f"\n  {line}" in str(error.value)


# ------------------------------------------------------------------------------ supervised


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (losses.cross_entropy, LABELS),
        (functools.partial(losses.cross_entropy, label_smoothing=0.1), LABELS),
        (losses.mse, draw(1, 6, 2)),
        (losses.squared_loss, draw(1, 6, 2)),
        (lambda prediction, y: (prediction - y).abs().sum(1), draw(1, 6, 2)),
    ],
    ids=["cross_entropy", "partial", "mse", "per-element", "per-example"],
)
def test_a_masked_batch_equals_the_shorter_one(loss, y):
    f = fdl.supervised(NET, loss)
    grads, (value, found) = torch.func.grad_and_value(f, has_aux=True)(PARAMS, Batch(X, y, MASK))
    short, (expected, plain) = torch.func.grad_and_value(f, has_aux=True)(
        PARAMS, (X[MASK], y[MASK])
    )
    close(value, expected)
    close(grads, short)
    assert found["loss"].count == plain["loss"].count == 3
    close(found["loss"].value, value)
    close(plain["loss"].value, value)


def test_the_loss_is_that_of_the_predictions():
    value, found = fdl.supervised(NET, losses.cross_entropy)(PARAMS, (X, LABELS))
    close(value, torch.nn.functional.cross_entropy(NET.apply(PARAMS, X), LABELS))
    assert found["loss"].count == 6 and list(found) == ["loss"]


def test_a_scalar_loss_without_weights_refuses_a_mask():
    f = fdl.supervised(NET, torch.nn.functional.cross_entropy)
    assert f(PARAMS, (X, LABELS))[1]["loss"].count == 6
    with pytest.raises(
        ValueError, match=r"one value per example or be a function \(prediction, y, weights\)"
    ):
        f(PARAMS, Batch(X, LABELS, MASK))


def test_metrics_see_predictions_labels_and_mask():
    hits = NET.apply(PARAMS, X).argmax(1) == LABELS
    f = fdl.supervised(NET, losses.cross_entropy, {"accuracy": metrics.accuracy})
    value, found = f(tree.map(torch.nn.Parameter, PARAMS), Batch(X, LABELS, MASK))
    assert found["accuracy"] == metrics.Mean(hits[MASK].double().sum(), torch.tensor(3.0).double())
    assert value.requires_grad and not any(leaf.requires_grad for leaf in tree.leaves(found))
    assert f(PARAMS, (X, LABELS))[1]["accuracy"].count == 6


def test_mode_and_key_are_those_of_apply():
    f = fdl.supervised(NET, losses.cross_entropy)
    dropped = losses.cross_entropy(NET.apply(PARAMS, X, train=True, key=KEY), LABELS)
    evaluated = losses.cross_entropy(NET.apply(PARAMS, X), LABELS)
    assert dropped != evaluated
    close(f(PARAMS, (X, LABELS), train=True, key=KEY)[0], dropped, rtol=0)
    close(f(PARAMS, (X, LABELS))[0], evaluated, rtol=0)
    close(f(PARAMS, (X, LABELS), key=KEY)[0], evaluated, rtol=0)  # a key alone is no mode
    with pytest.raises(ValueError, match=r"dropout.* needs a key"):
        f(PARAMS, (X, LABELS), train=True)


def test_a_model_that_draws_nothing_trains_without_a_key():
    seen = []

    def apply(params, x, *, train=False, key=None):
        seen.append((train, key))
        return x @ params["w"]

    f = fdl.supervised(nn.Model(lambda key: {}, apply), losses.mse)
    f({"w": draw(2, 3, 2)}, (X, draw(1, 6, 2)), train=True)
    f({"w": draw(2, 3, 2)}, (X, draw(1, 6, 2)))
    assert seen == [(True, None), (False, None)]


def of_rows(prediction, y):
    return ((prediction - y) ** 2).mean(1)


def weighted(prediction, y, weights):
    w = torch.ones(len(y)) if weights is None else weights.double()
    return (of_rows(prediction, y) * w).sum() / w.sum()


TAKES_WEIGHTS = {
    "three by other names": lambda a, b, c: weighted(a, b, c),
    "a default of None": lambda a, b, c=None: weighted(a, b, c),
    "one more by name": lambda a, b, c=None, *, power=2: weighted(a, b, c),
    "a partial": functools.partial(losses.mse),
}
TAKES_TWO = {
    "two": of_rows,
    "a number": lambda a, b, eps=0.0: of_rows(a, b) + eps,
    "named weights": lambda a, b, *, weights=None: of_rows(a, b) if weights is None else 1 / 0,
    "more than three": lambda a, b, c=None, d=None: of_rows(a, b) if c is None else 1 / 0,
    "any number": lambda *args: of_rows(*args),
}


@pytest.mark.parametrize("loss", [*TAKES_WEIGHTS.values(), *TAKES_TWO.values()])
def test_weights_go_by_the_number_of_positional_parameters(loss):
    y = draw(1, 6, 2)
    prediction = NET.apply(PARAMS, X)
    f = fdl.supervised(NET, loss)
    close(f(PARAMS, (X, y))[0], of_rows(prediction, y).mean())
    close(f(PARAMS, (X, y, MASK))[0], of_rows(prediction, y)[MASK].mean())


# ------------------------------------------------------------------------------ steps


def test_a_step_is_one_update_with_the_key_of_its_number():
    loss = fdl.supervised(NET, losses.cross_entropy)
    step = fdl.train_step(loss, OPT)
    state = fdl.TrainState.create(NET, OPT, key=KEY, params=PARAMS)
    batch = Batch(X, LABELS, MASK)
    for number in range(3):
        key = random.fold_in(state.key, number)
        grads, (value, found) = torch.func.grad_and_value(
            lambda p, key=key: loss(p, batch, train=True, key=key), has_aux=True
        )(state.params)
        updates, opt_state = OPT.update(grads, state.opt_state, state.params)
        with unchanged(state, batch):
            new, metrics_of_step = step(state, batch)
        close(new.params, optim.apply_updates(state.params, updates), rtol=0)
        assert tree.diff(new.opt_state, opt_state) == []
        assert tree.diff(metrics_of_step, found) == []
        close(metrics_of_step["loss"].value, value)
        assert new.step == number + 1 and equal_bits(new.key, state.key)
        assert tree.diff(state, new, values=False) == []
        match(state, new, "same form")
        state = new


def test_the_optimizer_gets_the_value_and_a_function_for_it():
    seen = []

    def update(grads, state, params, *, value=None, value_fn=None):
        seen.append((value, value_fn(params), value_fn(tree.map(torch.zeros_like, params))))
        return tree.map(lambda g: -g, grads), state

    opt = optim.Optimizer(lambda params: (), update)
    loss = fdl.supervised(NET, losses.cross_entropy)
    state = fdl.TrainState.create(NET, opt, key=KEY, params=PARAMS)
    fdl.train_step(loss, opt)(state, (X, LABELS))
    ((value, again, at_zero),) = seen
    # The same batch and the same dropout; and logits of 0 are a loss of log 2.
    expected, _ = loss(PARAMS, (X, LABELS), train=True, key=random.fold_in(state.key, 0))
    close(value, expected, rtol=0)
    close(again, expected, rtol=0)
    close(at_zero, torch.tensor(2.0).double().log())


def test_evaluation_draws_nothing_and_changes_nothing():
    loss = fdl.supervised(NET, losses.cross_entropy, {"accuracy": metrics.accuracy})
    state = fdl.TrainState.create(NET, OPT, key=KEY, params=PARAMS)
    with unchanged(state):
        found = fdl.eval_step(loss)(state, Batch(X, LABELS, MASK))
    assert list(found) == ["loss", "accuracy"]
    logits = NET.apply(PARAMS, X[MASK])
    close(found["loss"].value, losses.cross_entropy(logits, LABELS[MASK]))
    assert found["accuracy"].count == 3


# ------------------------------------------------------------------------------ buffers


def centring():
    """x·w after subtracting the batch's mean in training, the running mean in evaluation."""

    def init(key):
        return {"w": torch.ones(3, 2).double()}, {"mean": torch.zeros(3).double()}

    def apply(params, buffers, x, *, train=False, key=None):
        assert train == (key is not None)
        if not train:
            return (x - buffers["mean"]) @ params["w"], buffers
        mean = x.mean(0)
        running = 0.9 * buffers["mean"] + 0.1 * mean.detach()
        return (x - mean) @ params["w"], {"mean": running}

    return nn.StatefulModel(init, apply)


def test_buffers_go_in_and_come_out():
    model, opt, y = centring(), optim.sgd(0.1), draw(1, 6, 2)
    loss = fdl.supervised(model, losses.mse)
    state = fdl.TrainState.create(model, opt, key=KEY)
    assert torch.equal(state.buffers["mean"], torch.zeros(3))
    step, w, running = fdl.train_step(loss, opt), state.params["w"], torch.zeros(3).double()
    for number in range(3):
        x = X + number
        w = w.clone().requires_grad_()
        torch.nn.functional.mse_loss((x - x.mean(0)) @ w, y).backward()
        w = (w - 0.1 * w.grad).detach()
        running = 0.9 * running + 0.1 * x.mean(0)
        with unchanged(state):
            new, found = step(state, (x, y))
        assert list(found) == ["loss"]
        state = new
        close(state.params["w"], w)
        close(state.buffers["mean"], running)
    with unchanged(state):
        found = fdl.eval_step(loss)(state, (X, y))
    close(found["loss"].value, losses.mse((X - running) @ w, y))


def test_the_stateful_loss_returns_metrics_and_buffers():
    model = centring()
    params, buffers = model.init(KEY)
    loss = fdl.supervised(model, losses.mse)
    value, (found, new) = loss(params, buffers, (X, draw(1, 6, 2)), train=True, key=KEY)
    close(found["loss"].value, value)
    close(new["mean"], 0.1 * X.mean(0))
    assert loss(params, buffers, (X, draw(1, 6, 2)))[1][1] is buffers


def test_a_stateful_loss_of_ones_own():
    """Nothing goes by names: the second parameter of one is called x, of the other buffers."""

    def count(p, state, b, *, train, key):
        assert (key is not None) == train
        value = ((b[0] @ p["w"] - b[1]) ** 2).mean()
        return value, ({"loss": metrics.mean(value.detach()[None])}, {"n": state["n"] + train})

    def init(key):
        return {"w": torch.ones(3, 2).double()}, {"n": torch.tensor(0)}

    def apply(params, buffers, *, train=False, key=None):
        return buffers @ params["w"]

    plain = nn.Model(lambda key: init(key)[0], apply)
    batch, opt = (X, draw(1, 6, 2)), optim.sgd(0.1)
    loss = fdl.StatefulLoss(count)
    state = fdl.TrainState.create(nn.StatefulModel(init, apply), opt, key=KEY)
    expected = fdl.TrainState.create(plain, opt, key=KEY)
    for number in range(3):
        state, found = fdl.train_step(loss, opt)(state, batch)
        expected, plain_found = fdl.train_step(fdl.supervised(plain, losses.mse), opt)(
            expected, batch
        )
        close(state.params, expected.params)
        close(found["loss"].value, plain_found["loss"].value)
        assert state.buffers == {"n": number + 1}
    close(
        fdl.eval_step(loss)(state, batch)["loss"].value, losses.mse(X @ state.params["w"], batch[1])
    )


def test_a_mask_goes_to_the_models_that_take_one():
    masks = []

    def apply(params, buffers, x, **options):
        masks.append(options.get("mask"))
        return x, buffers

    model = nn.StatefulModel(lambda key: ({}, {"n": torch.tensor(0)}), apply, takes_mask=True)
    batch = Batch(X, draw(1, 6, 3), MASK)
    norm, refuses = nn.batch_norm(3), model._replace(takes_mask=False)
    for wrapped in (model, nn.sequential(model), nn.with_policy(model, nn.Policy(compute=F64))):
        params, buffers = wrapped.init(KEY)
        assert wrapped.takes_mask
        loss = fdl.supervised(wrapped, losses.mse)
        loss(params, buffers, batch, train=True)
        loss(params, buffers, batch)
    assert [mask is MASK for mask in masks] == [True, False] * 3
    assert nn.sequential(norm, model).takes_mask and norm.takes_mask
    for wrapped in (refuses, nn.sequential(norm, refuses), nn.with_policy(refuses)):
        assert not wrapped.takes_mask
        with pytest.raises(ValueError, match=r"the model takes none \(its takes_mask is False\)"):
            fdl.supervised(wrapped, losses.mse)(*wrapped.init(KEY), batch, train=True)
    with pytest.raises(ValueError, match=r"sequential: .*takes none"):
        net = nn.sequential(norm, refuses)
        net.apply(*net.init(KEY), X.float(), train=True, mask=MASK)


def test_parameters_in_other_containers_raise():
    model = nn.sequential(nn.linear(2, 2))
    params = model.init(random.key(0))
    with pytest.raises(
        ValueError, match=r"create: params do not fit.*\n  : expected dict, got list"
    ):
        fdl.TrainState.create(model, optim.sgd(0.1), key=random.key(0), params=[params["0"]])


# ------------------------------------------------------------------------------ bad batches


@pytest.mark.parametrize("form", ["eager", "jit", "vmap"])
@pytest.mark.parametrize("guard", [optim.apply_if_finite, optim.loss_scale])
def test_a_skipped_batch_of_nan_leaves_buffers_and_their_average(guard, form, plain_backend):
    """A batch with a NaN would stay in the running statistics for ever."""
    model = nn.sequential(nn.batch_norm(3), nn.linear(3, 2))
    opt = optim.chain(guard(optim.sgd(0.1)), optim.params_ema(0.9, buffers=True))
    state = fdl.TrainState.create(model, opt, key=KEY)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    step = {"eager": lambda f: f, "jit": fdl.jit, "vmap": one_of_two}[form](step)
    x = X.float()
    good, _ = step(state, (x, LABELS))
    bad, _ = step(good, (torch.where(x == x[0, 0], torch.nan, x), LABELS))
    for before, after in ((good.params, bad.params), (good.buffers, bad.buffers)):
        assert tree.diff(before, after) == []
    assert tree.diff(fdl.averaged(good)[1], fdl.averaged(bad)[1]) == []
    after, _ = step(bad, (x, LABELS))
    assert tree.diff(after.buffers, good.buffers) != []
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(after))


def test_skipped_buffers_are_matched_by_key():
    """A model may fill the dict of its new buffers in another order."""

    def apply(params, buffers, x, *, train=False, key=None):
        new = {"mean": x.mean(0), "count": buffers["count"] + 1}
        return (x * params["w"]).sum(1), new if train else buffers

    start = {"w": torch.ones(3)}, {"count": torch.tensor(0), "mean": torch.zeros(3)}
    model, opt = nn.StatefulModel(lambda key: start, apply), optim.apply_if_finite(optim.sgd(0.1))
    state = fdl.TrainState.create(model, opt, key=KEY)
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    x = torch.tensor([[torch.nan, 1.0, 2.0]])
    assert tree.diff(step(state, (x, torch.ones(1)))[0].buffers, start[1]) == []


@pytest.mark.parametrize(
    ("new", "text"),
    [
        ({"mean": torch.zeros(4)}, r"buffers:\n  mean: expected float32\[3\], got float32\[4\]"),
        ({"mean": torch.zeros(3).half()}, r"mean: expected float32\[3\], got float16\[3\]"),
        ({"mean": 0.0}, r"mean: expected float32\[3\], got float 0\.0"),
        ({"average": torch.zeros(3)}, r"average: unexpected .*\n.*mean: missing"),
        ((), "the buffers that the loss returned"),
    ],
)
def test_new_buffers_are_like_the_old(new, text, plain_backend):
    params, old = {"w": torch.ones(3)}, {"mean": torch.zeros(3)}
    model = nn.StatefulModel(
        lambda key: (params, old),
        lambda params, buffers, x, train=False, key=None: ((x * params["w"]).sum(1), new),
    )
    opt = optim.sgd(0.1)
    state = fdl.TrainState.create(model, opt, key=KEY)
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    for call in (step, fdl.jit(step)):
        with pytest.raises(ValueError, match=f"train_step: (?s:.*){text}"):
            call(state, (torch.ones(2, 3), torch.ones(2)))


def one_of_two(step):
    """Step two members of a population, one of them on other data; return the first."""

    def call(state, batch):
        other = (torch.ones_like(batch[0]), batch[1])
        states, batches = tree.stack([state, state]), tree.stack([batch, other])
        return tree.map(lambda leaf: leaf[0], torch.vmap(step)(states, batches))

    return call


def test_an_overflow_of_the_loss_scale_moves_finite_buffers_as_in_torch():
    """The forward pass was right: torch's `GradScaler` leaves its statistics alone."""
    model = nn.sequential(nn.batch_norm(3), nn.linear(3, 2))
    opt = optim.loss_scale(optim.sgd(0.1), init=2.0**127)
    state = fdl.TrainState.create(model, opt, key=KEY)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    new, _ = step(state, (X.float() * 100, LABELS))
    assert tree.diff(new.params, state.params) == []
    twin = torch.nn.BatchNorm1d(3)
    twin(X.float() * 100)
    close(new.buffers["0"]["running_mean"], twin.running_mean, rtol=1e-6)
