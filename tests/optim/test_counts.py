"""What padded batches weigh: in `accumulate`, in `reduce_on_plateau`, and by `train_step`."""

import pytest
import torch

import fdl
from fdl import data, losses, nn, optim, random, tree
from fdl.io._schema import describe
from tests.support.asserts import close, draw

NET = nn.sequential(nn.linear(3, 4), nn.tanh, nn.linear(4, 2))
PARAMS = tree.cast(NET.init(random.key(0)), torch.float64)
X, Y = draw(0, 23, 3), draw(1, 23, 2)
INNER = {"sgd": optim.sgd(0.3, momentum=0.9), "adam": optim.adam(0.05)}
LOSS = fdl.supervised(NET, losses.mse)


def padded(n):
    """The batches of 8 of an epoch as fdl cuts them: the last one is padded, and has a mask."""
    rows = data.epoch_indices(random.key(3), n, 8)
    return [data.batch((X[:n], Y[:n]), one) for one in tree.unstack(rows)]


def begin(opt):
    return fdl.TrainState.create(NET, opt, key=random.key(1), params=PARAMS)


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("n", [17, 20, 23])  # 1, 4 and 7 rows in the last batch of 8
def test_windows_with_a_padded_batch_make_the_step_of_the_full_batch(inner, n):
    opt = optim.accumulate(inner, 3)
    state, whole = begin(opt), begin(inner)
    step, full = fdl.train_step(LOSS, opt), fdl.train_step(LOSS, inner)
    for _ in range(3):
        for batch in padded(n):
            state, _ = step(state, batch)
        whole, _ = full(whole, (X[:n], Y[:n]))
        close(state.params, whole.params)
        assert state.opt_state.gathered == 0 and state.opt_state.surplus == 0
    close(state.opt_state.inner, whole.opt_state)


@pytest.mark.slow
def test_a_compiled_scan_of_windows_equals_full_batches(plain_backend):
    opt = optim.accumulate(optim.chain(optim.clip_by_global_norm(0.1), optim.adam(0.05)), 3)
    step = fdl.train_step(LOSS, opt)
    rows = tree.stack(padded(20))
    state, _ = fdl.jit(lambda s, b: fdl.scan(step, s, b))(begin(opt), rows)
    inner = optim.chain(optim.clip_by_global_norm(0.1), optim.adam(0.05))
    whole, _ = fdl.train_step(LOSS, inner)(begin(inner), (X[:20], Y[:20]))
    close(state.params, whole.params)


def test_an_unfinished_window_is_finished_by_empty_batches():
    opt, inner = optim.accumulate(optim.sgd(0.3), 3), optim.sgd(0.3)
    step, state = fdl.train_step(LOSS, opt), begin(opt)
    batch = padded(20)[-1]
    state, _ = step(state, batch)
    assert tree.diff(state.params, PARAMS) == []
    for _ in range(2):
        nothing = tree.map(lambda p: torch.full_like(p, torch.nan), PARAMS)
        updates, opt_state = opt.update(
            nothing, state.opt_state, state.params, value=torch.nan, count=0
        )
        params = optim.apply_updates(state.params, updates)
        state = state._replace(params=params, opt_state=opt_state)
    whole, _ = fdl.train_step(LOSS, inner)(begin(inner), batch)
    close(state.params, whole.params)


