"""Clipping, centralizing, noise and averages against torch, optax and plain loops, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fdl
from fdl import optim, random, tree
from fdl.tree._map import match
from tests.support.asserts import close, draw, equal_bits, unchanged
from tests.support.jax import x64

SHAPES = {"scalar": (), "vector": (3,), "deep.matrix": (4, 3), "deep.kernel": (2, 3, 2, 2)}
KEY = random.key(5)


def params_(dtype=torch.float64):
    flat = {path: draw(i, *shape) for i, (path, shape) in enumerate(SHAPES.items())}
    return tree.cast(tree.unflatten_dict(flat), dtype)


def grads_(step=0, dtype=torch.float64, size=1.0):
    flat = {p: size * draw(100 * step + i + 10, *s) for i, (p, s) in enumerate(SHAPES.items())}
    return tree.cast(tree.unflatten_dict(flat), dtype)


def once(opt, grads, params):
    return opt.update(grads, opt.init(params), params)[0]


def norms(x):
    """Norms of units, by a loop: of the rows of what has two axes or more, else of the whole."""
    rows = x if x.ndim > 1 else [x]
    return torch.stack([row.pow(2).sum().sqrt() for row in rows])


seeds = st.integers(0, 1000)
sizes = st.floats(1e-3, 1e3)

# ------------------------------------------------------------------------------ clip


@pytest.mark.parametrize("max_value", [0.1, 0.7, 10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_clip_equals_torch(max_value, dtype):
    grads = grads_(dtype=dtype)
    leaves = [g.clone() for g in tree.leaves(grads)]
    for leaf in leaves:
        leaf.grad = leaf.clone()
    torch.nn.utils.clip_grad_value_(leaves, max_value)
    got = tree.leaves(once(optim.clip(max_value), grads, params_(dtype)))
    assert all(equal_bits(g, leaf.grad) for g, leaf in zip(got, leaves, strict=True))
    assert any(bool((leaf.grad != leaf).any()) for leaf in leaves) == (max_value < 10)


# ------------------------------------------------------------------------------ adaptive_grad_clip


@pytest.mark.parametrize(("clipping", "eps"), [(0.01, 1e-3), (1.5, 1e-3), (1.5, 1.5)])
def test_adaptive_clip_equals_a_loop_over_units(clipping, eps):
    params, grads = params_(), grads_()
    got = tree.flatten_dict(once(optim.adaptive_grad_clip(clipping, eps), grads, params))
    clipped = []
    for path, g in tree.flatten_dict(grads).items():
        p = tree.flatten_dict(params)[path]
        expected = g.clone()
        units = zip(expected, g, p, strict=True) if g.ndim > 1 else [(expected, g, p)]
        for out, unit, weights in units:
            size = math.sqrt(sum(w**2 for w in weights.reshape(-1).tolist()))
            limit, norm = clipping * max(size, eps), unit.norm().item()
            clipped.append(norm > limit)
            if norm > limit:
                out.copy_(unit * (limit / norm))
        close(got[path], expected)
    assert any(clipped) and (clipping < 0.1 or not all(clipped))


@pytest.mark.slow
def test_adaptive_clip_equals_optax():
    """It has `[in, out]` and HWIO, and takes `[n, 1]` as one unit: none is among these."""
    optax = pytest.importorskip("optax")
    params, grads = params_(), grads_()

    def transposed(x):
        return np.asarray(x.permute(*range(2, x.ndim), 1, 0) if x.ndim > 1 else x)

    theirs = optax.adaptive_grad_clip(0.3, 0.5)
    with x64():
        p, g = tree.map(transposed, params), tree.map(transposed, grads)
        expected, _ = theirs.update(g, theirs.init(p), p)
    got = tree.map(transposed, once(optim.adaptive_grad_clip(0.3, 0.5), grads, params))
    for path, leaf in tree.flatten_dict(got).items():
        np.testing.assert_allclose(leaf, tree.flatten_dict(expected)[path], rtol=1e-12)


@pytest.mark.slow
@given(seeds, sizes, st.floats(0.01, 2.0))
def test_adaptive_clip_bounds_each_unit_and_keeps_its_direction(seed, size, clipping):
    params, grads = params_(), grads_(seed, size=size)
    got = once(optim.adaptive_grad_clip(clipping), grads, params)
    for p, g, u in zip(*map(tree.leaves, (params, grads, got)), strict=True):
        limit = clipping * norms(p).clamp(min=1e-3)
        assert (norms(u) <= limit * (1 + 1e-12)).all()
        small = norms(g) <= limit
        shrunk = norms(u) / norms(g)
        assert torch.equal(shrunk[small], torch.ones_like(shrunk)[small])
        close(u.reshape(len(shrunk), -1), shrunk[:, None] * g.reshape(len(shrunk), -1))


def test_adaptive_clip_of_zeros_is_zero_and_differentiable():
    opt, zeros = optim.adaptive_grad_clip(), tree.map(torch.zeros_like, params_())
    assert tree.diff(once(opt, zeros, zeros), zeros) == []
    slope = torch.func.grad(lambda g: sum(u.sum() for u in tree.leaves(once(opt, g, zeros))))(zeros)
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(slope))


def test_norms_of_float16_do_not_overflow():
    params = {"w": torch.full((2, 4), 6e4, dtype=torch.float16)}  # the norm of a row is 1.2e5
    close(once(optim.adaptive_grad_clip(0.5), params, params)["w"], params["w"] / 2, rtol=1e-3)
    got = once(optim.clip_by_global_norm(1.0), params, params)["w"]
    close(got, torch.full_like(got, 8**-0.5), rtol=2e-3)


# ------------------------------------------------------------------------------ centralize


def test_centralize_equals_optax():
    optax = pytest.importorskip("optax")
    grads = grads_()
    with x64():
        given_ = tree.map(np.asarray, grads)
        expected, _ = optax.centralize().update(given_, optax.centralize().init(given_))
    for path, leaf in tree.flatten_dict(once(optim.centralize(), grads, params_())).items():
        np.testing.assert_allclose(leaf, tree.flatten_dict(expected)[path], rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@given(seeds, sizes)
def test_centralized_units_have_the_mean_zero(seed, size):
    grads = grads_(seed, size=size)
    got = once(optim.centralize(), grads, params_())
    for g, u in zip(*map(tree.leaves, (grads, got)), strict=True):
        if g.ndim < 2:
            assert torch.equal(u, g)
            continue
        for row, old in zip(u, g, strict=True):
            assert abs(row.mean()) < 1e-12 * size
            close(old - row, torch.full_like(row, old.mean()), atol=1e-12 * size)


# ------------------------------------------------------------------------------ add_noise


def test_noise_is_drawn_as_documented():
    opt, params = optim.add_noise(KEY, eta=0.3, gamma=0.55), params_()
    state = opt.init(params)
    for count in range(4):
        grads = grads_(count)
        updates, state = opt.update(grads, state, params)
        step_key = random.fold_in(KEY, count)
        for i, path in enumerate(sorted(SHAPES)):
            g, u = (tree.flatten_dict(t)[path] for t in (grads, updates))
            drawn = random.normal(random.fold_in(step_key, i), g.shape, torch.float64)
            close(u - g, math.sqrt(0.3 / (1 + count) ** 0.55) * drawn, rtol=1e-9)
    assert torch.equal(state.key, KEY) and state.key.dtype == torch.int64


def test_noise_has_the_variance_of_the_paper_and_is_never_the_same():
    opt = optim.add_noise(KEY, eta=0.5, gamma=1.0)
    params = {"a": torch.zeros(20_000).double(), "b": torch.zeros(20_000).double()}
    state, seen = opt.init(params), []
    for count in range(3):
        updates, state = opt.update(params, state, params)
        for u in tree.leaves(updates):
            assert abs(u.mean()) < 0.02
            close(u.var(), torch.tensor(0.5 / (1 + count)).double(), rtol=0.05)
            seen.append(u / u.std())
    apart = torch.corrcoef(torch.stack(seen)) - torch.eye(6)
    assert apart.abs().max() < 0.03


def test_noise_does_not_depend_on_how_a_dict_was_filled():
    opt, grads = optim.add_noise(KEY, 0.1), grads_()
    turned = dict(reversed(grads.items()))
    assert list(turned) != list(grads)
    assert tree.diff(once(opt, grads, params_()), once(opt, turned, dict(params_()))) == []
    other = once(optim.add_noise(random.key(6), 0.1), grads, params_())
    assert tree.diff(once(opt, grads, params_()), other) != []


def test_the_state_does_not_alias_the_key():
    key = KEY.clone()
    opt = optim.add_noise(key, 0.1)
    state = opt.init(params_())
    key.zero_()
    assert torch.equal(state.key, KEY)


# ------------------------------------------------------------------------------ params_ema


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_ema_equals_averaged_model(decay):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    module = module.double()
    sgd = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    params = tree.unflatten_dict(params)
    opt = optim.chain(optim.sgd(0.1, momentum=0.9), optim.params_ema(decay))
    state = opt.init(params)
    assert tree.diff(optim.slots(state)["ema"], params) == []
    x = draw(1, 8, 3)
    for _ in range(20):
        sgd.zero_grad()
        module(x).pow(2).mean().backward()
        flat = {name: p.grad.clone() for name, p in module.named_parameters()}
        sgd.step()
        average.update_parameters(module)
        updates, state = opt.update(tree.unflatten_dict(flat), state, params)
        params = optim.apply_updates(params, updates)
        for path, leaf in tree.flatten_dict(optim.slots(state)["ema"]).items():
            close(leaf, average.module.get_parameter(path).detach())
    far = tree.diff(params, optim.slots(state)["ema"], rtol=1e-3)
    assert bool(far) == (decay > 0)


def test_ema_passes_updates_and_follows_a_schedule():
    def decay(count):
        return (1 + count.double()) / (10 + count)

    opt, params = optim.params_ema(decay), params_()
    state, expected = opt.init(params), params
    for step in range(5):
        updates, state = opt.update(grads_(step), state, params)
        assert tree.diff(updates, grads_(step)) == []
        params = optim.apply_updates(params, updates)
        kept = (1 + step) / (10 + step) if step else 0.0
        expected = tree.map(lambda a, p, d=kept: d * a + (1 - d) * p, expected, params)
        close(state.slots["ema"], expected)


def test_ema_approaches_what_has_no_gradient_any_more():
    opt, params = optim.params_ema(0.5), {"w": torch.zeros(1).double()}
    state = opt.init(params)
    for g in (1.0, 1.0, None):
        updates = {"w": None if g is None else torch.ones(1).double()}
        _, state = opt.update(updates, state, params)
        params = optim.apply_updates(params, updates)
    close(state.slots["ema"]["w"], torch.tensor([1.75]).double())  # of 1, 2, 2


# ------------------------------------------------------------------------------ laws

INNER = optim.chain(optim.sgd(0.1, momentum=0.9), optim.params_ema(0.9))
TRANSFORMATIONS = {
    "clip": optim.clip(0.5),
    "adaptive_grad_clip": optim.adaptive_grad_clip(0.1),
    "centralize": optim.centralize(),
    "add_noise": optim.add_noise(KEY, 0.1),
    "params_ema": optim.params_ema(0.9),
    "lookahead": optim.lookahead(INNER, 2),
    "apply_if_finite": optim.apply_if_finite(INNER),
    "accumulate": optim.accumulate(INNER, 2),
    "loss_scale": optim.loss_scale(INNER, growth_interval=2),
    "reduce_on_plateau": optim.reduce_on_plateau(INNER, patience=1),
    "masked": optim.masked(INNER, "deep.*"),
    "freeze": optim.freeze(INNER, "vector"),
    "multi_transform": optim.multi_transform(
        {"a": INNER, "b": optim.adam()}, {"a": ["deep.*", "scalar"], "b": "vector"}
    ),
}
each = pytest.mark.parametrize("opt", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_form_and_dtypes_stay_and_nothing_is_mutated(opt, dtype):
    params = params_(dtype)
    state = first = opt.init(params)
    for step in range(3):
        grads, value = grads_(step, dtype), torch.tensor(1.0)
        with unchanged(params, grads, state, value):
            updates, new = opt.update(grads, state, params, value=value)
        for path, u in tree.flatten_dict(updates).items():
            p = tree.flatten_dict(params)[path]
            assert u is None or (u.dtype == dtype and u.shape == p.shape)
        params, state = optim.apply_updates(params, updates), new
        match(first, state, "same form")
        assert tree.diff(first, state, values=False) == []


@each
def test_everything_lies_on_the_device_of_the_parameters(opt):
    params, grads = (tree.to(t, "meta") for t in (params_(), grads_()))
    state = opt.init(params)
    updates, new = opt.update(grads, state, params, value=1.0)
    for leaf in tree.leaves((state, updates, new)):
        assert leaf is None or leaf.device.type == "meta"


@each
def test_none_leaves_the_leaf_with_its_slots_and_the_others_as_ever(opt):
    whole = part = (params_(), opt.init(params_()))
    for step in range(4):
        updates, state = opt.update(grads_(step), whole[1], whole[0], value=1.0)
        whole = optim.apply_updates(whole[0], updates), state
        grads = {**grads_(step), "scalar": None}
        updates, state = opt.update(grads, part[1], part[0], value=1.0)
        assert updates["scalar"] is None
        part = optim.apply_updates(part[0], updates), state
    began = tree.flatten_dict((params_(), opt.init(params_())))
    expected, got = tree.flatten_dict(whole), tree.flatten_dict(part)
    moved = tree.flatten_dict(tree.map(lambda x, y: bool((x != y).any()), whole, part))
    for path, leaf in got.items():
        assert equal_bits(leaf, (began if path.endswith("scalar") else expected)[path])
    assert moved["0.scalar"]


@pytest.mark.slow
@each
def test_one_program_serves_all_steps_and_equals_eager(opt, plain_backend, count_programs):
    def step(params, state, grads, value):
        updates, state = opt.update(grads, state, params, value=value)
        return tree.map(lambda p, u: p if u is None else p + u, params, updates), state

    jitted, graphs = fdl.jit(step), count_programs()
    eager = compiled = (params_(), opt.init(params_()))
    for i in range(5):
        grads, value = grads_(i), torch.tensor(1.0 + i)
        if i == 3:
            grads["vector"] = grads["vector"] * math.inf  # is skipped by some, and NaN in others
        eager = step(*eager, grads, value)
        compiled = jitted(*compiled, grads, value)
        assert tree.diff(eager, compiled, rtol=1e-10, atol=1e-14) == []
    assert graphs.count == 1


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: optim.clip(-1.0), ValueError, "clip: max_value must be finite and at least 0"),
        (
            lambda: optim.adaptive_grad_clip(-1.0),
            ValueError,
            "adaptive_grad_clip: clipping must be finite",
        ),
        (
            lambda: optim.adaptive_grad_clip(eps=math.nan),
            ValueError,
            "adaptive_grad_clip: eps .* got nan",
        ),
        (lambda: optim.add_noise(0, 0.1), TypeError, r"add_noise: `key` .* random\.key\(0\)"),
        (lambda: optim.add_noise(KEY, -0.1), ValueError, "add_noise: eta must be .* got -0.1"),
        (lambda: optim.add_noise(KEY, 0.1, -1), ValueError, "add_noise: gamma must be .* got -1"),
        (
            lambda: optim.params_ema(1.0),
            ValueError,
            r"params_ema: decay must be finite and in \[0, 1\), got 1",
        ),
    ],
)
def test_bad_arguments_raise_when_built(make, error, text):
    with pytest.raises(error, match=f"^{text}"):
        make()


@pytest.mark.parametrize(
    "name", ["add_noise", "params_ema", "adaptive_grad_clip", "accumulate", "loss_scale"]
)
def test_gradients_that_do_not_fit_raise(name):
    opt, params = TRANSFORMATIONS[name], params_()
    with pytest.raises(ValueError, match=rf"^{name}: grads: .*\n  vector: missing"):
        opt.update({"scalar": params["scalar"], "deep": params["deep"]}, opt.init(params), params)
    with pytest.raises(ValueError, match=rf"^{name}: gradients .*\n  vector: expected a floating"):
        opt.update({**params, "vector": torch.ones(2)}, opt.init(params), params)
    with pytest.raises(
        ValueError, match=r": parameters must be floating tensors.*\n  step: torch.i"
    ):
        opt.init({"step": torch.tensor(3)})
