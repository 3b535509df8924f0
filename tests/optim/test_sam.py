"""Sharpness-aware minimization against a plain loop over an `nn.Module`, and against optax."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

import fdl
import models
from fdl import losses, nn, optim, random, tree
from fdl.tree._map import match
from tests.support import twins
from tests.support.asserts import close, draw, unchanged
from tests.support.jax import x64

X, Y = draw(0, 20, 8, 6), torch.arange(160).reshape(20, 8) % 3  # batches, examples, features
MLP = models.mlp(6, (7,), 3, rates=(0.4,), std=0.5)


def state_of(model, opt, dtype=torch.float64):
    params = tree.cast(model.init(random.key(1)), dtype)
    return fdl.TrainState.create(model, opt, key=random.key(2), params=params)


def twin_step(module, optimizer, x, y, rho, adaptive):
    """One step as everybody writes it: climb in place, differentiate, come back, step."""
    optimizer.zero_grad()
    value = F.cross_entropy(module(x), y)
    value.backward()
    ps = list(module.parameters())
    with torch.no_grad():
        scales = [p.abs() if adaptive else torch.ones_like(p) for p in ps]
        length = torch.cat([(s * p.grad).flatten() for s, p in zip(scales, ps, strict=True)]).norm()
        steps = [rho * s**2 * p.grad / length for s, p in zip(scales, ps, strict=True)]
        for p, e in zip(ps, steps, strict=True):
            p.add_(e)
    optimizer.zero_grad()
    F.cross_entropy(module(x), y).backward()
    with torch.no_grad():
        for p, e in zip(ps, steps, strict=True):
            p.sub_(e)
    optimizer.step()
    return value.item()


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_equals_the_twin(adaptive, compiled, plain_backend, count_programs):
    """With dropout: both evaluations of a step drop the same units."""
    rho = 1.0 if adaptive else 0.1
    opt = optim.sgd(0.3, 0.9)
    loss = fdl.supervised(MLP, losses.cross_entropy)
    step = fdl.train_step(loss, opt, grad_fn=optim.sam(rho, adaptive=adaptive))
    graphs = count_programs()
    if compiled:
        step = fdl.jit(step)
    state = state_of(MLP, opt)
    module = twins.set_params(twins.mlp(6, (7,), 3, rates=(0.4,)), state.params)
    optimizer = torch.optim.SGD(module.parameters(), 0.3, 0.9)
    before = state.params
    for number in range(20):
        twins.draw_masks(module, random.fold_in(state.key, number), X[number])
        expected = twin_step(module, optimizer, X[number], Y[number], rho, adaptive)
        with unchanged(state):
            new, found = step(state, (X[number], Y[number]))
        state = new
        close(found["loss"].value.item(), expected)
    assert graphs.count == compiled
    for path, p in tree.flatten_dict(state.params).items():
        began, end = (tree.flatten_dict(t)[path] for t in (before, twins.get_params(module)))
        assert (end - began).abs().min() > 1e-4
        close(p - began, end - began)
    plain = fdl.train_step(loss, opt)
    state = state_of(MLP, opt)
    for number in range(20):
        state, _ = plain(state, (X[number], Y[number]))
    far = (twins.get_params(module)["output"]["weight"] - state.params["output"]["weight"]).abs()
    assert far.min() > 1e-3, "the perturbation made no difference"


@pytest.mark.slow
def test_steps_equal_optax():
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    jnp = jax.numpy
    start = {"w": draw(0, 3), "b": draw(1, 2, 2), "c": draw(2)}

    def f(params, sin, total):
        return total(sin(params["w"] * params["c"])) + total(params["b"] ** 4) * params["c"] ** 2

    with x64():
        climb = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
        theirs = optax.contrib.sam(optax.sgd(0.01, 0.9), climb, opaque_mode=True)
        slope = jax.jit(jax.grad(lambda params, i=0: f(params, jnp.sin, jnp.sum)))
        expected = {path: jnp.asarray(leaf.numpy()) for path, leaf in start.items()}
        state = theirs.init(expected)
        for _ in range(100):
            updates, state = theirs.update(slope(expected), state, expected, grad_fn=slope)
            expected = optax.apply_updates(expected, updates)
        expected = {path: torch.from_numpy(np.array(leaf)) for path, leaf in expected.items()}
    opt, params = optim.sgd(0.01, 0.9), start
    state = opt.init(params)
    for _ in range(100):
        grads, _ = optim.sam(0.1)(lambda p: f(p, torch.sin, torch.sum))(params)
        updates, state = opt.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    for path, p in params.items():
        moved = expected[path] - start[path]
        assert moved.abs().min() > 1e-3
        close(p - start[path], moved)


def test_metrics_and_buffers_are_those_of_the_first_evaluation():
    def apply(params, buffers, x, *, train=False, key=None):
        prediction = x @ params["w"]
        return prediction, {"seen": buffers["seen"] + prediction.detach().sum()}

    model = nn.StatefulModel(
        lambda key: ({"w": draw(3, 6, 2)}, {"seen": torch.ones((), dtype=torch.float64)}), apply
    )
    opt, y = optim.sgd(0.1), draw(4, 8, 2)
    loss = fdl.supervised(model, losses.mse)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    new, found = fdl.train_step(loss, opt, grad_fn=optim.sam(0.5))(state, (X[0], y))
    prediction = X[0] @ state.params["w"]
    close(found["loss"].value, losses.mse(prediction, y))
    close(new.buffers["seen"], 1 + prediction.sum())


# ------------------------------------------------------------------------------ laws


def bowl(params):
    return sum((leaf**4).sum() for leaf in tree.leaves(params))


def by_hand(params, rho, adaptive=False):
    flat = torch.cat([leaf.reshape(-1) for leaf in tree.leaves(params)])
    scale = flat.abs() if adaptive else 1.0
    g = 4 * flat**3
    return 4 * (flat + rho * scale**2 * g / (scale * g).norm()) ** 3


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])
@pytest.mark.parametrize("rho", [0.0, 0.05, 3, torch.tensor(0.2)], ids=str)
def test_the_gradient_is_that_of_the_worst_point_nearby(rho, adaptive):
    params = {"b": draw(5), "w": draw(6, 2, 3)}
    with unchanged(params):
        grads, (value, aux) = optim.sam(rho, adaptive=adaptive)(
            lambda p: (bowl(p), p["b"] + 1), has_aux=True
        )(params)
    flat = torch.cat([leaf.reshape(-1) for leaf in tree.leaves(grads)])
    close(flat, by_hand(params, rho, adaptive))
    close((value, aux), (bowl(params), params["b"] + 1))
    match(params, grads, "grads")


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])
def test_no_gradient_is_no_perturbation(adaptive):
    """At 0 the gradient and its derivatives are 0, and not NaN; so are those at a flat point."""
    sam = optim.sam(0.1, adaptive=adaptive)
    zero = {"w": torch.zeros(3).double(), "b": torch.zeros(()).double()}
    assert tree.diff(sam(bowl)(zero)[0], zero) == []
    second = grad(lambda p: sum(leaf.sum() for leaf in tree.leaves(sam(bowl)(p)[0])))(zero)
    assert tree.diff(second, zero) == []
    some = {"w": torch.zeros(3).double(), "b": torch.ones(()).double()}
    second = grad(lambda p: sum(leaf.sum() for leaf in tree.leaves(sam(bowl)(p)[0])))(some)
    assert torch.equal(second["w"], zero["w"]) and second["b"] > 0
    assert sam(lambda p: torch.ones(()))({})[0] == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_keep_every_dtype(dtype):
    params = tree.cast({"b": draw(5), "w": draw(6, 2, 3)}, dtype)
    for rho in (0.1, torch.tensor(0.1).double()):
        grads, value = optim.sam(rho)(bowl)(params)
        assert tree.diff(params, grads, values=False) == [] and value.dtype == dtype
        flat = torch.cat([leaf.double().reshape(-1) for leaf in tree.leaves(grads)])
        far = 1e-5 if dtype == torch.float32 else 0.05
        close(flat, by_hand(tree.cast(params, torch.float64), 0.1), rtol=far, atol=far)


def test_a_population_of_radii_and_their_derivative():
    params, radii = {"w": draw(6, 3)}, torch.tensor([0.1, 0.5]).double()

    def slope(rho):
        return optim.sam(rho)(bowl)(params)[0]["w"]

    close(vmap(slope)(radii), torch.stack([by_hand(params, rho) for rho in radii]))
    step = 1e-6
    numeric = (by_hand(params, 0.1 + step) - by_hand(params, 0.1 - step)).sum() / (2 * step)
    close(grad(lambda rho: slope(rho).sum())(radii[0]), numeric, rtol=1e-8)


def test_further_arguments_are_passed_on():
    f = optim.sam(0.1)(lambda p, x, *, y: ((p * x - y) ** 2).sum())
    p, x, y = draw(7, 3), draw(8, 3), draw(9, 3)
    g = 2 * x * (p * x - y)
    close(f(p, x, y=y)[0], 2 * x * ((p + 0.1 * g / g.norm()) * x - y))


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_radius_out_of_range_raises(rho):
    with pytest.raises(ValueError, match="sam: rho must be finite and at least 0, got"):
        optim.sam(rho)


def test_a_radius_of_another_kind_raises():
    with pytest.raises(ValueError, match=r"sam: rho must be a number or a 0-d tensor, got \[2\]"):
        optim.sam(torch.ones(2))
    with pytest.raises(TypeError, match="sam: rho must be a number or a 0-d tensor, got <function"):
        optim.sam(lambda count: count)
