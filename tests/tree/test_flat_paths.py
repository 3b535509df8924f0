"""Keys that are paths, as in `dict(module.named_parameters())`: trees like any other."""

import re

import pytest
import torch
from torch.func import functional_call

import fdl
from fdl import interop, io, losses, nn, optim, population, random, tree
from fdl.checkpointing import Checkpointer
from tests.support.asserts import close
from tests.support.every_optimizer import EVERY, moved

NESTED = {"0": {"w": torch.ones(2, 3), "b": torch.arange(2.0)}, "2": [torch.ones(3)]}
FLAT = tree.flatten_dict(NESTED)
TWICE = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}


def test_paths_are_the_keys():
    assert list(FLAT) == ["0.w", "0.b", "2.0"] and tree.flatten_dict(FLAT) == FLAT
    assert "body.0.w" in tree.flatten_dict({"body": FLAT})
    assert tree.unflatten_dict(tree.flatten_dict(NESTED), like=FLAT) == FLAT
    assert "0.w    [2, 3]" in tree.summary(FLAT)


def test_globs_and_parts():
    yes, no = tree.partition(FLAT, "*.w")
    assert list(yes) == ["0.w"] and list(no) == ["0.b", "2.0"]
    assert tree.diff(tree.merge(no, yes), FLAT) == []
    assert list(tree.map(torch.add, FLAT, dict(reversed(FLAT.items())))) == list(FLAT)


def test_flat_and_nested_trees_differ():
    assert tree.diff(NESTED, FLAT) == [
        "0: expected dict, got keys that begin with '0.'",
        "2: expected list, got keys that begin with '2.'",
    ]
    assert tree.diff(FLAT, NESTED)[0] == "0: expected keys that begin with '0.', got dict"
    with pytest.raises(ValueError, match="keys with dots stand for nested ones"):
        tree.map(torch.add, NESTED, FLAT)


@pytest.mark.parametrize(
    "f",
    [
        tree.flatten_dict,
        tree.summary,
        lambda t: tree.partition(t, "a.*"),
        lambda t: tree.flatten_dict({"deep": [t]}),
        optim.masked(optim.sgd(0.1), "a.b").init,
    ],
)
def test_two_leaves_with_one_path_raise_where_paths_are_needed(f):
    with pytest.raises(ValueError, match=r"two leaves have the path '(deep.0.)?a.b'"):
        f(TWICE)
    assert len(tree.leaves(tree.map(torch.clone, TWICE))) == 2  # elsewhere they do not matter


GLOBS = {"freeze", "masked", "multi_transform", "muon", "scale_by_muon"}  # of other paths


@pytest.mark.parametrize("name", sorted(EVERY.keys() - GLOBS))
def test_every_optimizer_moves_flat_as_nested(name):
    nested = {"a": {"w": torch.arange(6.0).reshape(2, 3)}, "c": {"b": torch.ones(2)}}
    one, two = (moved(EVERY[name], start) for start in (nested, tree.flatten_dict(nested)))
    assert tree.diff(tree.flatten_dict(one), two) == [] and list(two) == ["a.w", "c.b"]


def test_train_step_with_functional_call():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    model = nn.Model(
        lambda key: {path: p.detach().clone() for path, p in module.named_parameters()},
        lambda params, x, *, train=False, key=None: functional_call(module, params, (x,)),
    )
    opt = optim.adamw(0.1, mask="*.weight")
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    theirs = torch.optim.AdamW(
        [
            {"params": [module[0].weight, module[2].weight]},
            {"params": [module[0].bias, module[2].bias], "weight_decay": 0.0},
        ],
        lr=0.1,
        weight_decay=0.01,
    )
    for _ in range(3):
        state, _ = step(state, (x, y))
    for _ in range(3):
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        theirs.step()
    close(state.params, {path: p.detach() for path, p in module.named_parameters()}, 1e-5, 1e-6)
    members = tree.stack([state, state])
    assert tree.diff(population.member(members, 1), state) == []
    again, _, _ = interop.from_module(module)
    close(again.apply(state.params, x), module(x).detach(), 1e-5, 1e-6)
    assert (
        tree.diff(dict(interop.to_module(state.params, module).named_parameters()), state.params)
        == []
    )


