"""Batch statistics recomputed, against `torch.optim.swa_utils.update_bn`."""

import pytest
import torch
from torch import nn as oo
from torch.func import vmap

import fdl
from fdl import data, interop, nn, random, tree, update_bn
from tests.support.asserts import close, draw

KEY = random.key(4)
X, Y = draw(0, 50, 3) * 3 + 1, torch.zeros(50)
DATA = (X, Y)


def pair(momentum):
    """A model of ours and torch's with the same parameters, and statistics of something else."""
    options = {"momentum": momentum}
    model = nn.sequential(
        *(nn.linear(3, 4), nn.batch_norm(4, **options), nn.tanh, nn.batch_norm(4, **options))
    )
    twin = oo.Sequential(
        *(oo.Linear(3, 4), oo.BatchNorm1d(4, **options), oo.Tanh(), oo.BatchNorm1d(4, **options))
    ).double()
    params, buffers = tree.cast(model.init(KEY), torch.float64)
    _, buffers = model.apply(params, buffers, X * 100, train=True)
    both = {**tree.flatten_dict(params), **tree.flatten_dict(buffers)}
    twin.load_state_dict({name: leaf.clone() for name, leaf in both.items()})
    return model, params, buffers, twin


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize(("n", "left_out"), [(48, 0), (50, 0), (49, 1)])
def test_equals_torch_whatever_the_momentum(n, left_out, momentum, plain_backend):
    model, params, buffers, twin = pair(momentum)
    rows = data.sequential_indices(n, 16)
    batches = X[:n].split(16)
    # One value per feature has no variance: torch refuses such a batch, and here it does not count.
    torch.optim.swa_utils.update_bn(batches[: len(batches) - left_out], twin)
    expected = dict(twin.named_buffers())

    def recompute(params, rows):
        return update_bn(model, params, buffers, DATA, rows)

    for found in (recompute(params, rows), fdl.jit(recompute)(params, rows)):
        close(tree.flatten_dict(found), expected)
    both = vmap(recompute, (0, None))(tree.map(lambda p: torch.stack([p, p.exp()]), params), rows)
    close(tree.flatten_dict(tree.map(lambda leaf: leaf[0], both)), expected)
    assert not torch.equal(both["3"]["running_mean"][0], both["3"]["running_mean"][1])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_of_a_module_taken_over(momentum):
    _, _, _, twin = pair(momentum)
    model, params, buffers = interop.from_module(twin)
    rows = data.epoch_indices(KEY, 50, 16, drop_last=True)
    found = update_bn(model, params, tree.map(torch.clone, buffers), DATA, rows)
    torch.optim.swa_utils.update_bn([batch.x for batch in data.batches(DATA, rows)], twin)
    close(tree.flatten_dict(found), dict(twin.named_buffers()))


def test_dropout_follows_the_key_and_other_buffers_stay():
    norm = nn.batch_norm(3)

    def init(key):
        params, buffers = norm.init(key)
        return params, {"norm": buffers, "calls": torch.tensor(7)}

    def apply(params, buffers, x, *, train=False, key=None, mask=None):
        x = nn.dropout(0.5).apply({}, x, train=train, key=key)
        y, new = norm.apply(params, buffers["norm"], x, train=train, mask=mask)
        return y, {"norm": new, "calls": buffers["calls"] + 1}

    model = nn.StatefulModel(init, apply, takes_mask=True)
    params, buffers = tree.cast(init(KEY), torch.float64)
    rows = data.sequential_indices(50, 25)
    found = update_bn(model, params, buffers, DATA, rows, KEY)
    halves = [
        nn.dropout(0.5).apply({}, half, train=True, key=random.fold_in(KEY, i))
        for i, half in enumerate(X.split(25))
    ]
    close(found["norm"]["running_mean"], (halves[0].mean(0) + halves[1].mean(0)) / 2)
    close(found["norm"]["running_var"], (halves[0].var(0) + halves[1].var(0)) / 2)
    assert found["calls"] == 7 and buffers["norm"]["num_batches_tracked"] == 0
    with pytest.raises(ValueError, match="needs a key"):
        update_bn(model, params, buffers, DATA, rows)


def test_nothing_to_go_by_leaves_the_statistics():
    model, params, buffers, _ = pair(0.1)
    rows = data.Indices(torch.zeros(2, 4).long(), torch.zeros(2, 4).bool())
    found = update_bn(model, params, buffers, DATA, rows)
    close(found, buffers, rtol=0, atol=0)


def test_errors():
    model, params, _, _ = pair(0.1)
    with pytest.raises(ValueError, match=r"no running statistics, only \['calls'\]"):
        update_bn(model, params, {"calls": torch.zeros(())}, DATA, torch.zeros(1, 4).long())
    padded, norm = data.sequential_indices(50, 20), nn.batch_norm(3)
    assert not padded.mask.all()
    refuses = nn.StatefulModel(norm.init, lambda *args, **options: norm.apply(*args, **options))
    with pytest.raises(ValueError, match=r"update_bn: the batch has a mask, .* takes none"):
        update_bn(refuses, *norm.init(KEY), (X.float(), X), padded)
    for wrong, text in (
        (
            model.apply,
            "model must be a Model or a StatefulModel, got the function .* not its apply",
        ),
        (nn.linear(3, 3), "must be a StatefulModel, got a Model, without buffers"),
    ):
        with pytest.raises(TypeError, match=f"update_bn: .*{text}"):
            update_bn(wrong, params, {}, DATA, torch.zeros(1, 4).long())
