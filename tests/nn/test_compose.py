"""Composing: sequential, plain functions, models by hand, tied parameters; keys and errors."""

from collections import OrderedDict

import pytest
import torch
from torch import nn as oo

from fdl import nn, random, tree
from tests.support.asserts import close, draw, unchanged

KEY = random.key(3)


def double(model):
    return tree.cast(model.init(KEY), torch.float64)


def load(module, params):
    """Copy parameters into a module, strictly by name."""
    module.double().load_state_dict(tree.flatten_dict(params), strict=False)
    assert [name for name, _ in module.named_parameters()] == list(tree.flatten_dict(params))
    return module


def gradients(module, x):
    module(x).square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


# ------------------------------------------------------------------------------ sequential


@pytest.mark.curriculum("L2")
@pytest.mark.parametrize(
    ("net", "module"),
    [
        (
            nn.sequential(nn.linear(3, 4), nn.relu, nn.dropout(0.5), nn.linear(4, 2)),
            lambda: oo.Sequential(oo.Linear(3, 4), oo.ReLU(), oo.Identity(), oo.Linear(4, 2)),
        ),
        (
            nn.sequential(hidden=nn.linear(3, 4), act=nn.tanh, output=nn.linear(4, 2)),
            lambda: oo.Sequential(
                OrderedDict(hidden=oo.Linear(3, 4), act=oo.Tanh(), output=oo.Linear(4, 2))
            ),
        ),
        (
            nn.sequential(
                nn.sequential(nn.linear(3, 4), nn.sequential(nn.linear(4, 4), nn.relu)),
                nn.sequential(nn.relu),
                nn.linear(4, 2, bias=False),
            ),
            lambda: oo.Sequential(
                oo.Sequential(oo.Linear(3, 4), oo.Sequential(oo.Linear(4, 4), oo.ReLU())),
                oo.Sequential(oo.ReLU()),
                oo.Linear(4, 2, bias=False),
            ),
        ),
    ],
    ids=["positional", "named", "nested"],
)
def test_sequential_equals_the_module(net, module):
    params, x = double(net), draw(0, 5, 3)
    twin = load(module(), params)
    with unchanged(params, x):
        close(net.apply(params, x), twin(x).detach())
        grads = torch.func.grad(lambda p: net.apply(p, x).square().sum())(params)
    close(tree.flatten_dict(grads), gradients(twin, x))


def test_every_element_counts_but_only_parameters_leave_an_entry():
    net = nn.sequential(nn.relu, nn.linear(2, 3), nn.dropout(0.1), nn.sequential(nn.tanh))
    assert list(net.init(KEY)) == ["1"]
    assert nn.sequential(nn.relu).init(KEY) == {}


def test_an_empty_sequential_is_the_identity():
    x = draw(0, 2)
    assert nn.sequential().init(KEY) == {}
    assert nn.sequential().apply({}, x, train=True, key=KEY) is x


def test_child_i_gets_the_key_folded_with_i():
    layers = [nn.linear(3, 3), nn.relu, nn.dropout(0.5), nn.linear(3, 3), nn.dropout(0.5)]
    keys = [random.fold_in(KEY, i) for i in range(5)]
    net, named = nn.sequential(*layers), nn.sequential(**dict(zip("abcde", layers, strict=True)))
    params, x = net.init(KEY), torch.ones(4, 3)
    assert tree.diff(params["0"], layers[0].init(keys[0])) == []
    assert tree.diff(params["3"], layers[3].init(keys[3])) == []
    assert tree.diff(list(params.values()), list(named.init(KEY).values())) == []

    y = layers[0].apply(params["0"], x).relu()
    y = layers[2].apply({}, y, train=True, key=keys[2])
    y = layers[3].apply(params["3"], y)
    y = layers[4].apply({}, y, train=True, key=keys[4])
    close(net.apply(params, x, train=True, key=KEY), y, rtol=0, atol=0)
    assert not torch.equal(y, net.apply(params, x))


def test_nested_sequentials_split_their_own_key():
    net = nn.sequential(nn.relu, nn.sequential(nn.relu, nn.dropout(0.5)))
    x, key = torch.ones(50), random.fold_in(random.fold_in(KEY, 1), 1)
    y = net.apply({}, x, train=True, key=KEY)
    assert torch.equal(y, nn.dropout(0.5).apply({}, x, train=True, key=key))


@pytest.mark.curriculum("B5")
def test_a_plain_function_is_a_layer():
    centre = nn.sequential(nn.linear(3, 8), lambda x: x - x.mean())
    y = centre.apply(double(centre), draw(0, 5, 3))
    assert y.abs().max() > 0.1
    close(y.mean(), torch.tensor(0.0).double(), atol=1e-15)


@pytest.mark.curriculum("B5")
def test_parameters_may_be_a_list():
    shapes = [(4, 4), (4, 4), (4, 4), (4, 1)]

    def init(key):
        keys = random.split(key, len(shapes))
        return [random.normal(keys[i], shape, torch.float64) for i, shape in enumerate(shapes)]

    def apply(params, x, *, train=False, key=None):
        for w in params:
            x = x @ w
        return x

    net = nn.sequential(nn.Model(init, apply), torch.abs)
    params, x = net.init(KEY), draw(0, 2, 4)
    assert list(tree.flatten_dict(params)) == ["0.0", "0.1", "0.2", "0.3"]
    a, b, c, d = params["0"]
    close(net.apply(params, x), (x @ a @ b @ c @ d).abs())
    grads = torch.func.grad(lambda p: (net.apply(p, x) ** 2).sum())(params)
    close(grads["0"][3], 2 * (x @ a @ b @ c).T @ (x @ a @ b @ c @ d))


