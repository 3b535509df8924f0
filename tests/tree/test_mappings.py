"""Mappings that torch's pytree knows are branches everywhere: OrderedDict, and one as strict as a
TensorDict."""

from collections import OrderedDict
from types import MappingProxyType

import pytest
import torch
from torch.func import grad, vmap

import fdl
from fdl import interop, io, losses, nn, optim, population, random, transforms, tree
from fdl._dtensor import map_in_order
from fdl.tree._paths import as_dicts, in_order
from tests.support.asserts import close
from tests.support.branches import Branch
from tests.support.every_optimizer import EVERY, moved


def ordered(t):
    """Convert dicts to OrderedDicts."""
    return OrderedDict((k, ordered(x)) for k, x in t.items()) if isinstance(t, dict) else t


KINDS = {"Branch": Branch, "OrderedDict": ordered}
DICTS = {"fc": {"w": torch.ones(2, 3), "b": torch.arange(2.0)}, "act": {"slope": torch.ones(1)}}
MODEL = nn.sequential(nn.linear(3, 4), nn.tanh, nn.batch_norm(4), nn.linear(4, 2))


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def test_paths_maps_and_comparisons(kind):
    t = kind(DICTS)
    assert list(tree.flatten_dict(t)) == list(tree.flatten_dict(DICTS))
    doubled = tree.map(torch.add, t, DICTS)
    assert type(doubled) is type(doubled["fc"]) is type(t) and doubled["fc"]["b"].tolist() == [0, 2]
    assert type(tree.map(torch.add, DICTS, t)) is dict
    reordered = kind({"act": DICTS["act"], "fc": dict(reversed(DICTS["fc"].items()))})
    assert tree.diff(tree.map(torch.add, t, reordered), doubled) == []
    assert tree.diff(t, DICTS) == tree.diff(DICTS, t) == []
    assert tree.diff(t, kind({"fc": DICTS["fc"]})) == [
        "act.slope: expected float32[1], got nothing"
    ]
    assert type(tree.unflatten_dict(tree.flatten_dict(t), like=t)) is type(t)
    with pytest.raises(ValueError, match=r"act\.slope: missing"):
        tree.map(torch.add, t, {"fc": DICTS["fc"]})
    assert tree.size(t) == 9 and "fc.w" in tree.summary(t)


def test_parts_are_dicts(kind):
    t = kind(DICTS)
    yes, no = tree.partition(t, "fc.*")
    assert yes == {"fc": DICTS["fc"], "act": {}} and type(yes["fc"]) is dict
    assert tree.diff(tree.merge(yes, no), t) == []
    both = tree.merge(t, kind({"more": torch.ones(1)}))
    assert type(both) is dict and tree.diff(both, DICTS | {"more": torch.ones(1)}) == []


def test_stack_and_population_functions(kind):
    t = kind(DICTS)
    members = tree.stack([t, tree.map(lambda x: x + 1, t)])
    assert type(members) is type(t) and population.size(members) == 2
    assert tree.diff(population.member(members, 0), t) == []
    assert (
        tree.diff(population.best(members, torch.tensor([1.0, 0.5])), tree.unstack(members)[1])
        == []
    )


def test_order_of_processes(kind):
    seen = []
    result = map_in_order(
        lambda x: seen.append(len(x)) or x, kind({"b": torch.ones(1), "a": torch.ones(2)})
    )
    assert seen == [2, 1] and type(result) is type(kind({})) and list(result.keys()) == ["b", "a"]
    assert list(in_order(kind(DICTS)).keys()) == ["act", "fc"]


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_moves_a_mapping_as_a_dict(name):
    params = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    result = moved(EVERY[name], Branch(params))
    assert type(result) is Branch and tree.diff(moved(EVERY[name], params), result) == []


def test_models_train(kind):
    x, y = random.normal(random.key(1), (8, 3)), torch.arange(8) % 2
    params, buffers = MODEL.init(random.key(0))
    close(MODEL.apply(kind(params), kind(buffers), x)[0], MODEL.apply(params, buffers, x)[0])
    opt = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1, mask="*.weight"))
    step = fdl.train_step(fdl.supervised(MODEL, losses.cross_entropy), opt)
    ours, theirs = (
        fdl.TrainState.create(MODEL, opt, key=random.key(0), params=p)
        for p in (kind(params), params)
    )
    members = tree.stack([ours, ours])
    for _ in range(2):
        (ours, _), (theirs, _) = step(ours, (x, y)), step(theirs, (x, y))
        members, _ = vmap(step, (0, None))(members, (x, y))
    assert type(ours.params) is type(ours.params["0"]) is type(kind({}))
    assert tree.diff(theirs, ours) == []
    assert tree.diff(population.member(members, 1), ours, rtol=1e-4, atol=1e-5) == []


