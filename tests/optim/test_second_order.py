"""Derivatives of second order through every optimizer, where roots and norms have corners."""

import pytest
import torch
from torch.func import grad, hessian, jacrev

import fdl
from fdl import losses, nn, optim, random, tree
from tests.support.asserts import close, draw
from tests.support.every_optimizer import EVERY

W, B = draw(0, 2, 3), draw(1, 2)
PLACES = {  # of (w, b) and their gradients
    "g = 0": (W, B, torch.zeros_like(W), torch.zeros_like(B)),
    "a row of g = 0": (W, B, torch.stack([torch.zeros_like(W[0]), W[1]]), B),
    "w = 0": (torch.zeros_like(W), torch.zeros_like(B), W, B),
    "a row of w = 0": (torch.stack([W[0], torch.zeros_like(W[1])]), B, W, B),
    "all 0": tuple(map(torch.zeros_like, (W, B, W, B))),
}


def after_two_updates(opt):
    """A number that depends on all that two updates do, from parameters and gradients."""

    def f(w, b, gw, gb):
        params = {"w": w, "b": b}

        def value_fn(p):  # whose gradient at the parameters is (gw, gb)
            moved = (p["w"] - w).square().sum() + (p["b"] - b).square().sum()
            return (p["w"] * gw).sum() + (p["b"] * gb).sum() + moved

        state, total = opt.init(params), 0.0
        for i in (1, 2):
            grads = {"w": gw / i, "b": gb / i}
            updates, state = opt.update(grads, state, params, value=1.0, value_fn=value_fn)
            updates = {k: 0.0 * params[k] if u is None else u for k, u in updates.items()}
            params = optim.apply_updates(params, updates)
            total = total + sum((u.sin() * (i + u.cos())).sum() for u in updates.values())
        return total

    return f


ALL = (0, 1, 2, 3)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", EVERY)
def test_reverse_over_reverse_is_finite(name, place):
    f = after_two_updates(EVERY[name])
    first = grad(f, argnums=ALL)(*place)
    second = jacrev(grad(f, argnums=ALL), argnums=ALL)(*place)
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves((first, second)))


# Where a step has a corner or a jump, and so no second derivative: |g| and signs at 0, the trust
# ratio where a norm becomes 0, and bfloat16 inside of Muon.
CORNERS = {
    **dict.fromkeys(("adafactor", "adamw", "adan", "lion"), ("g = 0", "a row of g = 0", "all 0")),
    **dict.fromkeys(("lamb", "muon", "scale_by_muon"), tuple(PLACES)),
    **dict.fromkeys(("adam", "chain", "schedule_free_adamw"), ("g = 0", "a row of g = 0")),
    **dict.fromkeys(("lars", "scale_by_trust_ratio"), ("g = 0", "w = 0", "all 0")),
    "lbfgs": ("a row of g = 0",),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", EVERY)
def test_second_derivatives_equal_finite_differences(name, place):
    if place in CORNERS.get(name, ()):
        return
    f, x = after_two_updates(EVERY[name]), PLACES[place]
    v, h = tuple(draw(i, *leaf.shape) for i, leaf in enumerate(x)), 1e-5

    def first(x):
        return torch.cat([leaf.reshape(-1) for leaf in grad(f, argnums=ALL)(*x)])

    def moved(h):
        return tuple(leaf + h * u for leaf, u in zip(x, v, strict=True))

    expected = (first(moved(h)) - first(moved(-h))) / (2 * h)
    rows = jacrev(lambda *x: first(x), argnums=ALL)(*x)  # of the Hessian, which is symmetric
    got = sum((row * u).flatten(1).sum(1) for row, u in zip(rows, v, strict=True))
    close(got, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ norms


CLIPS = {
    "clip_by_global_norm": optim.clip_by_global_norm(0.1),
    "adaptive_grad_clip": optim.adaptive_grad_clip(0.1),
    "lamb": optim.lamb(0.1),
    "adafactor": optim.adafactor(0.1),
}


@pytest.mark.parametrize("opt", CLIPS.values(), ids=CLIPS)
def test_hvp_of_a_maml_step_with_a_dead_layer_is_finite(opt):
    """Behind a ReLU that is dead for every row all gradients but the last bias' are 0."""
    net = nn.sequential(nn.linear(2, 3), nn.relu, nn.linear(3, 1))
    params = tree.cast(net.init(random.key(0)), torch.float64)
    params["0"]["bias"] = torch.full_like(params["0"]["bias"], -100.0)
    inner, outer = (draw(1, 4, 2), draw(2, 4, 1)), (draw(3, 4, 2), draw(4, 4, 1))
    loss = fdl.supervised(net, losses.mse)

    def adapted(p):
        updates, _ = opt.update(grad(lambda p: loss(p, inner)[0])(p), opt.init(p), p)
        return loss(optim.apply_updates(p, tree.map(torch.neg, updates)), outer)[0]

    v = tree.map(torch.cos, params)
    assert grad(lambda p: loss(p, inner)[0])(params)["0"]["weight"].eq(0).all()

    def slope(p):
        return sum((g * u).sum() for g, u in zip(*map(tree.leaves, (grad(adapted)(p), v))))  # noqa: B905

    assert all(leaf.isfinite().all() for leaf in tree.leaves(grad(slope)(params)))


def test_the_second_derivative_of_a_clipped_step_is_right_where_it_clips():
    g = torch.tensor([3.0, 4.0, 0.0]).double()
    opt = optim.clip_by_global_norm(1.0)
    f = lambda g: opt.update({"w": g}, opt.init({"w": g}), {"w": g})[0]["w"].pow(3).sum()  # noqa: E731
    close(hessian(f)(g), hessian(lambda g: ((g / (g.square().sum().sqrt() + 1e-6)) ** 3).sum())(g))


def test_norms_of_eight_million_numbers_are_right():
    """`torch.linalg.vector_norm` is off by 0.1 % here."""
    x = torch.full((8_000_000,), 0.1)
    norm = (8e6 * x[0].double() ** 2).sqrt()
    params, grads = {"w": x}, {"w": x}
    for opt, expected in {
        optim.clip_by_global_norm(1.0): x[0].double() / norm,
        optim.adaptive_grad_clip(0.5): 0.5 * x[0].double(),
        optim.scale_by_trust_ratio(): x[0].double(),
    }.items():
        got = opt.update(grads, opt.init(params), params)[0]["w"]
        close(got[:2].double(), expected.expand(2), rtol=1e-6)
    got, _ = optim.sam(1.0)(lambda p: 0.05 * p["w"].square().sum())(params)
    close(got["w"][0].double(), 0.1 * (x[0].double() + 1 / 8e6**0.5), rtol=1e-6)
    rms = optim.adafactor(1.0, eps=(None, 0.0))
    got = rms.update(grads, rms.init(params), params)[0]["w"]
    close(got[0].double(), -x[0].double(), rtol=1e-6)
    flat, zeros = optim.lbfgs(max_iter=1, history_size=1), {"w": torch.zeros_like(x)}
    got = flat.update(grads, flat.init(zeros), zeros, value=1.0, value_fn=lambda p: p["w"].sum())
    close(got[0]["w"][0].double(), torch.tensor(-1 / 8e6).double(), rtol=1e-6)
