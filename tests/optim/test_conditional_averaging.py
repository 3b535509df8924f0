"""accumulate, lookahead and apply_if_finite: the full batch, optax, plain loops, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad_and_value, vmap

import fdl
from fdl import losses, nn, optim, random, tree
from tests.support.asserts import close, draw, equal_bits, unchanged
from tests.support.jax import x64

NET = nn.sequential(nn.linear(3, 4), nn.tanh, nn.linear(4, 2))
PARAMS = tree.cast(NET.init(random.key(0)), torch.float64)
X, Y = draw(0, 60, 3), draw(1, 60, 2)


def loss(params, x, y):
    return losses.mse(NET.apply(params, x), y)


def train(opt, batches, params=PARAMS):
    """Every parameter on the way, the last state, every value."""
    state, path, values = opt.init(params), [], []
    for batch in batches:
        grads, value = grad_and_value(loss)(params, *batch)
        updates, state = opt.update(grads, state, params, value=value)
        params = optim.apply_updates(params, updates)
        path.append(params)
        values.append(value)
    return path, state, values


def cut(size):
    return list(zip(X.split(size), Y.split(size), strict=True))


INNER = {
    "sgd": optim.sgd(0.3, momentum=0.9, weight_decay=0.01),
    "adam": optim.adam(0.05),
    "clipped": optim.chain(
        optim.clip_by_global_norm(0.1), optim.adamw(0.05), optim.params_ema(0.9)
    ),
}
each_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)

# ------------------------------------------------------------------------------ accumulate


@each_inner
@pytest.mark.parametrize("k", [1, 2, 5])
def test_micro_batches_make_the_step_of_the_whole_batch(inner, k):
    expected, state, _ = train(inner, cut(10))
    got, outer, _ = train(optim.accumulate(inner, k), cut(10 // k))
    assert len(got) == k * len(expected) == 6 * k
    before = PARAMS
    for i, params in enumerate(got):
        if (i + 1) % k:
            assert tree.diff(params, before) == []
        else:
            close(params, expected[i // k])
            assert len(tree.diff(params, before)) == 4
        before = params
    close(outer.inner, state)
    assert outer.gathered == 0 and not any(leaf.any() for leaf in tree.leaves(outer.mean))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 11), st.integers(0, 99))
def test_any_number_of_gradients_leaves_the_rest_for_later(k, steps, seed):
    opt, params = optim.accumulate(optim.sgd(0.1, momentum=0.9), k), {"w": draw(seed, 3)}
    state, gathered, w, m = opt.init(params), [], params["w"], 0
    for step in range(steps):
        gathered.append(draw(seed + 1 + step, 3))
        updates, state = opt.update({"w": gathered[-1]}, state, params)
        params = optim.apply_updates(params, updates)
        if len(gathered) == k:
            m = 0.9 * m + torch.stack(gathered).mean(0)
            w, gathered = w - 0.1 * m, []
        close(params["w"], w)
    assert state.gathered == len(gathered)
    close(state.mean["w"], sum(gathered, torch.zeros(3).double()) / k)


@pytest.mark.slow
def test_accumulate_equals_multi_steps_of_optax():
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    opt, params = optim.accumulate(optim.adam(0.1), 3), {"w": draw(0, 4)}
    state = opt.init(params)
    with x64():
        theirs = optax.MultiSteps(optax.adam(0.1), 3, accumulator_dtype="float64")
        their_params = {"w": jax.numpy.asarray(params["w"].numpy())}
        their_state = theirs.init(their_params)
        for step in range(10):
            g = {"w": draw(step + 1, 4)}
            updates, state = opt.update(g, state, params)
            params = optim.apply_updates(params, updates)
            their_g = {"w": jax.numpy.asarray(g["w"].numpy())}
            their_updates, their_state = theirs.update(their_g, their_state, their_params)
            their_params = optax.apply_updates(their_params, their_updates)
            np.testing.assert_allclose(params["w"], their_params["w"], rtol=1e-12)


def seen():
    """An optimizer that remembers the value and has no use for it."""
    return optim.Optimizer(
        lambda params: {"value": torch.zeros(()).double(), "asked": torch.tensor(False)},
        lambda grads, state, params, *, value=None, value_fn=None: (
            grads,
            {
                "value": torch.zeros(()).double() if value is None else value,
                "asked": torch.tensor(value_fn is not None),
            },
        ),
    )


def test_accumulate_gives_the_mean_value_and_no_function():
    opt = optim.accumulate(seen(), 3)
    state = opt.init(PARAMS)
    for value, expected in zip([1.0, 2.0, 6.0, 5.0, 5.0, 8.0], [0, 0, 3, 3, 3, 6], strict=True):
        given = torch.tensor(value, dtype=torch.float32)
        _, state = opt.update(PARAMS, state, PARAMS, value=given, value_fn=lambda p: 0)
        assert state.inner["value"] == expected and not state.inner["asked"]
    _, state = opt.update(PARAMS, state, PARAMS)
    assert state.value == 0


def test_accumulated_bfloat16_gradients_are_summed_in_float32():
    opt = optim.accumulate(optim.sgd(1.0), 512)
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    state, g = opt.init(params), {"w": torch.ones(1, dtype=torch.bfloat16)}
    assert state.mean["w"].dtype == torch.float32
    for _ in range(512):
        updates, state = opt.update(g, state, params)
    assert updates["w"] == -1 and updates["w"].dtype == torch.bfloat16


# ------------------------------------------------------------------------------ lookahead


@each_inner
@pytest.mark.parametrize(("period", "slow_step"), [(1, 0.5), (2, 0.8), (3, 0.5), (6, 0.0)])
def test_lookahead_equals_a_loop(inner, period, slow_step):
    """Two loops as in the paper: the inner one is the plain optimizer."""
    got, state, _ = train(optim.lookahead(inner, period, slow_step), cut(5))
    slow, params, inner_state = PARAMS, PARAMS, inner.init(PARAMS)
    for i, batch in enumerate(cut(5)):
        updates, inner_state = inner.update(
            grad_and_value(loss)(params, *batch)[0], inner_state, params
        )
        params = optim.apply_updates(params, updates)
        if i % period == period - 1:
            slow = tree.map(lambda s, p: (1 - slow_step) * s + slow_step * p, slow, params)
            params = slow
        close(got[i], params)
    close(state.own.slots["slow"], slow)
    close(state.inner, inner_state)
    moved = not tree.allclose(slow, PARAMS, rtol=1e-2)
    assert moved == (slow_step > 0) and 12 % period == 0


def test_lookahead_equals_optax():
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    opt, params = optim.lookahead(optim.sgd(0.1, momentum=0.9), 3, 0.4), {"w": draw(0, 4)}
    state = opt.init(params)
    with x64():
        theirs = optax.lookahead(optax.sgd(0.1, momentum=0.9), 3, 0.4)
        both = optax.LookaheadParams.init_synced({"w": jax.numpy.asarray(params["w"].numpy())})
        their_state = theirs.init(both)
        for step in range(10):
            g = {"w": params["w"].sin() + draw(step + 1, 4)}
            updates, state = opt.update(g, state, params)
            params = optim.apply_updates(params, updates)
            their_g = {"w": jax.numpy.asarray(g["w"].numpy())}
            their_updates, their_state = theirs.update(their_g, their_state, both)
            both = optax.apply_updates(both, their_updates)
            np.testing.assert_allclose(params["w"], both.fast["w"], rtol=1e-12)
            np.testing.assert_allclose(optim.slots(state)["slow"]["w"], both.slow["w"], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_parameters_become_the_slow_ones_to_the_last_bit(dtype):
    opt = optim.lookahead(optim.sgd(0.3), 2, 0.3)
    got, state, _ = train(
        opt, [(x.to(dtype), y.to(dtype)) for x, y in cut(10)], tree.cast(PARAMS, dtype)
    )
    slow = optim.slots(state)["slow"]
    for p, s in zip(*map(tree.leaves, (got[-1], slow)), strict=True):
        assert s.dtype == torch.float32  # more than the parameters hold if these have 16 bits
        if dtype == torch.float32:
            assert equal_bits(p, s)
        else:  # two roundings: of the update, and of the sum
            assert (p - s).abs().max() <= 2**-7 * s.abs().max()


def test_the_slow_step_is_a_hyperparameter():
    opt = optim.lookahead(optim.sgd(0.1), 2, slow_step=0.5)
    state = opt.init(PARAMS)
    assert set(optim.hyperparams(state)) == {"slow_step", "lr"}
    rates = torch.tensor([0.2, 0.9]).double()

    def member(rate):
        params, state = PARAMS, optim.with_hyperparams(opt.init(PARAMS), slow_step=rate)
        for batch in cut(30):
            updates, state = opt.update(grad_and_value(loss)(params, *batch)[0], state, params)
            params = optim.apply_updates(params, updates)
        return params

    for rate, params in zip(rates.tolist(), tree.unstack(vmap(member)(rates)), strict=True):
        close(params, train(optim.lookahead(optim.sgd(0.1), 2, rate), cut(30))[0][-1])


# ------------------------------------------------------------------------------ apply_if_finite


@each_inner
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["0.bias", "2.weight", "value"])
def test_a_bad_step_is_as_if_it_had_not_been(inner, bad, where):
    opt = optim.apply_if_finite(inner)
    params, state = PARAMS, opt.init(PARAMS)
    plain, plain_state = PARAMS, inner.init(PARAMS)
    for i, batch in enumerate(cut(10)):
        grads, value = grad_and_value(loss)(params, *batch)
        if i in (0, 3, 4):
            flat = tree.flatten_dict(grads)
            if where == "value":
                value = value * bad
            else:
                flat[where] = flat[where].clone()
                flat[where][-1] = bad
            with unchanged(params, state):
                updates, new = opt.update(tree.unflatten_dict(flat), state, params, value=value)
            assert not any(u.any() for u in tree.leaves(updates))
            assert tree.diff(new.inner, state.inner) == [] and new.skipped == state.skipped + 1
            state = new
            continue
        updates, state = opt.update(grads, state, params, value=value)
        params = optim.apply_updates(params, updates)
        updates, plain_state = inner.update(grads, plain_state, plain, value=value)
        plain = optim.apply_updates(plain, updates)
        close(params, plain)
    close(state.inner, plain_state)
    assert state.skipped == 3 and state.skipped.dtype == torch.int64


def test_the_derivative_of_a_run_with_a_bad_step_is_that_of_the_others():
    def final(lr, bad):
        opt = optim.apply_if_finite(optim.adam(lr))
        params, state = {"w": torch.ones(2).double()}, opt.init({"w": torch.ones(2).double()})
        for g in (1.0, bad, 3.0):
            w = params["w"].sin() if math.isfinite(g) else torch.ones(2).double()
            updates, state = opt.update({"w": g * w}, state, params)
            params = optim.apply_updates(params, updates)
        return params["w"].sum()

    lr = torch.tensor(0.1).double()
    slope = torch.func.grad(final)(lr, math.inf)
    assert torch.isfinite(slope)
    h = 1e-6
    close(slope, (final(lr + h, math.nan) - final(lr - h, math.nan)) / (2 * h), rtol=1e-7)


def test_each_member_of_a_population_skips_for_itself():
    opt = optim.apply_if_finite(optim.sgd(1.0))

    def member(g):
        return opt.update({"w": g}, opt.init({"w": g}), {"w": torch.zeros(2)})

    updates, state = vmap(member)(torch.tensor([[1.0, 2.0], [1.0, torch.inf]]))
    assert torch.equal(updates["w"], torch.tensor([[-1.0, -2.0], [0.0, 0.0]]))
    assert state.skipped.tolist() == [0, 1]


# ------------------------------------------------------------------------------ together, errors


def test_wrappers_stack_and_train_as_one_scan(plain_backend):
    inner = optim.accumulate(optim.apply_if_finite(optim.lookahead(optim.sgd(0.05), 2)), 3)
    model, opt = nn.linear(3, 2), optim.reduce_on_plateau(inner, patience=1)
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    params = tree.cast(model.init(random.key(0)), torch.float64)
    state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
    batches = (X.view(6, 10, 3), Y.view(6, 10, 2))
    scanned, _ = fdl.jit(lambda s, b: fdl.scan(step, s, b))(state, batches)
    for batch in cut(10):
        state, _ = step(state, batch)
    close(scanned, state)
    assert scanned.opt_state.inner.inner.inner.own.hyper.count == 2


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: optim.accumulate(optim.sgd, 2),
            TypeError,
            r"accumulate: opt must be an optimizer .*, got the function sgd; call it: sgd\(...\)",
        ),
        (
            lambda: optim.lookahead(None),
            TypeError,
            "lookahead: opt must be an optimizer .* got a NoneType",
        ),
        (lambda: optim.apply_if_finite(1), TypeError, "apply_if_finite: opt must be .* got an int"),
        (lambda: optim.accumulate(optim.sgd(), 0), ValueError, "accumulate: k .* least 1, got 0"),
        (lambda: optim.accumulate(optim.sgd(), 2.0), ValueError, "accumulate: k must .* got 2.0"),
        (lambda: optim.lookahead(optim.sgd(), 0), ValueError, "lookahead: sync_period .* got 0"),
        (
            lambda: optim.lookahead(optim.sgd(), 2, 1.5),
            ValueError,
            r"lookahead: slow_step must be finite and in \[0, 1\], got 1.5",
        ),
    ],
)
def test_bad_arguments_raise_when_built(make, error, text):
    with pytest.raises(error, match=f"^{text}"):
        make()


@pytest.mark.parametrize("name", ["accumulate", "apply_if_finite"])
def test_a_value_with_axes_raises(name):
    opt = {"accumulate": optim.accumulate(optim.sgd(), 2)}.get(
        name, optim.apply_if_finite(optim.sgd())
    )
    with pytest.raises(ValueError, match=rf"^{name}: value must be a scalar, got \[3\]"):
        opt.update(PARAMS, opt.init(PARAMS), PARAMS, value=torch.ones(3))
