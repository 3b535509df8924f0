"""Averages of parameters and buffers against `torch.optim.swa_utils.AveragedModel`."""

import pytest
import torch
from torch import nn as oo
from torch.func import vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fdl
from fdl import io, losses, nn, optim, parallel, random, scan, tree
from tests.support.asserts import close, draw

NET = nn.sequential(nn.linear(3, 4), nn.batch_norm(4), nn.tanh, nn.linear(4, 2))
LOSS = fdl.supervised(NET, losses.mse)
X, Y = draw(0, 20, 8, 3), draw(1, 20, 8, 2)


def start(opt, seed=0, dtype=torch.float64):
    model = nn.StatefulModel(lambda key: tree.cast(NET.init(key), dtype), NET.apply)
    return fdl.TrainState.create(model, opt, key=random.key(seed))


def ema(decay=0.9, inner=None, buffers=True):
    return optim.chain(inner or optim.sgd(0.1, 0.9), optim.params_ema(decay, buffers))


def train(opt, steps=20, state=None):
    state = start(opt) if state is None else state
    return scan(fdl.train_step(LOSS, opt), state, (X[:steps], Y[:steps]))[0]


def train_torch(decay, use_buffers, state):
    net = oo.Sequential(oo.Linear(3, 4), oo.BatchNorm1d(4), oo.Tanh(), oo.Linear(4, 2)).double()
    flat = {**tree.flatten_dict(state.params), **tree.flatten_dict(state.buffers)}
    net.load_state_dict({path: leaf.clone() for path, leaf in flat.items()})
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    averages = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
    for x, y in zip(X, Y, strict=True):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        averages.update_parameters(net)
    return net, averages.module


def agree(state, module):
    theirs = {path: leaf.detach() for path, leaf in module.state_dict().items()}
    ours = {**tree.flatten_dict(state.params), **tree.flatten_dict(state.buffers)}
    for path, leaf in ours.items():
        if leaf.is_floating_point():  # torch truncates the averages of integers
            close(leaf, theirs[path])


@pytest.mark.parametrize("decay", [0.9, 0.5])
@pytest.mark.parametrize("buffers", [False, True])
def test_equals_the_averaged_model_of_torch(decay, buffers):
    opt = ema(decay, buffers=buffers)
    state = train(opt)
    net, average = train_torch(decay, buffers, start(opt))
    agree(state, net)
    found = fdl.averaged(state)
    agree(found, average)
    assert tree.diff(found, state, values=False) == []
    assert (found.params["0"]["weight"] - state.params["0"]["weight"]).abs().max() > 1e-3
    moved = (found.buffers["1"]["running_var"] - state.buffers["1"]["running_var"]).abs().max()
    assert (moved > 1e-3) == buffers
    assert found.buffers["1"]["num_batches_tracked"] == 20
    average.eval()
    scores = fdl.eval_step(LOSS)(found, (X[0], Y[0]))
    close(scores["loss"].value, torch.nn.functional.mse_loss(average(X[0]), Y[0]).detach())


def test_a_decay_that_changes():
    """Against a loop over the states of a run without averages."""
    opt = ema(lambda count: 1 - 1 / (count + 2))
    plain, state = optim.sgd(0.1, 0.9), None
    found, state = train(opt), start(plain)
    for i in range(20):
        state, _ = fdl.train_step(LOSS, plain)(state, (X[i], Y[i]))
        kept = 0.0 if i == 0 else 1 - 1 / (i + 2)
        new = (state.params, tree.cast(state.buffers, torch.float64))
        old = new if i == 0 else (params, stats)  # noqa: F821
        params, stats = tree.map(
            lambda a, w, kept=kept: kept * a + (1 - kept) * w if w.is_floating_point() else w,
            old,
            new,
        )
    close(fdl.averaged(found).params, params)
    close(fdl.averaged(found).buffers, stats)


