"""`interop.as_module`: a model in torch: optimizers, modes, copies, files, compilers, exporters.

The oracles are `model.apply`, fdl's own training, and torch modules of the same layers.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import fdl
import models
from fdl import interop, losses, nn, optim, random, tree
from tests.support.asserts import close, draw

X, Y = draw(0, 6, 3), random.randint(random.key(1), (6,), 0, 2)


def scale(size: int) -> nn.Model:
    """A layer of a user, made of local functions: one recursive, one with defaults."""

    def power(x: Tensor, n: int) -> Tensor:
        return x if n == 1 else x * power(x, n - 1)

    def apply(params: Any, x: Tensor, *, train: bool = False, key: Any = None) -> Tensor:
        return power(x * params["gain"], 2)

    return nn.Model(lambda key: {"gain": torch.ones(size)}, apply, uses_key=False)


def double(x: Tensor) -> Tensor:
    return 2 * x


def network(*, norm: bool = True, drop: float = 0.5) -> Any:
    layers = {"fc1": nn.linear(3, 4), "act": nn.tanh, "bn": nn.batch_norm(4)}
    if not norm:
        del layers["bn"]
    block = nn.residual(nn.sequential(nn.linear(4, 4), nn.relu, torch.tanh, F.softplus))
    rest = {"block": block, "drop": nn.dropout(drop), "own": scale(4), "last": nn.linear(4, 2)}
    return nn.sequential(
        **layers, **rest, double=double, soft=functools.partial(F.softplus, beta=2.0)
    )


def made(**options: Any) -> tuple[Any, Any, Any, torch.nn.Module]:
    model = network(**options)
    initial = tree.cast(model.init(random.key(2)), torch.float64)
    params, buffers = initial if isinstance(model, nn.StatefulModel) else (initial, None)
    return model, params, buffers, interop.as_module(model, params, buffers)


def test_state_dict_is_the_tree_and_a_copy() -> None:
    _, params, buffers, module = made()
    expected = tree.flatten_dict(params) | tree.flatten_dict(buffers)
    state = module.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name, _ in module.named_parameters()] == [*tree.flatten_dict(params)]
    for path, leaf in expected.items():
        assert torch.equal(state[path], leaf) and state[path].data_ptr() != leaf.data_ptr()
    assert all(p.requires_grad for p in module.parameters())
    back = tree.unflatten_dict(dict(module.named_parameters()), like=params)
    close(tree.map(Tensor.detach, back), params, rtol=0, atol=0)
    module.load_state_dict(
        tree.flatten_dict(tree.map(lambda leaf: leaf + 1, (params, buffers))[0]), strict=False
    )
    close(module.fc1.bias.detach(), params["fc1"]["bias"] + 1)


def test_modes_are_those_of_apply() -> None:
    model, params, buffers, module = made()
    key = random.key(3)
    for _ in range(2):
        y, buffers = model.apply(params, buffers, X, train=True, key=key)
        close(module(X, key=key).detach(), y)
        close(dict(module.named_buffers()), tree.flatten_dict(buffers))
    close(module.eval()(X).detach(), model.apply(params, buffers, X)[0])
    close(dict(module.named_buffers()), tree.flatten_dict(buffers))  # unchanged in evaluation
    mask = torch.arange(6) < 4
    y, buffers = model.apply(params, buffers, X, train=True, key=key, mask=mask)
    close(module.train()(X, key=key, mask=mask).detach(), y)
    close(dict(module.named_buffers()), tree.flatten_dict(buffers))


def test_a_model_that_draws_draws_as_dropout_does_in_torch() -> None:
    model, params, _, module = made(norm=False)
    torch.manual_seed(0)
    first, second = module(X), module(X)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(module(X), first)
    torch.manual_seed(0)
    key = torch.randint(2**32, (2,))
    close(model.apply(params, X, train=True, key=key), first.detach())
    before = torch.get_rng_state()
    module.eval()(X)
    interop.as_module(nn.linear(3, 2), nn.linear(3, 2).init(random.key(0)))(X.float())
    assert torch.equal(torch.get_rng_state(), before)  # what draws nothing takes no key


def test_training_by_torch_equals_training_by_fdl() -> None:
    model, params, buffers, module = made(drop=0.0)
    opt = optim.adam(0.01)
    state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
    state = state._replace(buffers=buffers)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    theirs = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(50):
        state, _ = step(state, (X, Y))
        theirs.zero_grad()
        F.cross_entropy(module(X), Y).backward()
        theirs.step()
    moved = tree.map(torch.sub, state.params, params)
    assert all(leaf.abs().max() > 1e-3 for leaf in tree.leaves(moved))
    expected = tree.flatten_dict(state.params) | tree.flatten_dict(state.buffers)
    close(dict(module.state_dict()), expected)


def test_a_derivative_has_the_old_value_of_a_buffer() -> None:
    model = nn.StatefulModel(
        lambda key: ({"w": torch.ones(2)}, {"scale": torch.full((2,), 3.0)}),
        lambda params, buffers, x, *, train=False, key=None: (
            params["w"] * buffers["scale"] * x,
            {"scale": buffers["scale"] + 1},
        ),
    )
    module = interop.as_module(model, *model.init(random.key(0)))
    module(torch.ones(2)).sum().backward()
    assert module.w.grad.tolist() == [3, 3] and module.scale.tolist() == [4, 4]


def written_and_read(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": written_and_read,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("norm", [False, True])
def test_copies_compute_the_same_and_share_nothing(way, norm) -> None:
    _, _, _, module = made(norm=norm)
    twin = COPIES[way](module)
    key = random.key(5)
    assert torch.equal(twin(X, key=key), module(X, key=key))  # buffers too are those of then
    assert torch.equal(COPIES[way](twin).eval()(X), module.eval()(X))
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for leaf in twin.state_dict().values():
            leaf.add_(1)
    close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert twin.training and not module.training


@pytest.mark.parametrize(
    "make", [models.lenet, models.mlp, lambda: nn.transformer_encoder_layer(4, 2)]
)
def test_models_are_pickled(make) -> None:
    model = make()
    module = pickle.loads(pickle.dumps(interop.as_module(model, model.init(random.key(0)))))
    expected = tree.flatten_dict(model.init(random.key(0)))
    close(dict(module.state_dict()), expected, rtol=0, atol=0)


def test_functions_of_one_name_are_told_apart() -> None:
    functions = [lambda x: x + 1, lambda x: x * 3, lambda x, y=X: x - y]
    for fn in functions:
        module = interop.as_module(nn.sequential(nn.linear(3, 3), fn), {"0": {}})
        held = pickle.loads(pickle.dumps(module))._held.model
        params = nn.linear(3, 3).init(random.key(0))
        found = held.apply({"0": params}, X.float())
        close(found, fn(nn.linear(3, 3).apply(params, X.float())))


def test_a_module_that_came_in_is_pickled() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.1))
    module = interop.as_module(*interop.from_module(net))
    twin = pickle.loads(pickle.dumps(module.eval()))
    close(twin(X.float()), net.eval()(X.float()))
    assert twin.state_dict().keys() == net.state_dict().keys()


@pytest.mark.slow
def test_another_process_loads_the_module(tmp_path) -> None:
    model = nn.sequential(nn.linear(3, 2), nn.relu)
    module = interop.as_module(model, model.init(random.key(0)))
    torch.save(module, tmp_path / "module.pt")
    torch.save(module(X.float()), tmp_path / "y.pt")
    torch.save(X.float(), tmp_path / "x.pt")
    program = (
        "import torch; load = lambda name: torch.load(name + '.pt', weights_only=False);"
        "assert torch.equal(load('module')(load('x')), load('y'))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_what_cannot_be_pickled_says_where_it_is_and_what_to_do() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec("layer = lambda x: x", scope)
    model = nn.sequential(nn.linear(3, 2), scope["layer"])
    module = interop.as_module(model, model.init(random.key(0)))
    assert torch.equal(copy.deepcopy(module)(X.float()), module(X.float()))
    with pytest.raises(TypeError, match="cannot pickle '<lambda>' of <string>:1: its code is not"):
        pickle.dumps(module)


def test_a_file_of_other_code_is_refused(monkeypatch) -> None:
    file = pickle.dumps(made(norm=False)[-1])
    here = sys.modules[__name__]

    def other(size: int) -> nn.Model:
        more = size

        def power(x: Tensor) -> int:
            return more

        return power  # type: ignore[return-value]

    other.__code__ = other.__code__.replace(co_name="scale", co_qualname="scale")
    monkeypatch.setattr(here, "scale", other)
    with pytest.raises(ValueError, match=r"cannot load 'scale.<locals>.*save state_dict\(\)"):
        pickle.loads(file)


def test_it_comes_in_again() -> None:
    model, params, buffers, module = made()
    again, params_again, buffers_again = interop.from_module(module)
    close((params_again, buffers_again), (params, buffers), rtol=0, atol=0)
    close(again.apply(params, buffers, X), model.apply(params, buffers, X))
    # In training its key is a draw of the forward: the first.
    y, _ = again.apply(params, buffers, X, train=True, key=random.key(0))
    drawn = random.randint(random.fold_in(random.key(0), 0), (2,), 0, 2**32, dtype=torch.int64)
    close(y, model.apply(params, buffers, X, train=True, key=drawn)[0])


def test_functional_call_gives_it_other_values() -> None:
    model, params, _, module = made(norm=False)
    values = tree.map(lambda p: p + 1, params)
    close(functional_call(module.eval(), tree.flatten_dict(values), (X,)), model.apply(values, X))


def test_trees_of_inputs_and_of_parameters() -> None:
    model = nn.Model(
        lambda key: {"a": [torch.ones(2), (torch.zeros(2),)], "n": torch.tensor(3)},
        lambda params, x, *, train=False, key=None: (
            params["a"][0] * x["left"] + params["a"][1][0] * x["right"] + params["n"]
        ),
    )
    params = model.init(random.key(0))
    module = interop.as_module(model, params)
    x = {"left": torch.ones(3, 2), "right": torch.ones(3, 2)}
    close(module(x).detach(), torch.full((3, 2), 4.0))
    assert list(module.state_dict()) == ["n", "a.0", "a.1.0"]
    assert not module.n.requires_grad


EXPORTS = {
    "export": lambda module, x: torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module(),
    "strict export": lambda module, x: torch.export.export(module, (x,), strict=True).module(),
    "compile": lambda module, x: torch.compile(module, fullgraph=True, backend="aot_eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", EXPORTS)
def test_exported_and_compiled(way) -> None:
    _, _, _, module = made()
    program = EXPORTS[way](module.eval(), X)
    close(program(X), module(X))
    if way == "export":
        assert dict(program.named_parameters()).keys() == dict(module.named_parameters()).keys()
        close(program(X[:2]), module(X[:2]))


@pytest.mark.slow
def test_training_is_compiled() -> None:
    _, _, _, module = made()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        key = random.key(seed)
        module(X, key=key).square().sum().backward()
        compiled(X, key=key).square().sum().backward()
    close(dict(twin.state_dict()), dict(module.state_dict()))
    assert module.bn.num_batches_tracked == 3
    for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        close(ours.grad, theirs.grad)
    assert not torch.equal(compiled(X), compiled(X))  # a key of its own for each call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx() -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    _, _, _, module = made()
    x = X.float()
    module = module.float().eval()
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(y), module(x).detach(), rtol=1e-5, atol=1e-5)
    stored = {tensor.name for tensor in program.model_proto.graph.initializer}
    assert {"fc1.weight", "block.0.weight", "own.gain", "last.bias"} <= stored


LINEAR = nn.linear(3, 2)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("model", "params", "buffers", "kind", "message"),
    [
        (torch.nn.Linear(3, 2), {}, None, TypeError, "torch module Linear; interop.from_module"),
        (LINEAR.apply, {}, None, TypeError, "pass the model itself, not its apply"),
        (
            LINEAR,
            {"weight": 1.0},
            None,
            TypeError,
            "params must hold tensors, got a float at 'weig",
        ),
        (LINEAR, {"weight": ONE}, {}, ValueError, "is a Model, which has no buffers; leave"),
        (nn.batch_norm(3), {}, None, ValueError, "which is a StatefulModel, got none"),
        (
            nn.batch_norm(3),
            {"a": ONE},
            {"a": ONE},
            ValueError,
            "buffers at 'a' cannot be registered",
        ),
        (nn.batch_norm(3), {"a": ONE}, {"a": {"b": ONE}}, ValueError, "buffers at 'a.b' cannot be"),
        (
            LINEAR,
            {"a": {"forward": ONE}},
            None,
            ValueError,
            "'a.forward' cannot .*; rename the lay",
        ),
        (
            LINEAR,
            {"train": {"weight": ONE}},
            None,
            ValueError,
            "'train.weight' cannot be registered",
        ),
    ],
)
def test_what_is_refused(model, params, buffers, kind, message) -> None:
    with pytest.raises(kind, match=f"as_module: .*{message}"):
        interop.as_module(model, params, buffers)