def test_jit_takes_named_parameters_as_they_are(plain_backend):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    f = fdl.jit(lambda p, x: functional_call(module, p, (x,)) + p["0.weight"].sum())
    params, x = dict(module.named_parameters()), torch.ones(4, 2)
    close(f(params, x), module(x) + module[0].weight.sum(), 1e-6)
    assert not f.report()[0].fallbacks


def test_models_say_how_to_nest():
    model = nn.sequential(nn.linear(3, 2))
    flat = tree.flatten_dict(model.init(random.key(0)))
    with pytest.raises(ValueError, match=r"\['0.weight', '0.bias'\].*; tree.unflatten_dict nests"):
        model.apply(flat, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"0: expected dict, got keys that begin with '0\.'"):
        fdl.TrainState.create(model, optim.sgd(0.1), key=random.key(0), params=flat)


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "t",
    [
        FLAT,
        {"body": FLAT, "body.0": {"v": torch.ones(1)}},
        {"a": torch.ones(1), "a.b": torch.zeros(1), "n.m": None, "e.f": {}},
        [{"x.y": 1.5}, {"x": {"y": 2}}],
        {".".join(["deep"] * 120): torch.ones(1)},
    ],
    ids=["flat", "both", "leaf-and-branch", "list", "long"],
)
def test_files_give_back_what_was_saved(tmp_path, t):
    io.save(tmp_path / "it", t)
    for loaded in (io.load(tmp_path / "it"), io.load(tmp_path / "it", like=t)):
        assert tree.diff(t, loaded) == [] and list(loaded) == list(t)
        assert tree.flatten_dict(loaded).keys() == tree.flatten_dict(t).keys()
    info = io.inspect(tmp_path / "it")
    assert list(info.leaves) == list(tree.flatten_dict(t))


def test_files_of_flat_and_nested_trees_have_the_same_names(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    io.save(tmp_path / "flat", FLAT)
    io.save(tmp_path / "nested", NESTED)
    names = [set(safetensors.load_file(tmp_path / name)) for name in ("flat", "nested")]
    assert names[0] == names[1] == FLAT.keys()
    for name in ("flat", "nested"):  # so `like` decides
        for like in (FLAT, NESTED):
            assert tree.diff(like, io.load(tmp_path / name, like=like)) == []
    assert tree.diff(io.inspect(tmp_path / "flat").read("0.b"), FLAT["0.b"]) == []
    io.save_torch(tmp_path / "it.pt", FLAT)
    assert torch.load(tmp_path / "it.pt").keys() == FLAT.keys()


@pytest.mark.parametrize(
    "t",
    [TWICE, {"a.b": {}, "a": {"b": {}}}, {"a.b": 1, "a": {"b": {"c": 2}}}, {"0.1": 1, "0": [2, 3]}],
    ids=["leaves", "empty", "leaf-and-branch", "list"],
)
def test_files_refuse_two_places_with_one_path(tmp_path, t):
    with pytest.raises(ValueError, match=r"^save: two places have the path '(a.b|0.1)'"):
        io.save(tmp_path / "it", t)
    assert not (tmp_path / "it").exists()


def test_checkpoints_of_flat_parameters(tmp_path):
    state = fdl.TrainState(FLAT, {}, optim.adam(0.1).init(FLAT), random.key(0), torch.tensor(3))
    with Checkpointer(tmp_path) as it:
        it.save(state)
        it.wait()
        assert tree.diff(it.restore().state, state) == []


def test_mistakes_in_keys_are_named():
    for key in (".a", "a.", "a..b"):
        with pytest.raises(ValueError, match=re.escape(f"after each dot, got {key!r}")):
            tree.flatten_dict({key: 1})