SKIPPING = {
    "accumulate": lambda opt: optim.accumulate(opt, 2),
    "apply_if_finite": optim.apply_if_finite,
    "loss_scale": lambda opt: optim.loss_scale(opt, init=2.0),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_an_update_that_is_skipped_does_not_move_the_averages(name):
    opt = SKIPPING[name](ema())
    step, state = fdl.train_step(LOSS, opt), start(opt)
    for i in range(4):
        skipped = i == 2  # the first half of an accumulated update, or NaN
        x = X[i] if name == "accumulate" or not skipped else X[i] * torch.nan
        new, _ = step(state._replace(buffers=start(opt).buffers) if i == 3 else state, (x, Y[i]))
        before, after = (fdl.averaged(s) for s in (state, new))
        assert (tree.diff(before.buffers, after.buffers) == []) == (
            skipped or (name == "accumulate" and i == 0)
        ), i
        state = new


def test_a_population_has_the_averages_of_its_members():
    opt = ema()
    members = [start(opt, seed) for seed in range(2)]
    run = lambda state: train(opt, 5, state)  # noqa: E731
    found = vmap(fdl.averaged)(vmap(run)(tree.stack(members)))
    close(found, tree.stack([fdl.averaged(run(member)) for member in members]))


@pytest.mark.slow
def test_compiled():
    opt = ema()
    run = lambda state: fdl.averaged(train(opt, 5, state))  # noqa: E731
    close(fdl.jit(run, strict=True)(start(opt)), run(start(opt)))


def test_microbatches():
    """The averages are those of the averaged statistics."""
    opt = ema()
    step = parallel.train_step(LOSS, opt, None, microbatches=2)
    state, expected = start(opt), None
    for i in range(5):
        state, _ = step(state, (X[i], Y[i]))
        new = tree.cast(state.buffers, torch.float64)
        expected = new if i == 0 else tree.map(mix, expected, new)
    close(fdl.averaged(state).buffers, expected)


def mix(a, w):
    return 0.9 * a + 0.1 * w if w.is_floating_point() else w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_averaged_in_32(dtype):
    opt = ema(0.999)
    state = start(opt, dtype=dtype)
    state, _ = fdl.train_step(LOSS, opt)(state, (X[0].to(dtype), Y[0].to(dtype)))
    node = state.opt_state[-1]
    assert {leaf.dtype for leaf in tree.leaves((node.own.slots, node.buffers))} == {
        torch.float32,
        torch.int64,
    }
    found = fdl.averaged(state)
    assert tree.diff(found, state, values=False) == []


def test_in_files_new_and_old(tmp_path):
    opt = ema()
    state = train(opt, 5)
    io.save(tmp_path / "state", state)
    again = io.load(tmp_path / "state", like=start(opt))
    assert tree.diff(train(opt, 5, again), train(opt, 5, state)) == []
    without = train(ema(buffers=False), 5)
    assert type(without.opt_state[-1]) is optim.State  # as in files of before
    assert tree.diff(fdl.averaged(without).params, fdl.averaged(state).params) == []


def test_a_part_of_the_parameters():
    opt = optim.chain(optim.sgd(0.1), optim.masked(optim.params_ema(0.9, buffers=True), "0.*"))
    state = train(opt, 5)
    found = fdl.averaged(state)
    assert tree.diff(found.params["3"], state.params["3"]) == []
    assert tree.diff(found.params["0"], state.params["0"]) != []
    assert tree.diff(found.buffers, state.buffers) != []


def test_a_model_without_buffers():
    model = nn.linear(3, 2)
    opt = ema()
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    state, _ = step(state, (X[0].float(), Y[0].float()))
    assert tree.diff(fdl.averaged(state).params, state.params) == []
    assert fdl.averaged(state).buffers == {}


# ------------------------------------------------------------------------------ errors


def test_errors():
    opt = ema()
    with pytest.raises(TypeError, match="averaged: state must be a TrainState"):
        fdl.averaged({"w": X})
    with pytest.raises(ValueError, match=r"averaged: the optimizer keeps no average .*params_ema"):
        fdl.averaged(start(optim.adam()))
    rule = lambda g, p, t, ema, beta1: (g, {"ema": g})  # noqa: E731
    of_gradients = optim.leafwise("own", rule, {"beta1": 0.9}, {"ema": torch.zeros_like})
    with pytest.raises(ValueError, match="averaged: the optimizer keeps no average"):
        fdl.averaged(start(of_gradients))
    state = start(opt)
    other = {**state.params, "3": {"weight": torch.zeros(1, 1)}}
    with pytest.raises(ValueError, match=r"other leaves:\n  3.weight: .*\n  3.bias: .*nothing"):
        fdl.averaged(state._replace(params=other))
    by_hand = state._replace(opt_state=opt.init(state.params))
    for call in (fdl.averaged, lambda state: fdl.train_step(LOSS, opt)(state, (X[0], Y[0]))):
        with pytest.raises(ValueError, match=r"averages of buffers, made by TrainState.create"):
            call(by_hand)