def test_errors_name_the_path_of_the_layer():
    net = nn.sequential(body=nn.sequential(nn.relu, nn.linear(3, 4)), head=nn.linear(4, 1))
    params = net.init(KEY)
    with pytest.raises(ValueError, match=r"expected x \[..., 3\], got \[2, 5\]") as error:
        net.apply(params, torch.ones(2, 5))
    assert error.value.__notes__ == ["in layer '1' of sequential", "in layer 'body' of sequential"]

    wrong = tree.merge({"body": params["body"]}, {"head": {"weight": torch.ones(1, 3)}})
    with pytest.raises(ValueError, match=r"shape \[1, 4\], got \[1, 3\]") as error:
        net.apply(wrong, torch.ones(2, 3))
    assert error.value.__notes__ == ["in layer 'head' of sequential"]

    with pytest.raises(ValueError, match=r"entries \['haed'\], but the layers are \['body', 'head"):
        net.apply({**params, "haed": {}}, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected params\['weight'\] .*, got none"):
        net.apply({"body": params["body"]}, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.sequential(nn.relu, act=nn.relu), "by position or by name, not both"),
        (
            lambda: nn.sequential(nn.relu, 3),
            "layer '1' must be a Model or a function x -> y, got an int",
        ),
    ],
    ids=["both", "number"],
)
def test_sequential_refuses(make, text):
    with pytest.raises(TypeError, match=text):
        make()


# ------------------------------------------------------------------------------ tied


@pytest.mark.curriculum("B4")
def test_tied_gradient_is_that_of_a_module_used_twice():
    shared = nn.linear(4, 4)
    net = nn.tied(nn.sequential(shared, nn.relu, shared), {"2": "0"})
    layer = oo.Linear(4, 4)
    params, x = double(net), draw(0, 5, 4)
    twin = load(oo.Sequential(layer, oo.ReLU(), layer), params)
    with unchanged(params):
        grads = torch.func.grad(lambda p: net.apply(p, x).square().sum())(params)
        close(net.apply(params, x), twin(x).detach())
    close(tree.flatten_dict(grads), gradients(twin, x))


def test_one_leaf_may_be_tied():
    net = nn.tied(
        nn.sequential(encoder=nn.linear(4, 4), act=nn.tanh, decoder=nn.linear(4, 4)),
        {"decoder.weight": "encoder.weight"},
    )
    params, x = double(net), draw(0, 5, 4)
    assert list(tree.flatten_dict(params)) == ["encoder.weight", "encoder.bias", "decoder.bias"]
    twin = oo.Sequential()
    twin.encoder, twin.act, twin.decoder = oo.Linear(4, 4), oo.Tanh(), oo.Linear(4, 4)
    twin.decoder.weight = twin.encoder.weight
    load(twin, params)
    grads = torch.func.grad(lambda p: net.apply(p, x).square().sum())(params)
    close(tree.flatten_dict(grads), gradients(twin, x))


@pytest.mark.parametrize(
    "same", [{"1": "0", "2": "1"}, {"1": "0", "2": "0"}], ids=["chain", "both"]
)
def test_ties_may_use_ties(same):
    layer = nn.linear(2, 2)
    net = nn.tied(nn.sequential(layer, layer, layer), same)
    params, x = net.init(KEY), torch.ones(1, 2)
    assert list(params) == ["0"]
    y = x
    for _ in range(3):
        y = layer.apply(params["0"], y)
    assert torch.equal(net.apply(params, x), y)


def test_tied_passes_mode_and_key_on():
    net = nn.tied(nn.sequential(nn.linear(9, 9), nn.linear(9, 9), nn.dropout(0.5)), {"1": "0"})
    params, x = net.init(KEY), torch.ones(9)
    y = net.apply(params, x, train=True, key=KEY)
    kept = random.uniform(random.fold_in(KEY, 2), (9,)) >= 0.5
    close(y, torch.where(kept, net.apply(params, x) * 2, 0.0), rtol=0, atol=0)


@pytest.mark.parametrize("same", [{"2": "0"}, {"1": "3"}, {"1.wieght": "0.weight"}], ids=str)
def test_tied_paths_must_exist(same):
    net = nn.tied(nn.sequential(nn.linear(2, 2), nn.linear(2, 2)), same)
    with pytest.raises(
        KeyError, match=r"tied: '(2|3|1.wieght|wieght)' is not a path of the parameters \['0', '1'"
    ):
        net.init(KEY)


def test_a_layer_name_with_a_dot_raises():
    with pytest.raises(ValueError, match=r"must not contain a dot, got 'a\.b'; nest sequentials"):
        nn.sequential(**{"a.b": nn.linear(1, 1)})


def test_no_key_is_made_for_layers_that_draw_nothing(monkeypatch):
    """Twenty rounds of Threefry per sequential would cost an eager step of a small net a third."""
    quiet = nn.sequential(nn.linear(3, 3), nn.sequential(nn.relu, nn.dropout(0.0)))
    loud = nn.tied(nn.sequential(nn.linear(3, 3), nn.dropout(0.5)), {})
    params, x = quiet.init(KEY), torch.ones(2, 3)
    assert (quiet.uses_key, loud.uses_key) == (False, True)
    monkeypatch.setattr("fdl.random.fold_in", None)
    quiet.apply(params, x, train=True, key=KEY)
    with pytest.raises(TypeError):
        loud.apply(params, x, train=True, key=KEY)