def test_a_window_of_nothing_is_an_update_by_zero():
    opt, params = optim.accumulate(optim.sgd(0.3), 2), {"w": torch.ones(2)}
    state = opt.init(params)
    for _ in range(2):
        updates, state = opt.update(tree.map(torch.log, params), state, params, count=0)
        assert not updates["w"].any()
    _, state = opt.update(params, state, params, count=torch.tensor(3))
    updates, _ = opt.update(params, state, params, count=torch.tensor(5))
    close(updates["w"], torch.full((2,), -0.3), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^accumulate: count must be a scalar, got \[2\]"):
        opt.update(params, state, params, count=torch.ones(2))


def test_values_weigh_as_much_as_their_gradients():
    seen = []

    def update(grads, state, params, *, value=None, value_fn=None, count=None):
        seen.append((value, count))
        return grads, state

    opt = optim.accumulate(optim.Optimizer(lambda params: (), update), 2)
    state = opt.init({"w": torch.zeros(1)})
    for value, count in ((1.0, 3), (5.0, 1)):
        _, state = opt.update(
            {"w": torch.ones(1)}, state, {"w": torch.zeros(1)}, value=value, count=count
        )
    assert seen[-1] == (2.0, 4.0)


WRAPPED = {
    "chain": lambda opt: optim.chain(opt, optim.scale(1.0)),
    "masked": lambda opt: optim.masked(opt, "*"),
    "multi_transform": lambda opt: optim.multi_transform({"a": opt}, {"a": "*"}),
    "freeze": lambda opt: optim.chain(optim.freeze(opt, "b")),
    "apply_if_finite": optim.apply_if_finite,
    "lookahead": lambda opt: optim.lookahead(opt, 100),
    "loss_scale": lambda opt: optim.loss_scale(opt, init=1.0),
    "reduce_on_plateau": lambda opt: optim.chain(
        optim.reduce_on_plateau(optim.chain(opt, optim.sgd(0.1)))
    ),
    "accumulate": lambda opt: optim.accumulate(opt, 1),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_count_goes_through_whatever_stands_around(wrap):
    got = []

    def update(grads, state, params, *, count=None, **extra):
        got.append(float(count))
        return grads, state

    def fixed(grads, state, params, *, value=None, value_fn=None):
        return grads, state

    params = {"w": torch.ones(2), "b": torch.ones(1)}
    for takes in (True, False):
        plain = optim.Optimizer(lambda params: (), update if takes else fixed)
        opt = wrap(plain)
        opt.update(params, opt.init(params), params, value=1.0, count=7)
    assert got == [7.0]


def test_a_look_of_reduce_on_plateau_is_at_the_mean_over_examples():
    opt, params = optim.reduce_on_plateau(optim.sgd(1.0), every=2), {"w": torch.ones(1)}
    state = opt.init(params)
    for value, count in ((1.0, 3), (5.0, 1)):
        _, state = opt.update(params, state, params, value=value, count=count)
    assert state.best == 2 and state.surplus == 0
    for _ in range(2):  # nothing is seen, so nothing is worse
        _, state = opt.update(params, state, params, value=torch.nan, count=0)
    assert state.best == 2 and state.bad == 0


def test_a_state_met_by_a_shorter_window_does_not_wait_for_ever():
    params = {"w": torch.ones(1)}
    state = optim.accumulate(optim.sgd(1.0), 5).init(params)
    for _ in range(4):
        _, state = optim.accumulate(optim.sgd(1.0), 5).update(params, state, params)
    updates, state = optim.accumulate(optim.sgd(1.0), 2).update(params, state, params)
    assert updates["w"] < 0 and state.gathered == 0
    state = optim.reduce_on_plateau(optim.sgd(1.0), every=5).init(params)
    for _ in range(4):
        _, state = optim.reduce_on_plateau(optim.sgd(1.0), every=5).update(
            params, state, params, value=1.0
        )
    state = optim.reduce_on_plateau(optim.sgd(1.0), every=2).update(
        params, state, params, value=1.0
    )[1]
    assert state.seen == 0 and state.best == 1


# ------------------------------------------------------------------------------ earlier versions


WITH_COUNTS = {
    "accumulate": optim.accumulate(optim.sgd(1.0), 3),
    "plateau": optim.reduce_on_plateau(optim.sgd(1.0), every=3),
}


@pytest.mark.parametrize("opt", WITH_COUNTS.values(), ids=WITH_COUNTS)
def test_files_that_say_nothing_of_counts_are_read(opt, tmp_path, monkeypatch):
    """As versions before wrote them: without the last field."""
    params = {"w": torch.ones(1)}
    _, state = opt.update(params, opt.init(params), params, value=2.0)

    def without(whole, caller):
        node, tensors = describe(whole, caller)
        del node["state"][2]["surplus"]
        return node, {at: leaf for at, leaf in tensors.items() if at != "state.surplus"}

    with monkeypatch.context() as patch:
        patch.setattr("fdl.io._schema.describe", without)
        fdl.io.save(tmp_path / "old", {"state": state})
    for like in (None, {"state": state}, {"state": tree.to(state, "meta")}):
        loaded = fdl.io.load(tmp_path / "old", like=like)["state"]
        assert tree.diff(loaded, state) == []
        expected = opt.update(params, state, params, value=3.0, count=5)
        assert tree.diff(opt.update(params, loaded, params, value=3.0, count=5), expected) == []
