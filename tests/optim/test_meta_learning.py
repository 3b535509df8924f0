"""Derivatives through training: of rates, of initial parameters, and MAML."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.func import grad, jvp

import fdl
from fdl import losses, nn, optim, random, tree
from tests.support.asserts import close, draw

STEPS = 10
net = nn.sequential(nn.linear(2, 4), nn.tanh, nn.dropout(0.2), nn.linear(4, 1))
start = tree.cast(net.init(random.key(0)), torch.float64)
loss = fdl.supervised(net, losses.mse)
batches = (draw(1, STEPS, 6, 2), draw(2, STEPS, 6, 1))
held_out = (draw(3, 8, 2), draw(4, 8, 1))


def after_training(params, lr, momentum, batches=batches):
    """The loss on new data after ten steps: a function of where they start and how they go."""
    opt = optim.sgd(0.1, 0.9) if momentum is not None else optim.sgd(0.1)
    state = fdl.TrainState.create(net, opt, key=random.key(5), params=params)
    rates = {"lr": lr} if momentum is None else {"lr": lr, "momentum": momentum}
    state = state._replace(opt_state=optim.with_hyperparams(state.opt_state, **rates))
    state, _ = fdl.scan(fdl.train_step(loss, opt), state, batches)
    return loss(state.params, held_out)[0]


def slope(f, x, eps=1e-6):
    return (f(x + eps) - f(x - eps)) / (2 * eps)


lr, momentum = torch.tensor(0.1).double(), torch.tensor(0.9).double()


def test_gradients_by_rates_equal_finite_differences():
    by_lr, by_momentum = grad(after_training, argnums=(1, 2))(start, lr, momentum)
    close(by_lr, slope(lambda r: after_training(start, r, momentum), lr), rtol=1e-6)
    close(by_momentum, slope(lambda m: after_training(start, lr, m), momentum), rtol=1e-6)
    assert by_lr.abs() > 1e-2 and by_momentum.abs() > 1e-2


def test_jvp_by_the_rate_equals_finite_differences():
    tangent = jvp(lambda r: after_training(start, r, momentum), (lr,), (torch.ones_like(lr),))[1]
    close(tangent, slope(lambda r: after_training(start, r, momentum), lr), rtol=1e-6)


@pytest.mark.parametrize("momentum", [None, momentum], ids=["sgd", "momentum"])
def test_gradients_by_where_training_starts_equal_finite_differences(momentum):
    v = tree.map(lambda p: draw(p.numel(), *p.shape), start)
    got = grad(after_training)(start, lr, momentum)
    along = sum((g * u).sum() for g, u in zip(tree.leaves(got), tree.leaves(v), strict=True))

    def moved(eps):
        return after_training(tree.map(lambda p, u: p + eps * u, start, v), lr, momentum)

    close(along, slope(moved, torch.tensor(0.0).double()), rtol=1e-6)
    assert along.abs() > 1e-2


@pytest.mark.slow
def test_compiled_gradients_through_training_equal_eager(plain_backend):
    few = tree.map(lambda leaf: leaf[:2], batches)
    one = lambda r: grad(after_training, argnums=1)(start, r, momentum, few)  # noqa: E731
    close(fdl.jit(one)(lr), one(lr))


def test_a_rate_for_each_layer_is_learned():
    """One inner step with a rate for each layer; the rates are trained by its result."""
    still = fdl.supervised(nn.sequential(nn.linear(2, 4), nn.tanh, nn.linear(4, 1)), losses.mse)
    params = {"0": start["0"], "2": start["3"]}
    batch = (batches[0][0], batches[1][0])

    def after_a_step(rates):
        grads = grad(lambda p: still(p, batch)[0])(params)
        moved = {
            layer: tree.map(lambda p, g, r=rates[layer]: p - r * g, params[layer], grads[layer])
            for layer in params
        }
        return still(moved, batch)[0]

    rates = {layer: torch.tensor(0.05).double() for layer in params}
    before, opt = after_a_step(rates), optim.adam(0.05)
    for layer in rates:  # each against finite differences
        f = lambda r, layer=layer: after_a_step({**rates, layer: r})  # noqa: E731
        close(grad(after_a_step)(rates)[layer], slope(f, rates[layer]), rtol=1e-6)
    state = opt.init(rates)
    for _ in range(20):
        updates, state = opt.update(grad(after_a_step)(rates), state, rates)
        rates = optim.apply_updates(rates, updates)
    assert after_a_step(rates) < 0.8 * before
    assert (rates["0"] - rates["2"]).abs() > 0.01, "layers want different rates"


@pytest.fixture
def maml():
    path = Path(__file__).parents[2] / "docs" / "examples" / "maml.py"
    spec = importlib.util.spec_from_file_location("maml", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_maml_learns_to_learn_in_one_step(maml, monkeypatch):
    monkeypatch.setenv("FDL_JIT", "0")
    params = maml.train(maml.maml_loss, shots=5, steps=300)
    untrained = fdl.TrainState.create(maml.net, optim.adam(1e-3), key=random.key(0)).params
    before, after = (
        maml.adaptation(p, 5, random.key(100), steps=1, tasks=100).mean(0)
        for p in (untrained, params)
    )
    assert after[1] / after[0] < 0.9 < before[1] / before[0]


def test_the_gradient_of_maml_goes_through_the_inner_step(maml):
    params = tree.cast(maml.net.init(random.key(1)), torch.float64)
    x, y = draw(6, 5, 1), draw(7, 5, 1)
    f = lambda p: maml.loss(maml.adapt(p, x, y), x + 1, y)  # noqa: E731
    v = tree.map(lambda p: draw(p.numel(), *p.shape), params)

    def moved(eps):
        return f(tree.map(lambda p, u: p + eps * u, params, v))

    got = grad(f)(params)
    along = sum((g * u).sum() for g, u in zip(tree.leaves(got), tree.leaves(v), strict=True))
    close(along, slope(moved, torch.tensor(0.0).double(), 1e-7), rtol=1e-5)
