"""`nn.capture` against forward hooks on the torch twin: names and values."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch import nn as oo
from torch.func import grad, jvp, vmap

import fdl
from fdl import interop, nn, optim, random, tree
from tests.support.asserts import close, draw

X = draw(0, 4, 3)


class Add(oo.Module):
    """x plus the output of a layer, whose layers have the names of this module's own."""

    def __init__(self, **layers: oo.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.children():
            y = layer(y)
        return x + y


class Branches(oo.ModuleList):
    """The outputs of all layers, side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self], 1)


def network() -> nn.StatefulModel:
    block = nn.residual(nn.sequential(first=nn.linear(5, 5), act=nn.tanh, second=nn.linear(5, 5)))
    branches = nn.concat(nn.sequential(nn.linear(5, 2), nn.relu), nn.linear(5, 3))
    return nn.sequential(
        stem=nn.sequential(nn.linear(3, 5), nn.batch_norm(5), nn.relu),
        block=block,
        branches=branches,
        head=nn.linear(5, 2),
    )


def twin() -> oo.Module:
    layers = oo.Sequential()
    layers.add_module("stem", oo.Sequential(oo.Linear(3, 5), oo.BatchNorm1d(5), oo.ReLU()))
    layers.add_module("block", Add(first=oo.Linear(5, 5), act=oo.Tanh(), second=oo.Linear(5, 5)))
    left = oo.Sequential(oo.Linear(5, 2), oo.ReLU())
    layers.add_module("branches", Branches([left, oo.Linear(5, 3)]))
    layers.add_module("head", oo.Linear(5, 2))
    return layers.double()


def hooked(module: oo.Module, *inputs: Any) -> tuple[Any, dict[str, Any]]:
    """Call a module; return its output and what hooks saw, named as `capture` names it."""
    seen: dict[str, Any] = {}
    names = {part: name for name, part in module.named_modules()}

    def hook(part: oo.Module, inputs: Any, y: Any) -> None:
        name, number = names[part], 0
        while f"{name}_{number}" in seen or (not number and name in seen):
            number += 1
        first = y[0] if isinstance(y, tuple) else y
        seen[f"{name}_{number}" if number else name] = first.detach().clone()

    handles = [part.register_forward_hook(hook) for part in names]
    y = module(*inputs)
    for handle in handles:
        handle.remove()
    assert seen.keys() <= {*names.values(), *(name for name in seen if name[-2:-1] == "_")}
    return y, {name: value for name, value in seen.items() if name}


def flat(values: Any) -> dict[str, Tensor]:
    return {
        path.removesuffix(".__call__"): value for path, value in tree.flatten_dict(values).items()
    }


def setting() -> tuple[nn.StatefulModel, Any, Any, oo.Module]:
    model = network()
    params, buffers = tree.cast(model.init(random.key(1)), torch.float64)
    module = twin()
    module.load_state_dict(tree.flatten_dict(params) | tree.flatten_dict(buffers))
    return model, params, buffers, module


@pytest.mark.parametrize("train", [False, True])
def test_names_and_values_are_those_of_hooks(train) -> None:
    model, params, buffers, module = setting()
    expected, seen = hooked(module.train(train), X)
    (y, values), new = nn.capture(model).apply(params, buffers, X, train=train)
    close(y, expected.detach())
    close(flat(values), seen)
    assert seen.keys() == {name for name, _ in module.named_modules()} - {""}
    plain, plain_new = model.apply(params, buffers, X, train=train)
    close((y, new), (plain, plain_new), rtol=0, atol=0)


def test_names_of_transformer_layers_are_those_of_hooks() -> None:
    for norm_first in (False, True):
        options = {"dim_feedforward": 6, "norm_first": norm_first}
        layer = nn.transformer_encoder_layer(4, 2, **options)
        encoder = nn.sequential(layers=nn.sequential(layer, layer))
        params = tree.cast(encoder.init(random.key(0)), torch.float64)
        # In training mode, since torch evaluates by a kernel of its own, which calls no layer.
        theirs = oo.TransformerEncoderLayer(4, 2, dropout=0.0, batch_first=True, **options).double()
        module = oo.Sequential()
        module.add_module("layers", oo.Sequential(theirs, copy.deepcopy(theirs)))
        module.load_state_dict(tree.flatten_dict(params))
        x = draw(2, 2, 5, 4)
        y, seen = hooked(module, x)
        found, values = nn.capture(encoder).apply(params, x)
        close(found, y.detach())
        close(flat(values), seen)


class Reuses(oo.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = oo.Linear(3, 3), oo.ReLU(inplace=True)
        self.norm = oo.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.relu(self.fc(x))))


@pytest.mark.parametrize("train", [False, True])
def test_modules_that_came_in(train) -> None:
    resnet = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3
    )
    for module, x in ((resnet.double(), draw(1, 2, 3, 16, 16)), (Reuses().double(), X)):
        model, params, buffers = interop.from_module(module)
        y, seen = hooked(module.train(train), x)
        (found, values), _ = nn.capture(model).apply(params, buffers, x, train=train)
        close(found, y.detach())
        close(flat(values), seen)
        assert "relu_1" in seen or "layer2.0.relu_1" in seen
        assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.slow
def test_transformations_and_programs(plain_backend) -> None:
    model, params, buffers, _ = setting()
    captured = nn.capture(model)

    def hidden(params: Any, x: Tensor) -> Tensor:
        (_, values), _ = captured.apply(params, buffers, x, train=True)
        return values["block"]["__call__"].square().sum() + values["stem"]["0"].sum()

    def by_hand(params: Any, x: Tensor) -> Tensor:
        p, b = params["stem"], buffers["stem"]
        first = nn.linear(3, 5).apply(p["0"], x)
        y = nn.batch_norm(5).apply(p["1"], b["1"], first, train=True)[0].relu()
        inner = nn.linear(5, 5).apply(params["block"]["first"], y).tanh()
        return (y + nn.linear(5, 5).apply(params["block"]["second"], inner)).square().sum() + (
            first.sum()
        )

    close(grad(hidden, (0, 1))(params, X), grad(by_hand, (0, 1))(params, X))
    tangents = tree.map(torch.ones_like, params)
    close(
        jvp(lambda p: hidden(p, X), (params,), (tangents,)),
        jvp(lambda p: by_hand(p, X), (params,), (tangents,)),
    )
    xs = torch.stack([X, X + 1])
    one = lambda x: captured.apply(params, buffers, x)  # noqa: E731
    close(vmap(one)(xs), tree.stack([one(x) for x in xs]))
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    for run in (fdl.jit(one), compiled):
        close(run(X), one(X))
    close(fdl.jit(grad(hidden))(params, X), grad(hidden)(params, X))
    _, each = fdl.jit(lambda xs: fdl.scan(lambda c, x: (c, one(x)), (), xs))(xs)
    close(each, vmap(one)(xs))


def test_wrappers_add_no_name() -> None:
    inner = nn.sequential(nn.linear(3, 3), nn.relu, nn.linear(3, 3))
    names = ["0", "1", "2"]
    policy = nn.Policy(torch.float64, torch.float32, torch.float64)
    for model in (
        inner,
        nn.residual(inner),
        nn.tied(inner, {"2": "0"}),
        nn.with_policy(inner, policy),
    ):
        params = model.init(random.key(0))
        x = X.to(tree.leaves(params)[0].dtype)
        y, values = nn.capture(model).apply(params, x)
        assert list(tree.flatten_dict(values)) == names
        outer = nn.sequential(a=model, b=nn.residual(nn.tanh))
        _, values = nn.capture(outer).apply({"a": params}, x)
        assert list(tree.flatten_dict(values)) == ["a.0", "a.1", "a.2", "a.__call__", "b"]
        close(values["a"]["__call__"], y, rtol=0, atol=0)
    assert nn.capture(nn.with_policy(inner, policy)).apply(params, X)[1]["0"].dtype == torch.float32
    stateful = nn.sequential(nn.linear(3, 3), nn.batch_norm(3))
    for model in (nn.residual(stateful), nn.with_policy(stateful)):
        (_, values), _ = nn.capture(model).apply(*model.init(random.key(0)), X.float())
        assert list(values) == ["0", "1"]


def test_a_captured_model_is_a_layer_and_trains_by_its_values() -> None:
    body = nn.sequential(nn.linear(3, 4), nn.tanh, nn.dropout(0.5), nn.linear(4, 2))
    model = nn.sequential(nn.capture(body), lambda pair: (pair[0], pair[1]["1"]))
    loss = fdl.supervised(model, lambda y, target: (y[0] ** 2).mean(1) + (y[1] ** 2).mean(1))
    state = fdl.TrainState.create(model, optim.sgd(0.1), key=random.key(0))
    new, _ = fdl.train_step(loss, optim.sgd(0.1))(state, (X.float(), X.float()))
    moved = tree.map(torch.sub, new.params, state.params)
    assert all(leaf.any() for leaf in tree.leaves(moved))
    key = random.key(3)  # the values are those of the same call, dropout included
    y, values = nn.capture(body).apply(state.params["0"], X.float(), train=True, key=key)
    assert torch.equal(values["3"], y)
    assert torch.equal(values["3"], nn.linear(4, 2).apply(state.params["0"]["3"], values["2"]))


def scored(
    params: Any, x: Tensor, *, train: bool = False, key: Any = None, record: Any = None
) -> Tensor:
    hidden = x * params["w"]
    if record is not None:
        record("hidden", hidden)
        record("more.squares", hidden**2)
    return hidden.sum()


def test_models_of_users_record_by_the_keyword() -> None:
    own = nn.Model(lambda key: {"w": torch.ones(3)}, scored)
    model = nn.sequential(act=nn.relu, own=own)
    params = model.init(random.key(0))
    _, values = nn.capture(model).apply(params, X)
    assert list(tree.flatten_dict(values)) == [
        "act",
        "own.hidden",
        "own.more.squares",
        "own.__call__",
    ]
    close(values["own"]["more"]["squares"], X.relu() ** 2)

    @functools.wraps(scored)
    def twice(params: Any, x: Tensor, **options: Any) -> Tensor:
        return own.apply(params, 2 * x, **options)

    _, values = nn.capture(nn.Model(own.init, twice)).apply(params["own"], X)
    close(values["hidden"], 2 * X)

    def again(params: Any, x: Tensor, *, record: Any = None, **options: Any) -> Tensor:
        return own.apply(params, x, record=record) + own.apply(params, x, record=record)

    with pytest.raises(ValueError, match="capture: 'hidden' is recorded twice; give each call"):
        nn.capture(nn.Model(own.init, again)).apply(params["own"], X)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (
            nn.linear(3, 2),
            ValueError,
            "inside: its apply takes no keyword record; make it",
        ),
        (nn.gru(3, 2), ValueError, "no names inside"),
        (nn.batch_norm(3), ValueError, "no names inside"),
        (torch.relu, TypeError, "capture: model must be a Model"),
        (oo.Linear(3, 2), TypeError, "torch module Linear; interop.from_module"),
    ],
)
def test_what_has_no_names_is_refused(model, kind, message) -> None:
    with pytest.raises(kind, match=f"capture: .*{message}" if kind is ValueError else message):
        nn.capture(model)


def test_what_recorded_nothing_is_refused() -> None:
    layer = nn.residual(nn.linear(3, 3))
    with pytest.raises(ValueError, match="capture: the model has no names inside: it recorded no"):
        nn.capture(layer).apply(layer.init(random.key(0)), X.float())
    model, params, _ = interop.from_module(oo.Sequential(oo.Linear(3, 2)))
    captured = torch.compile(nn.capture(model).apply, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"torch\.compile; use fdl\.jit"):
        captured(params, X.float())
