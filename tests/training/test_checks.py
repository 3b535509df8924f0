"""What a training step is given wrongly is named where it comes in, by shape and dtype alone."""

import functools

import numpy as np
import pytest
import torch

import fdl
from fdl import interop, losses, metrics, nn, optim, random, tree
from fdl.data import Batch
from tests.support.asserts import close, draw

KEY = random.key(7)
X, Y = draw(0, 6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
NET = nn.linear(3, 2)
PARAMS = tree.cast(NET.init(KEY), torch.float64)
OPT = optim.sgd(0.1)
LOSS = fdl.supervised(NET, losses.cross_entropy)
STATE = fdl.TrainState.create(NET, OPT, key=KEY, params=PARAMS)
MODULE = torch.nn.Linear(3, 2)


def step_of(result):
    """Make a step whose loss returns this."""
    return lambda: fdl.train_step(lambda params, batch, **_: result(params), OPT)(STATE, (X, Y))


def value(params):
    return params["weight"].sum()


def metric(result):
    return lambda: fdl.supervised(NET, losses.cross_entropy, {"mine": lambda p, y, w: result})(
        PARAMS, (X, Y)
    )


CASES = {
    "an apply": (
        lambda: fdl.supervised(NET.apply, losses.mse),
        r"must be a Model or a StatefulModel, got the function apply; pass the model itself, not",
    ),
    "a module": (
        lambda: fdl.supervised(MODULE, losses.mse),
        r"model must be a Model, got the torch module Linear; interop\.from_module",
    ),
    "apply and loss": (
        lambda: fdl.supervised(losses.mse, NET),
        r"supervised: model and loss are swapped: supervised\(model, loss\)",
    ),
    "what from_module returns": (
        lambda: fdl.supervised(interop.from_module(MODULE), losses.mse),
        "got a tuple; pass the model alone, the first of them",
    ),
    "an array": (
        lambda: NET.apply(PARAMS, X.numpy()),
        r"linear\(3, 2\): x must be a tensor, got numpy .*; convert arrays with interop",
    ),
    "a class of losses": (
        lambda: fdl.supervised(NET, torch.nn.MSELoss),
        r"loss must be .* got the class MSELoss; make an instance, MSELoss\(\)",
    ),
    "a metric of the prediction alone": (
        lambda: fdl.supervised(NET, losses.mse, {"mean": lambda prediction: prediction.mean()}),
        r"metric 'mean' must accept \(prediction, y, weights\), got the function <lambda> with the "
        r"signature \(prediction\) \(too many",
    ),
    "metrics of the state alone": (
        lambda: fdl.train_step(LOSS, OPT, metrics=lambda state: {}),
        r"train_step: metrics must accept \(state, grads\), got the function <lambda> with the",
    ),
    "a list of metrics": (
        lambda: fdl.supervised(NET, losses.mse, [metrics.accuracy]),
        "supervised: metrics must be a dict such as .* got a list",
    ),
    "a metric that is a number": (
        lambda: fdl.supervised(NET, losses.mse, {"mine": 3}),
        "metric 'mine' must be a function .* got an int",
    ),
    "a class for the loss": (
        lambda: fdl.train_step(torch.nn.MSELoss, OPT),
        "train_step: loss must be a function, got the class MSELoss",
    ),
    "no loss": (lambda: fdl.supervised(NET, "mse"), "loss must be a function .* got a str"),
    "loss and optimizer": (
        lambda: fdl.train_step(OPT, LOSS),
        r"loss must be a function .* got an Optimizer; the order is train_step\(loss, opt\)",
    ),
    "an optimizer not made": (
        lambda: fdl.train_step(LOSS, optim.adam),
        r"opt must be an optimizer such as optim\.sgd\(0\.1\), .* got the function adam",
    ),
    "an optimizer of torch": (
        lambda: fdl.train_step(LOSS, torch.optim.SGD),
        "opt must be an optimizer .* got the class SGD",
    ),
    "a model for a loss": (lambda: fdl.eval_step(MODULE), "eval_step: loss must be a function"),
    "an old loss": (
        lambda: fdl.train_step(lambda params, batch, key: None, OPT),
        r"train_step: loss must accept \(params, batch, \*, train, key\), got the function "
        r"<lambda> with the signature \(params, batch, key\) .*'train'",
    ),
    "an old loss with buffers": (
        lambda: fdl.eval_step(lambda params, buffers, batch, *, train, key: None),
        r"eval_step: loss must accept .* 'batch'.*wrap a loss with buffers in fdl\.StatefulLoss",
    ),
    "a stateful loss without buffers": (
        lambda: fdl.train_step(fdl.StatefulLoss(lambda params, batch, **_: None), OPT),
        r"loss must accept \(params, buffers, batch, \*, train, key\), got the function <lambda>",
    ),
    "a model for the loss": (
        lambda: fdl.train_step(NET, OPT),
        r"loss must be the loss of a model, got a Model .*; fdl\.supervised\(model, losses\.mse\)",
    ),
    "an apply for the loss": (
        lambda: fdl.train_step(NET.apply, OPT),
        r"loss must be the loss of a model, got the function apply .*fdl\.supervised\(model",
    ),
    "an apply of one's own": (
        lambda: fdl.eval_step(lambda params, x, *, train, key: x[0])(STATE, (X, Y)),
        r"the loss must return \(scalar, metrics\), got a tensor float64\[6, 3\]",
    ),
    "a scalar": (
        step_of(value),
        r"must return \(scalar, metrics\), got a tensor float64\[\]; return \(value, \{\}\)",
    ),
    "a vector": (
        step_of(lambda p: (p["weight"][0], {})),
        r"must return a 0-d tensor first, got a tensor float64\[3\]",
    ),
    "a float": (
        step_of(lambda p: (value(p), {"acc.top": 0.5})),
        r"metrics\['acc\.top'\] must be a Mean or a tensor, got a float",
    ),
    "metrics that are no dict": (
        step_of(lambda p: (value(p), value(p))),
        r"metrics must be a dict of Means or tensors, got a tensor float64\[\]; return \{\} if",
    ),
    "no metrics": (
        step_of(lambda p: (value(p), None)),
        "train_step: metrics must be a dict of Means or tensors, got a NoneType",
    ),
    "params for the state": (
        lambda: fdl.train_step(LOSS, OPT)(PARAMS, (X, Y)),
        r"train_step: state must be a TrainState, got a dict; make one with fdl\.TrainState",
    ),
    "params to evaluate": (
        lambda: fdl.eval_step(LOSS)(PARAMS, (X, Y)),
        "eval_step: state must be a TrainState, got a dict",
    ),
    "an optimizer not made, in create": (
        lambda: fdl.TrainState.create(NET, optim.sgd, key=KEY),
        r"create: opt must be an optimizer such as optim\.sgd\(0\.1\), .* got the function sgd",
    ),
    "two trees of a Model": (
        lambda: fdl.TrainState.create(nn.Model(lambda key: ({}, {}), max), OPT, key=KEY),
        "init of a Model must return params, got two dicts; .* StatefulModel",
    ),
    "one tree of a StatefulModel": (
        lambda: fdl.TrainState.create(nn.StatefulModel(lambda key: {}, max), OPT, key=KEY),
        r"init of a StatefulModel must return \(params, buffers\), got a dict",
    ),
    "a bare metric": (
        metric(torch.tensor(1.0)),
        "metric 'mine' must return a Mean, .* got a tensor float32",
    ),
    "a float metric": (metric(0.5), "metric 'mine' must return a Mean, .* got a float"),
    "a float loss": (
        lambda: fdl.supervised(NET, lambda p, y: 0.5)(PARAMS, (X, Y)),
        "loss must return a tensor, got a float",
    ),
    "a loss of weights that returns many": (
        lambda: fdl.supervised(NET, lambda p, y, weights: p)(PARAMS, (X, Y)),
        r"\(prediction, y, weights\) must return a scalar, got a tensor float64\[6, 2\]",
    ),
    "arrays": (
        lambda: LOSS(PARAMS, (X.numpy(), Y)),
        r"batch\.x must be a tensor, got numpy float64\[6, 3\]; convert .* interop\.from_numpy",
    ),
    "arrays in a dict": (
        lambda: LOSS(PARAMS, {"x": {"a.b": np.zeros(3)}, "y": Y}),
        r"batch\.x\['a\.b'\] must be a tensor, got numpy float64\[3\]",
    ),
    "other names": (
        lambda: LOSS(PARAMS, {"image": X, "label": Y}),
        r"with the entries x, y and mask, got the entries \['image', 'label'\]",
    ),
    "a lone tensor": (lambda: LOSS(PARAMS, X), r"batch must be .* got a tensor float64\[6, 3\]"),
    "model(x)": (lambda: NET(X), r"call model\.apply\(params, x\), not model\(x\)"),
    "model(x), with buffers": (
        lambda: nn.batch_norm(3)(X),
        r"call model\.apply\(params, buffers, x\)",
    ),
    "init(0)": (lambda: NET.init(0), r"make a key from a seed with random\.key\(0\)"),
    "init(0) of a sequential": (
        lambda: nn.sequential(nn.relu).init(0),
        r"sequential: init: .* make a key from a seed with random\.key\(0\)",
    ),
    "a dict for x": (
        lambda: NET.apply(PARAMS, {"a": X}),
        r"linear\(3, 2\): x must be a tensor, got a dict",
    ),
    "a pair for x": (
        lambda: nn.dropout(0.5).apply({}, (X, X), train=True, key=KEY),
        r"dropout\(0\.5\): x must be a tensor, got a tuple",
    ),
    "params after x": (
        lambda: nn.sequential(NET).apply(X, PARAMS),
        r"sequential: params must be a dict .* got a tensor float64\[6, 3\]",
    ),
    "an apply as a layer": (
        lambda: nn.sequential(NET.apply),
        r"layer '0' must accept one argument, .*'x'\); pass the model itself, not its apply",
    ),
    "a loss as a layer": (
        lambda: nn.sequential(NET, losses.mse),
        "layer '1' must accept one argument, got the function mse .*'target'",
    ),
    "an optimizer not made, as a layer": (
        lambda: nn.sequential(NET, optim.sgd),
        r"layer '1' is the function optim\.sgd, which makes an optimizer",
    ),
    "from_module as a layer": (
        lambda: nn.sequential(interop.from_module(MODULE)),
        "layer '0' must be a Model .* got a tuple; pass the model alone, the first of them",
    ),
    "a layer not made": (
        lambda: nn.sequential(nn.flatten, NET),
        r"layer '0' is the function nn\.flatten, which makes a layer: call it, nn\.flatten\(",
    ),
    "a model not made": (
        lambda: nn.sequential(act=nn.batch_norm),
        r"layer 'act' is the function nn\.batch_norm",
    ),
    "a module as a layer": (
        lambda: nn.sequential(MODULE, nn.relu),
        r"layer '0' is the torch module Linear, .* interop\.from_module",
    ),
    "a class of layers": (
        lambda: nn.sequential(torch.nn.ReLU),
        r"layer '0' must be a Model or a function x -> y, got the class ReLU",
    ),
    "a factory of the user's": (
        lambda: nn.sequential(lambda x: nn.relu).apply({}, X),
        "the function returned the function relu instead of a tensor; if it makes a layer, call it",
    ),
}


@pytest.mark.parametrize(("call", "text"), CASES.values(), ids=CASES)
def test_a_type_error_names_it(call, text):
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize("name", [n for n in vars(nn) if n in nn.__all__ and n[0].islower()])
def test_every_layer_is_a_layer_or_says_that_it_has_to_be_made(name):
    thing = getattr(nn, name)
    if name == "init":
        return
    module = getattr(thing, "__module__", "")
    if module.startswith("fdl.") and module != "fdl.nn._activations":
        with pytest.raises(TypeError, match=rf"nn\.{name}, which makes a layer: call it"):
            nn.sequential(thing)
    else:
        nn.sequential(thing)  # a function that takes x


TAKE_A_MODEL = {
    "supervised": lambda f: fdl.supervised(f, losses.mse),
    "TrainState.create": lambda f: fdl.TrainState.create(f, OPT, key=KEY),
    "update_bn": lambda f: fdl.update_bn(f, {}, {}, (X, Y), torch.zeros(1, 2).long()),
    "with_policy": nn.with_policy,
    "tied": lambda f: nn.tied(f, {}),
}


@pytest.mark.parametrize("caller", TAKE_A_MODEL)
@pytest.mark.parametrize("name", ["linear", "flatten", "batch_norm", "sequential"])
def test_a_factory_in_place_of_a_model_is_named(caller, name):
    with pytest.raises(
        TypeError, match=rf"{caller}: model is the function nn\.{name}, which makes"
    ):
        TAKE_A_MODEL[caller](getattr(nn, name))


@pytest.mark.parametrize("n", [1, 10])
def test_values_that_were_broadcast_are_refused(n):
    model = nn.linear(3, 1)
    params = tree.cast(model.init(KEY), torch.float64)
    x, y = draw(1, n, 3), draw(2, n)
    loss = fdl.supervised(model, lambda p, y: (p - y) ** 2)
    expected = losses.mse(model.apply(params, x)[:, 0], y)
    close(loss(params, (x, y[:, None]))[0], expected)
    if n > 1:
        with pytest.raises(ValueError, match=r"values \[10, 10\] for a batch of 10, .*\[10, 1\]"):
            loss(params, (x, y))
    with pytest.raises(ValueError, match=r"for a batch of"):
        fdl.supervised(model, lambda p, y: p.new_zeros(n + 1))(params, (x, y))


def test_values_per_token_may_be_fewer_than_y():
    model = nn.linear(5, 5)
    x, y = draw(4, 6, 7, 5), random.randint(KEY, (6, 7), 0, 5)
    params = tree.cast(model.init(KEY), torch.float64)

    def shifted(logits, y):
        return torch.nn.functional.cross_entropy(logits[:, :-1].mT, y[:, 1:], reduction="none")

    found = fdl.supervised(model, shifted)(params, (x, y))[0]
    close(found, shifted(model.apply(params, x), y).mean())


def test_forms_of_a_batch():
    mask = torch.tensor([True, True, False, True, False, False])
    expected = LOSS(PARAMS, Batch(X, Y, mask))
    for batch in ([X, Y, mask], {"x": X, "y": Y, "mask": mask}, (X, Y, mask)):
        close(LOSS(PARAMS, batch), expected)
    close(LOSS(PARAMS, {"x": X, "y": Y}), LOSS(PARAMS, Batch(X, Y)))
    close(
        fdl.train_step(LOSS, OPT)(STATE, {"x": X, "y": Y}), fdl.train_step(LOSS, OPT)(STATE, (X, Y))
    )
    for wrong in (mask[:5], mask[:, None]):
        with pytest.raises(ValueError, match=r"mask must have the shape \[6\]"):
            LOSS(PARAMS, Batch(X, Y, wrong))


def test_a_prediction_may_be_a_tree():
    model = nn.Model(
        NET.init, lambda p, x, *, train=False, key=None: {"out": NET.apply(p, x), "x": x}
    )
    loss = fdl.supervised(
        model,
        lambda p, y, weights=None: losses.cross_entropy(p["out"], y, weights),
        {"accuracy": lambda p, y, weights=None: metrics.accuracy(p["out"], y, weights)},
    )
    close(loss(PARAMS, (X, Y))[0], LOSS(PARAMS, (X, Y))[0])


def test_errors_show_no_values():
    with pytest.raises(TypeError) as error:
        LOSS(PARAMS, (np.full((6, 3), 1.2345), Y))
    assert "1.23" not in str(error.value)


def test_the_length_of_a_batch_may_be_dynamic():
    class Module(torch.nn.Module):
        def forward(self, x, y):
            return LOSS(PARAMS, (x, y))[0]

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Module(), (X, Y), dynamic_shapes=({0: batch}, {0: batch}))
    close(exported.module()(X[:4], Y[:4]), LOSS(PARAMS, (X[:4], Y[:4]))[0])


def test_a_partial_of_a_function_is_a_layer():
    net = nn.sequential(functools.partial(torch.clamp, min=0))
    close(net.apply({}, X), X.clamp(min=0))


def test_a_function_without_a_module_is_a_loss_and_a_layer():
    """What `exec` makes may have none."""
    names = {"__name__": None, "torch": torch}
    exec("def loss(params, batch, *, train, key): return params['weight'].sum(), {}", names)
    exec("def layer(x): return x + 1", names)
    assert names["loss"].__module__ is None
    state, _ = fdl.train_step(names["loss"], OPT)(STATE, (X, Y))
    assert torch.equal(state.params["bias"], STATE.params["bias"])
    net = nn.sequential(names["layer"])
    assert torch.equal(net.apply(net.init(KEY), X), X + 1)