def test_a_jitted_step_takes_and_returns_mappings(plain_backend):
    opt, layer = optim.sgd(0.1), nn.linear(2, 1)
    step = fdl.train_step(fdl.supervised(layer, losses.mse), opt)
    params = layer.init(random.key(0))
    state = fdl.TrainState.create(layer, opt, key=random.key(0), params=Branch(params))
    batch = torch.ones(3, 2), torch.zeros(3, 1)
    run = fdl.jit(step)
    new, _ = run(run(state, batch)[0], batch)
    assert type(new.params) is Branch and len(run.report()) == 1
    assert tree.diff(step(step(state, batch)[0], batch)[0], new, rtol=1e-6, atol=1e-6) == []


def test_tied_parameters_and_second_derivatives(kind):
    shared = nn.linear(3, 3)
    model = nn.tied(nn.sequential(shared, nn.tanh, shared), {"2": "0"})
    params, x = model.init(random.key(0)), torch.ones(2, 3)
    loss = lambda p: model.apply(p, x).square().sum()  # noqa: E731
    assert tree.diff(grad(loss)(params), grad(loss)(kind(params))) == []
    hvp = transforms.hvp(loss, kind(params), kind(params))
    assert tree.diff(hvp, transforms.hvp(loss, params, params)) == []
    with pytest.raises(KeyError, match="'9' is not a path of the parameters"):
        nn.tied(model, {"1": "9"}).apply(kind(params), x)
    module = interop.as_module(model, kind(params))
    close(module(x), model.apply(params, x))


def test_entries_that_are_no_layer_are_named(kind):
    with pytest.raises(ValueError, match=r"params has entries \['fc', 'act'\], but the layers are"):
        nn.sequential(nn.linear(3, 2)).apply(kind(DICTS), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"linear\(3, 2\): expected params\['weight'\]"):
        nn.linear(3, 2).apply(kind({}), torch.ones(1, 3))


def test_scans_carry_mappings(kind):
    last, _ = fdl.scan(
        lambda c, x: (tree.map(lambda leaf: leaf + x, c), ()), kind(DICTS), torch.ones(3)
    )
    assert type(last) is type(kind({})) and last["fc"]["b"].tolist() == [3, 4]


def test_arrays_of_others_are_in_dicts():
    arrays = interop.to_numpy(Branch(DICTS))
    assert type(arrays) is dict and arrays["fc"]["w"].shape == (2, 3)


# ------------------------------------------------------------------------------ files


def test_files_hold_mappings(tmp_path):
    t = {"one": Branch(DICTS), "two": [OrderedDict(a=1.5)]}
    io.save(tmp_path / "it", t)
    loaded = io.load(tmp_path / "it", like=t)
    assert tree.diff(loaded, t) == [] and type(loaded["one"]["fc"]) is Branch
    assert type(loaded["two"][0]) is OrderedDict
    assert tree.diff(io.load(tmp_path / "it", like=as_dicts(t)), as_dicts(t)) == []
    io.save(tmp_path / "dicts", as_dicts(t))
    assert type(io.load(tmp_path / "dicts", like=t)["one"]) is Branch
    assert list(io.inspect(tmp_path / "it").leaves) == list(tree.flatten_dict(t))
    assert io.inspect(tmp_path / "it").read("one.fc.b").tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"'one' is a mapping 'tests.*Branch'.*pass like=.*dict"):
        io.load(tmp_path / "it")
    wrong = {"one": Branch({"fc": DICTS["fc"]}), "two": t["two"]}
    with pytest.raises(
        ValueError, match=r"one.act: expected nothing|one.act.slope: expected nothing"
    ):
        io.load(tmp_path / "it", like=wrong)
    params, lines = io.load_matching(tmp_path / "it", wrong)
    assert type(params["one"]) is Branch and len(lines) == 1


def test_other_mappings_are_refused_or_leaves(tmp_path):
    with pytest.raises(TypeError, match="got mappingproxy at 'a'; make it a dict"):
        io.save(tmp_path / "it", {"a": MappingProxyType({"b": torch.ones(1)})})
    with pytest.raises(
        TypeError, match=r"export: the arguments: .* got tests.*Branch at 't'; make it"
    ):
        fdl.export(lambda t: t["w"], (Branch({"w": torch.ones(1)}),), tmp_path / "it.pt2")
    assert not list(tmp_path.iterdir())
