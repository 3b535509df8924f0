"""Mixed precision: policies against a cast module, loss scaling against torch.amp.GradScaler."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

import fdl
from fdl import losses, nn, optim, random, tree
from fdl.nn import Policy, with_policy
from tests.support.asserts import close, draw, equal_bits

NET = nn.sequential(nn.linear(3, 8), nn.tanh, nn.linear(8, 2))
KEY = random.key(3)
X, Y = draw(0, 16, 3).float(), draw(1, 16, 2).float()
HALF = [torch.bfloat16, torch.float16]


def twin(params, dtype):
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    module.load_state_dict(tree.flatten_dict(params))
    return module.to(dtype)


# ------------------------------------------------------------------------------ policies


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_output_and_gradients_are_those_of_a_module_of_that_dtype(dtype):
    net = with_policy(NET, Policy(compute=dtype))
    params = net.init(KEY)
    assert tree.diff(params, NET.init(KEY)) == []
    module = twin(params, dtype)
    y = module(X.to(dtype))
    got = net.apply(params, X)
    assert got.dtype == torch.float32 and equal_bits(got, y.float())
    assert not torch.allclose(got, NET.apply(params, X), rtol=1e-5)
    losses.mse(y.float(), Y).backward()
    grads = grad(lambda p: losses.mse(net.apply(p, X), Y))(params)
    for path, g in tree.flatten_dict(grads).items():
        assert equal_bits(g, module.get_parameter(path).grad.float())


def test_every_dtype_of_the_policy_is_where_it_belongs():
    seen = []

    def spy(x):
        seen.append(x.dtype)
        return x

    policy = Policy(torch.float64, torch.float32, torch.float16)
    net = with_policy(nn.sequential(spy, nn.linear(3, 2), spy), policy)
    params = net.init(KEY)
    assert {leaf.dtype for leaf in tree.leaves(params)} == {torch.float64}
    y, grads = net.apply(params, X.bfloat16()), grad(lambda p: net.apply(p, X).sum())(params)
    assert seen == [torch.float32] * 4 and y.dtype == torch.float16
    assert {leaf.dtype for leaf in tree.leaves(grads)} == {torch.float64}


def test_integers_stay_and_mode_and_key_are_passed():
    def apply(params, x, *, train=False, key=None):
        assert x.dtype == torch.int64 and train and key is KEY
        return params["table"][x], x

    table = nn.Model(lambda key: {"table": draw(0, 5, 2), "n": torch.tensor(3)}, apply)
    net = with_policy(table)
    params = net.init(KEY)
    assert params["table"].dtype == torch.float32 and params["n"].dtype == torch.int64
    rows, x = net.apply(params, torch.tensor([1, 4]), train=True, key=KEY)
    assert rows.dtype == torch.float32 and x.dtype == torch.int64
    assert torch.equal(rows, params["table"].bfloat16().float()[[1, 4]])


def test_buffers_keep_their_precision():
    def apply(params, buffers, x, *, train=False, key=None):
        assert x.dtype == params["w"].dtype == torch.bfloat16
        mean = 0.9 * buffers["mean"] + 0.1 * x.mean(0)
        return (x - buffers["mean"].to(x.dtype)) @ params["w"], {
            "mean": mean.double(),
            "n": buffers["n"] + 1,
        }

    def init(key):
        buffers = {"mean": torch.zeros(3).double(), "n": torch.tensor(0)}
        return {"w": draw(1, 3, 2)}, buffers

    model = with_policy(nn.StatefulModel(init, apply))
    assert isinstance(model, nn.StatefulModel)
    opt = optim.sgd(0.1)
    state = fdl.TrainState.create(model, opt, key=KEY)
    assert state.buffers["mean"].dtype == torch.float32
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    new, _ = step(step(state, (X, Y))[0], (X, Y))
    assert tree.diff(state, new, values=False) == [] and new.buffers["n"] == 2
    close(new.buffers["mean"], 0.19 * X.mean(0), rtol=1e-2, atol=1e-3)


def test_a_module_with_batch_norm_computes_as_under_autocast():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
    )
    model, params, buffers = fdl.interop.from_module(module)
    x = draw(2, 6, 2, 9, 9).float()
    y, new = with_policy(model, Policy(compute=torch.bfloat16)).apply(
        params, buffers, x, train=True
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x).float()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(new["1"]["running_var"], module[1].running_var, rtol=1e-2, atol=1e-3)
    assert {leaf.dtype for leaf in tree.leaves(new)} == {torch.float32, torch.int64}
    assert (new["1"]["running_var"] - buffers["1"]["running_var"]).abs().min() > 1e-3


def test_parameters_and_slots_stay_in_32_bits_so_that_small_steps_add_up():
    scale = nn.Model(
        lambda key: {"w": torch.ones(1)},
        lambda params, x, *, train=False, key=None: params["w"] * x,
    )
    model, opt = with_policy(scale), optim.adam(1e-4)
    loss = fdl.supervised(model, lambda y, target: (y - target).sum())
    state = fdl.TrainState.create(model, opt, key=KEY)
    step = fdl.train_step(loss, opt)
    for _ in range(100):
        state, _ = step(state, (torch.ones(1), torch.zeros(1)))
    assert {s.dtype for s in tree.leaves(optim.slots(state.opt_state))} == {torch.float32}
    close(state.params["w"], torch.tensor([0.99]), rtol=1e-5)  # in bfloat16 1 − 1e-4 is 1


@pytest.mark.parametrize("model", [NET, with_policy(NET)], ids=["plain", "twice"])
def test_a_policy_works_under_vmap_and_jit(model, plain_backend):
    net = with_policy(model)
    members = torch.vmap(net.init)(random.split(KEY, 3))
    loss = fdl.supervised(net, losses.mse)

    def grads(params):
        return grad(lambda p: loss(p, (X, Y))[0])(params)

    together = fdl.jit(vmap(grads))(members)
    for member, got in zip(*map(tree.unstack, (members, together)), strict=True):
        assert tree.diff(grads(member), got, rtol=0.05, atol=1e-2) == []


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: with_policy(lambda x: x),
            "model must be a Model or a StatefulModel, got the function <lambda>",
        ),
        (lambda: with_policy(NET, Policy(compute="half")), "compute must be a .* got 'half'"),
        (lambda: with_policy(NET, Policy(param=torch.int8)), "param must be a .* got torch.int8"),
    ],
)
def test_what_is_no_policy_raises(make, text):
    with pytest.raises(TypeError, match=rf"^with_policy: {text}"):
        make()


# ------------------------------------------------------------------------------ loss_scale


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([1.0, 1.0, 1.0, math.inf, math.nan]), min_size=1, max_size=25),
    st.sampled_from([2.0**15, 1.0, 2.0**126, 3e38]),
    st.integers(1, 4),
    st.sampled_from([2.0, 1.5, 16.0]),
    st.sampled_from([0.5, 0.3]),
)
def test_every_transition_is_that_of_grad_scaler(factors, init, interval, growth, backoff):
    w = torch.ones(2, requires_grad=True)
    sgd = torch.optim.SGD([w], 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init, growth, backoff, interval)
    opt = optim.loss_scale(optim.sgd(0.1, momentum=0.9), init, interval, growth, backoff)
    params = {"w": torch.ones(2)}
    state = opt.init(params)
    for factor in factors:
        scale = optim.loss_scale_of(state)
        scaler.scale(1e-30 * w.sin().sum()).backward()
        w.grad[0] *= factor
        g = grad(lambda p, s=scale: 1e-30 * p["w"].sin().sum() * s)(params)["w"]
        g = g * torch.tensor([factor, 1.0])
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
        updates, state = opt.update({"w": g}, state, params)
        assert bool(updates["w"].any()) == math.isfinite(factor)
        params = optim.apply_updates(params, updates)
        close(params["w"], w.detach(), rtol=1e-6)
        assert equal_bits(optim.loss_scale_of(state), scaler._scale)
        assert state.good == scaler._growth_tracker
        close(optim.slots(state)["momentum_buffer"]["w"], momentum(sgd, w), rtol=1e-5, atol=0.0)


def momentum(sgd, w):
    return sgd.state[w].get("momentum_buffer", torch.zeros(2))


@pytest.mark.parametrize("inner", [optim.sgd(0.3, momentum=0.9), optim.adam(0.1)])
def test_a_scaled_run_is_the_plain_run(inner):
    """Powers of two are exact, so it is to the last bit; value and metrics are not scaled."""
    runs = []
    for opt in (inner, optim.loss_scale(inner, growth_interval=2)):
        plateau = optim.reduce_on_plateau(opt, patience=0, factor=0.5)
        step = fdl.train_step(fdl.supervised(NET, losses.mse), plateau)
        state, found = fdl.TrainState.create(NET, plateau, key=KEY), []
        for _ in range(8):
            state, metrics = step(state, (X, Y))
            found.append(metrics["loss"].value)
        runs.append((state.params, found, state.opt_state.best))
    assert optim.loss_scale_of(state.opt_state) == 2.0**19
    assert tree.diff(*runs) == [] and found[-1] < found[0]


def test_a_scale_goes_with_another_way_to_differentiate():
    found = []
    for opt in (optim.sgd(0.1), optim.loss_scale(optim.sgd(0.1), init=2.0**10)):
        loss = fdl.supervised(NET, losses.mse)
        step = fdl.train_step(loss, opt, optim.sam(0.05))
        state, metrics = step(fdl.TrainState.create(NET, opt, key=KEY), (X, Y))
        found.append((state.params, metrics))
    assert tree.diff(*found, rtol=1e-5, atol=1e-7) == []


FLOAT16 = with_policy(NET, Policy(compute=torch.float16))
TINY = fdl.supervised(FLOAT16, lambda y, target: 1e-7 * losses.mse(y, target))


def test_gradients_that_underflow_survive_with_a_scale():
    remember = optim.sgd(1.0, momentum=0.9)  # its first momentum is the gradient
    found = {}
    for scaled, opt in {False: remember, True: optim.loss_scale(remember, init=2.0**20)}.items():
        state = fdl.TrainState.create(FLOAT16, opt, key=KEY)
        new, _ = fdl.train_step(TINY, opt)(state, (X, Y))
        found[scaled] = tree.flatten_dict(optim.slots(new.opt_state)["momentum_buffer"])
    exact = grad(lambda p: 1e-7 * losses.mse(NET.apply(p, X.double()), Y.double()))(
        tree.cast(state.params, torch.float64)
    )
    for path, g in tree.flatten_dict(exact).items():
        assert (found[False][path] == 0).double().mean() > 0.5
        assert (found[True][path] - g).norm() < 0.01 * g.norm()
        assert found[True][path].dtype == torch.float32


@pytest.mark.slow
def test_an_overflow_halves_the_scale_and_changes_nothing_else(plain_backend, count_programs):
    opt = optim.loss_scale(optim.adam(0.01), init=2.0**46, growth_interval=1000)
    jitted, graphs = fdl.jit(fdl.train_step(TINY, opt)), count_programs()
    state = fdl.TrainState.create(FLOAT16, opt, key=KEY)
    overflows = 0
    for _ in range(25):
        new, metrics = jitted(state, (X, Y))
        assert torch.isfinite(metrics["loss"].value)
        if new.opt_state.scale < state.opt_state.scale:
            overflows += 1
            assert new.opt_state.scale == state.opt_state.scale / 2
            assert tree.diff(new.params, state.params) == []
            assert all(map(equal_bits, *map(tree.leaves, (new.params, state.params))))
            assert tree.diff(new.opt_state.inner, state.opt_state.inner) == []
        else:
            assert all(tree.diff(new.params[i], state.params[i]) for i in "02")
        state = new
    assert 2 < overflows < 20 and state.opt_state.good == 25 - overflows
    assert state.opt_state.inner[0].hyper.count == 25 - overflows and graphs.count == 1


def test_a_float16_value_and_scalar_are_scaled_without_overflow():
    opt = optim.loss_scale(optim.sgd(1.0), init=2.0**17)  # more than float16 holds
    params = {"w": torch.tensor(1.0, dtype=torch.float16)}
    updates, _ = opt.update({"w": torch.tensor(4096.0).half()}, opt.init(params), params)
    assert updates["w"].dtype == torch.float16 and updates["w"] == -(2.0**-5)
    model = nn.Model(
        lambda key: {"w": torch.ones(2).half()},
        lambda params, x, *, train=False, key=None: params["w"] * x,
    )
    step = fdl.train_step(fdl.supervised(model, lambda y, t: (y - t).sum() * 2**-14), opt)
    state = fdl.TrainState.create(model, opt, key=KEY)
    new, _ = step(state, (torch.ones(2).half(), torch.zeros(2).half()))
    assert torch.equal(new.params["w"], state.params["w"] - 2**-14)


def test_each_member_of_a_population_has_its_own_scale():
    opt = optim.loss_scale(optim.sgd(1.0), init=2.0**17)
    params = {"w": torch.zeros(1).half()}
    states = tree.stack([opt.init(params)] * 2)
    g = {"w": torch.tensor([[4096.0], [torch.inf]]).half()}
    updates, states = vmap(lambda g, s: opt.update(g, s, params))(g, states)
    assert updates["w"].tolist() == [[-(2.0**-5)], [0.0]]
    assert states.scale.tolist() == [2.0**17, 2.0**16]


# ------------------------------------------------------------------------------ where it may stand

SCALED = optim.loss_scale(optim.sgd(0.1))
PARAMS = NET.init(KEY)


@pytest.mark.parametrize(
    "opt",
    [
        optim.chain(SCALED, optim.params_ema(0.9)),
        optim.accumulate(optim.lookahead(SCALED), 2),
        optim.reduce_on_plateau(SCALED),
        optim.loss_scale(optim.apply_if_finite(optim.freeze(optim.sgd(), "0.*"))),
    ],
)
def test_the_scale_is_found(opt):
    assert optim.loss_scale_of(opt.init(PARAMS)) == 2.0**15


@pytest.mark.parametrize(
    ("opt", "text"),
    [
        (optim.chain(optim.clip(1.0), SCALED), "loss_scale: at '1' of the state it does not see"),
        (optim.freeze(SCALED, "0.*"), "loss_scale: at 'trained' of the state it does not see"),
        (optim.apply_if_finite(SCALED), "apply_if_finite: the loss_scale inside never sees"),
        (optim.loss_scale(SCALED), "loss_scale: there is a loss_scale inside already"),
    ],
)
def test_a_scale_in_the_wrong_place_raises(opt, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        step = fdl.train_step(fdl.supervised(NET, losses.mse), opt)
        step(fdl.TrainState.create(NET, opt, key=KEY), (X, Y))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init": 0.0}, r"init must be above 0 and below 3.4e\+38, got 0.0"),
        ({"init": math.inf}, "init must be .* got inf"),
        ({"growth_interval": 0}, "growth_interval must be an int of at least 1, got 0"),
        ({"growth_factor": 1.0}, "growth_factor must be above 1 .* got 1.0"),
        ({"backoff_factor": 1.0}, "backoff_factor must be above 0 and below 1, got 1.0"),
        ({"backoff_factor": None}, "backoff_factor must be .* got None"),
    ],
)
def test_bad_arguments_raise_when_built(options, text):
    with pytest.raises(ValueError, match=f"^loss_scale: {text}"):
        optim.loss_scale(optim.sgd(), **options)
    with pytest.raises(TypeError, match=r"^loss_scale: opt must be an optimizer .* got a NoneType"):
        optim.loss_scale(None)
