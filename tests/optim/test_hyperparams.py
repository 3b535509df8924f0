"""Hyperparameters in the optimizer state: read, set, batched, differentiated; bad ones refused."""

import math

import pytest
import torch
import torch.utils._pytree as pytree
from torch import tensor

from fdl import optim, random, tree
from fdl.optim import schedules
from fdl.optim._hyperparams import Hyper
from tests.support.asserts import close, draw, unchanged

X, Y = draw(0, 8, 3), draw(1, 8)
PARAMS = {"w": draw(2, 3), "b": draw(3).reshape(())}


def loss(params):
    return ((X @ params["w"] + params["b"] - Y) ** 2).mean()


def train(opt, state, steps=5):
    params = PARAMS
    for _ in range(steps):
        updates, state = opt.update(torch.func.grad(loss)(params), state, params)
        params = optim.apply_updates(params, updates)
    return params


# ------------------------------------------------------------------------------ read and set


def test_hyperparams_are_float64_scalars_by_name():
    state = optim.sgd(0.1, 0.9, 0.3, 0.01).init(tree.cast(PARAMS, torch.float32))
    found = optim.hyperparams(state)
    assert {name: value.item() for name, value in found.items()} == {
        "weight_decay": 0.01,
        "momentum": 0.9,
        "dampening": 0.3,
        "lr": 0.1,
    }
    assert all(v.dtype == torch.float64 and v.shape == () for v in found.values())
    assert list(optim.hyperparams(optim.sgd(0.1).init(PARAMS))) == ["lr"]


@pytest.mark.parametrize("value", [0.05, torch.tensor(0.05, dtype=torch.float64)], ids=type)
def test_setting_a_rate_equals_building_with_it(value):
    opt = optim.sgd(0.1, 0.9)
    state = opt.init(PARAMS)
    with unchanged(state):
        new = optim.with_hyperparams(state, lr=value, momentum=0.5)
    assert pytree.tree_structure(new) == pytree.tree_structure(state)
    assert tree.diff(state, new, values=False) == []
    close(train(opt, new), train(optim.sgd(0.05, 0.5), optim.sgd(0.05, 0.5).init(PARAMS)))
    assert optim.hyperparams(state)["lr"] == 0.1


def test_a_float32_tensor_is_cast_to_the_dtype_of_the_state():
    state = optim.with_hyperparams(optim.sgd(0.1).init(PARAMS), lr=torch.tensor(0.5))
    assert optim.hyperparams(state)["lr"].dtype == torch.float64


def test_names_that_occur_twice_get_their_path():
    opt = optim.chain(optim.sgd(0.1, 0.9), optim.sgd(0.2))
    state = opt.init(PARAMS)
    found = optim.hyperparams(state)
    assert {name: v.item() for name, v in found.items()} == {
        "momentum": 0.9,
        "0.1.lr": 0.1,
        "1.0.lr": 0.2,
    }
    new = optim.with_hyperparams({"inner": [state]}, **{"inner.0.1.0.lr": 0.3})["inner"][0]
    assert {name: v.item() for name, v in optim.hyperparams(new).items()} == {
        "momentum": 0.9,
        "0.1.lr": 0.1,
        "1.0.lr": 0.3,
    }


@pytest.mark.parametrize("give", ["sgd", "with_hyperparams"])
def test_the_state_does_not_alias_the_tensor_of_the_caller(give):
    lr = torch.tensor(0.1, dtype=torch.float64)
    if give == "sgd":
        state = optim.sgd(lr).init(PARAMS)
    else:
        state = optim.with_hyperparams(optim.sgd(0.5).init(PARAMS), lr=lr)
    lr.fill_(7.0)
    assert optim.hyperparams(state)["lr"] == 0.1


def test_what_is_read_is_a_copy():
    for opt in (optim.sgd(0.1), optim.sgd(optim.schedules.constant(0.1))):
        state = opt.init(PARAMS)
        optim.hyperparams(state)["lr"].mul_(0.5)
        assert optim.hyperparams(state)["lr"] == 0.1
    state = optim.loss_scale(optim.sgd(0.1)).init(PARAMS)
    optim.loss_scale_of(state).zero_()
    assert optim.loss_scale_of(state) == 2.0**15


# ------------------------------------------------------------------------------ another schedule


def halving(value):
    return lambda count: value * 0.5**count


HALF, DOUBLE = halving(0.25), lambda count: 0.001 * 2.0**count

# Every place that takes a schedule, as a function of it.
SCHEDULED = {
    "sgd lr": lambda s: optim.sgd(s, 0.9),
    "sgd momentum": lambda s: optim.sgd(0.1, s, 0.5),
    "sgd dampening": lambda s: optim.sgd(0.1, 0.9, s),
    "sgd weight_decay": lambda s: optim.sgd(0.1, weight_decay=s),
    "adam betas": lambda s: optim.adam(0.1, (s, s)),
    "adamw eps": lambda s: optim.adamw(0.1, eps=s, weight_decay=s),
    "nadam momentum_decay": lambda s: optim.nadam(s, momentum_decay=s),
    "adagrad": lambda s: optim.adagrad(s, s),
    "adadelta": lambda s: optim.adadelta(rho=s),
    "rmsprop": lambda s: optim.rmsprop(s, s, momentum=s, centered=True),
    "adafactor": lambda s: optim.adafactor(s, weight_decay=s),
    "lion": lambda s: optim.lion(s, (s, s), s),
    "lars": lambda s: optim.lars(s, s, s, s),
    "adan": lambda s: optim.adan(s, (s, s, s)),
    "clip": lambda s: optim.chain(optim.clip(s), optim.sgd(0.1)),
    "clip_by_global_norm": lambda s: optim.chain(optim.clip_by_global_norm(s), optim.sgd(0.1)),
    "adaptive_grad_clip": lambda s: optim.chain(optim.adaptive_grad_clip(s), optim.sgd(0.1)),
    "add_noise": lambda s: optim.chain(optim.add_noise(random.key(0), s), optim.sgd(0.1)),
    "params_ema": lambda s: optim.chain(optim.sgd(0.1), optim.params_ema(s)),
    "lookahead": lambda s: optim.lookahead(optim.sgd(s), 1, s),
    "schedule_free": lambda s: optim.schedule_free_adamw(s, weight_decay=s),
    "schedule_free beta": lambda s: optim.schedule_free(0.1, beta=s),
    "accumulate": lambda s: optim.accumulate(optim.sgd(s), 1),
    "apply_if_finite": lambda s: optim.apply_if_finite(optim.sgd(s)),
    "loss_scale": lambda s: optim.loss_scale(optim.sgd(s), init=1.0),
    "masked": lambda s: optim.masked(optim.sgd(s), "w"),
    "multi_transform": lambda s: optim.multi_transform(
        {"a": optim.sgd(s), "b": optim.adam(s)}, {"a": "w", "b": "b"}
    ),
    "plateau": lambda s: optim.chain(optim.sgd(0.1), optim.params_ema(s)),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_state_met_by_another_schedule_follows_it_at_once(name):
    """As if each update had been given its rates as numbers, wherever the state comes from."""
    make, grads = SCHEDULED[name], tree.map(torch.cos, PARAMS)
    state = make(HALF).init(PARAMS)
    for _ in range(3):
        _, state = make(HALF).update(grads, state, PARAMS, value=1.0)
    got = make(DOUBLE).update(grads, state, PARAMS, value=1.0)
    at_three = DOUBLE(torch.tensor(3.0).double())
    whole = make(DOUBLE)
    close(got, whole.update(grads, retold(state, at_three), PARAMS, value=1.0))
    alone = make(lambda count: at_three)
    close(got[0], alone.update(grads, state, PARAMS, value=1.0)[0])
    close(optim.slots(got[1]), optim.slots(alone.update(grads, state, PARAMS, value=1.0)[1]))
    assert tree.diff(make(HALF).update(grads, state, PARAMS, value=1.0), got)
    driven = [v for n, v in optim.hyperparams(got[1]).items() if v == DOUBLE(4.0)]
    assert driven  # what it reports from then on


def retold(state, value):
    """The state as it would be, had the new schedule been there before."""
    nodes, spec = pytree.tree_flatten(state, is_leaf=lambda node: isinstance(node, Hyper))
    return pytree.tree_unflatten(
        [
            node._replace(scheduled=dict.fromkeys(node.scheduled, value))
            if isinstance(node, Hyper)
            else node
            for node in nodes
        ],
        spec,
    )


def test_a_longer_horizon_counts_at_once():
    short, long = (optim.schedules.warmup_cosine(0.1 * p, 10, t) for p, t in ((1, 100), (0.1, 100)))
    state = optim.sgd(short).init(PARAMS)
    for _ in range(50):
        _, state = optim.sgd(short).update(PARAMS, state, PARAMS)
    updates, _ = optim.sgd(long).update({"w": torch.ones(3), "b": torch.ones(())}, state, PARAMS)
    cosine = 0.01 * (1 + math.cos(math.pi * 40 / 90)) / 2  # 0.00587
    close(-updates["w"][0], torch.tensor(cosine, dtype=torch.float64))


def test_a_number_stays_that_of_the_state_and_may_take_the_place_of_a_schedule():
    state = optim.sgd(0.1).init(PARAMS)
    close(optim.sgd(0.7).update(PARAMS, state, PARAMS)[0]["w"], -0.1 * PARAMS["w"])
    state = optim.sgd(HALF).init(PARAMS)
    updates, state = optim.sgd(0.7).update(PARAMS, state, PARAMS)
    close(updates["w"], -0.7 * PARAMS["w"])
    assert optim.hyperparams(state)["lr"] == 0.7
    state = optim.with_hyperparams(state, lr=0.2)
    updates, state = optim.sgd(HALF).update(PARAMS, state, PARAMS)
    close(updates["w"], -HALF(1) * PARAMS["w"])
    assert {n: v.item() for n, v in optim.hyperparams(state).items()} == {"lr": HALF(2)}


def test_members_of_a_population_follow_the_schedule_at_their_own_counts():
    opt = optim.sgd(HALF)
    first = opt.init(PARAMS)
    _, second = opt.update(PARAMS, first, PARAMS)
    updates, _ = torch.vmap(lambda s: opt.update(PARAMS, s, PARAMS))(tree.stack([first, second]))
    close(updates["w"], torch.stack([-0.25 * PARAMS["w"], -0.125 * PARAMS["w"]]))


def test_derivative_by_what_a_schedule_is_made_with_goes_through_every_update():
    def final(value):
        opt = optim.sgd(optim.schedules.exponential(value, 0.5))
        return loss(train(opt, optim.sgd(HALF).init(PARAMS)))

    at, h = torch.tensor(0.05, dtype=torch.float64), 1e-6
    close(torch.func.grad(final)(at), (final(at + h) - final(at - h)) / (2 * h), rtol=1e-7)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lrate": 0.1}, r"'lrate' is not in this state; can be set: \['momentum'\]"),
        ({"dampening": 0.1}, r"'dampening' is not in this state; can be set: \['momentum'\]"),
        ({"lr": 0.1}, r"'lr' follows a schedule; can be set: \['momentum'\]"),
        ({"momentum": math.inf}, "momentum must be finite"),
        ({"momentum": torch.tensor(-0.5)}, "momentum must be finite and at least 0, got -0.5"),
        ({"momentum": torch.ones(2)}, r"'momentum' has the shape \[\], got \[2\]; for a popul"),
    ],
    ids=["unknown", "left-out", "scheduled", "infinite", "tensor", "shape"],
)
def test_what_cannot_be_set_raises(values, text):
    state = optim.sgd(optim.schedules.constant(0.1), 0.9).init(PARAMS)
    with pytest.raises(ValueError, match=f"^with_hyperparams: {text}"):
        optim.with_hyperparams(state, **values)


# ------------------------------------------------------------------------------ transformations


def test_vmap_over_learning_rates_equals_separate_runs():
    opt = optim.sgd(0.1, 0.9, weight_decay=0.01)
    rates = torch.tensor([0.01, 0.05, 0.1], dtype=torch.float64)

    def member(lr):
        return train(opt, optim.with_hyperparams(opt.init(PARAMS), lr=lr))

    together = tree.unstack(torch.vmap(member)(rates))
    for lr, params in zip(rates.tolist(), together, strict=True):
        alone = optim.sgd(lr, 0.9, weight_decay=0.01)
        close(params, train(alone, alone.init(PARAMS)))
    # Stacked states go through vmap as they are.
    states = tree.stack([optim.with_hyperparams(opt.init(PARAMS), lr=lr) for lr in rates])
    close(tree.unstack(torch.vmap(lambda s: train(opt, s))(states)), together)


@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy-ball", "nesterov"])
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_derivative_with_respect_to_a_rate(name, nesterov):
    rates = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}

    def final(value):
        opt = optim.sgd(**{**rates, name: value}, nesterov=nesterov)
        return loss(train(opt, opt.init(PARAMS)))

    def final_by_state(value):
        opt = optim.sgd(**rates, nesterov=nesterov)
        return loss(train(opt, optim.with_hyperparams(opt.init(PARAMS), **{name: value})))

    at, h = torch.tensor(rates[name], dtype=torch.float64), 1e-6
    slope = (final(at + h) - final(at - h)) / (2 * h)
    assert slope.abs() > 1e-3
    close(torch.func.grad(final)(at), slope, rtol=1e-7)
    close(torch.func.grad(final_by_state)(at), slope, rtol=1e-7)


def test_derivative_with_respect_to_the_clipping_norm():
    def final(max_norm):
        opt = optim.chain(optim.clip_by_global_norm(max_norm), optim.sgd(0.05))
        return loss(train(opt, opt.init(PARAMS)))

    at, h = torch.tensor(0.5, dtype=torch.float64), 1e-6
    slope = (final(at + h) - final(at - h)) / (2 * h)
    assert slope.abs() > 1e-3
    close(torch.func.grad(final)(at), slope, rtol=1e-7)


# ------------------------------------------------------------------------------ bad rates


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: optim.sgd(-0.1), ValueError, "sgd: lr must be finite and at least 0, got -0.1"),
        (lambda: optim.sgd(math.nan), ValueError, "sgd: lr .* got nan"),
        (lambda: optim.sgd(0.1, -1), ValueError, "sgd: momentum must be .* got -1"),
        (lambda: optim.sgd(0.1, math.inf), ValueError, "sgd: momentum must be .* got inf"),
        (lambda: optim.sgd(0.1, 0.9, -0.1), ValueError, "sgd: dampening must be .* got -0.1"),
        (lambda: optim.sgd(0.1, weight_decay=-1), ValueError, "sgd: weight_decay .* got -1"),
        (lambda: optim.sgd(0.1, nesterov=True), ValueError, "nesterov needs a momentum and zero d"),
        (lambda: optim.sgd(0.1, 0.9, 0.1, nesterov=True), ValueError, "dampening=0.1"),
        (lambda: optim.sgd(torch.ones(3)), ValueError, r"sgd: lr must be .* 0-d tensor, got \[3\]"),
        (lambda: optim.sgd("0.1"), TypeError, "sgd: lr must be a number, .* got '0.1'"),
        (lambda: optim.sgd(None), TypeError, "sgd: lr must be a number, .* got None"),
        (lambda: optim.scale_by_learning_rate(-1), ValueError, "scale_by_learning_rate: lr"),
        (lambda: optim.add_decayed_weights(-1), ValueError, "add_decayed_weights: weight_decay"),
        (lambda: optim.trace(-1), ValueError, "trace: momentum"),
        (lambda: optim.trace(0.9, -1), ValueError, "trace: dampening"),
        (lambda: optim.clip_by_global_norm(-1), ValueError, "clip_by_global_norm: max_norm"),
        (lambda: optim.clip_by_global_norm(tensor(-1.0)), ValueError, "max_norm must be .* -1.0"),
        (lambda: optim.sgd(tensor(math.nan)), ValueError, "sgd: lr must be finite .* got nan"),
        (lambda: optim.adam(betas=(0.9, tensor(1.0))), ValueError, r"beta2 .* \[0, 1\), got 1.0"),
        (lambda: optim.sam(tensor(-1.0)), ValueError, "sam: rho must be finite .* got -1.0"),
        (lambda: optim.rprop(tensor(-1.0)), ValueError, "rprop: lr must be finite .* got -1.0"),
        (lambda: schedules.step(tensor(-1.0), 3), ValueError, "step: value must be .* got -1.0"),
        (
            lambda: schedules.swa_anneal(schedules.step(1.0, 2), tensor(math.inf), 3),
            ValueError,
            "got inf",
        ),
    ],
    ids=[
        *("lr", "lr-nan", "momentum", "momentum-inf", "dampening", "decay", "nesterov-alone"),
        *("nesterov-dampened", "lr-vector", "lr-text", "lr-none", "scale", "add_decayed", "trace"),
        *("trace-dampening", "clip", "clip-tensor", "lr-tensor", "beta-tensor", "rho-tensor"),
        *("rprop-tensor", "schedule-tensor", "schedule-inf"),
    ],
)
def test_bad_rates_raise_when_the_optimizer_is_built(make, error, text):
    with pytest.raises(error, match=text):
        make()


# A rate of each range, and where a constructor takes it.
RANGED = {
    "lr": lambda x: optim.sgd(x),
    "max_norm": lambda x: optim.clip_by_global_norm(x),
    "beta1": lambda x: optim.adam(betas=(x, 0.9)),
    "beta2": lambda x: optim.schedule_free_adamw(betas=(0.9, x)),
    "beta3": lambda x: optim.adan(betas=(0.9, 0.9, x)),
    "decay": lambda x: optim.params_ema(x),
    "rho": lambda x: optim.adadelta(rho=x),
    "slow_step": lambda x: optim.lookahead(optim.sgd(), slow_step=x),
    "beta": lambda x: optim.schedule_free(0.1, beta=x),
    "etaminus": lambda x: optim.rprop(etas=(x, 2.0)),
    "etaplus": lambda x: optim.rprop(etas=(0.5, x)),
    "d": lambda x: optim.adafactor(d=x),
    "beta2_decay": lambda x: optim.adafactor(beta2_decay=x),
}


@pytest.mark.parametrize("name", RANGED)
def test_with_hyperparams_refuses_what_the_constructor_refuses(name):
    def refusal(f, *args, **kwargs):
        try:
            f(*args, **kwargs)
        except ValueError as error:
            return str(error).partition(": ")[2]
        return None

    numbers = (-math.inf, -0.5, 0.0, 0.5, 1.0, 1.5, math.inf, math.nan)
    wanted = [refusal(RANGED[name], x) for x in numbers]
    allowed = [x for x, text in zip(numbers, wanted, strict=True) if text is None]
    assert 0 < len(allowed) < len(numbers)
    for start in allowed:
        state = RANGED[name](start).init(PARAMS)
        for give in (float, torch.tensor):
            got = [refusal(optim.with_hyperparams, state, **{name: give(x)}) for x in numbers]
            assert got == wanted


def shifted(shift, ranges=None):
    return optim.leafwise("shifted", lambda g, p, t, d: (g + d, {}), {"d": shift}, ranges=ranges)


def test_a_name_has_no_range_of_its_own():
    """`d` of Adafactor is at least 1, which is nothing to another optimizer."""
    opt = shifted(0.5)
    updates, state = opt.update(PARAMS, opt.init(PARAMS), PARAMS)
    close(updates, tree.map(lambda p: p + 0.5, PARAMS))
    state = optim.with_hyperparams(state, d=0.25)
    close(opt.update(PARAMS, state, PARAMS)[0], tree.map(lambda p: p + 0.25, PARAMS))
    with pytest.raises(ValueError, match=r"^with_hyperparams: d must be finite and .*, got nan"):
        optim.with_hyperparams(state, d=math.nan)
    with pytest.raises(ValueError, match=r"^adafactor: d must be finite and at least 1, got 0\.5$"):
        optim.adafactor(d=0.5)
    assert callable(optim.sam(rho=2))


def test_a_range_is_an_argument_of_leafwise():
    text = r"^shifted: d must be finite and at least 0, got -1\.0$"
    with pytest.raises(ValueError, match=text):
        shifted(-1.0)
    below = {"d": ("below 0", lambda x: x < 0)}
    opt = shifted(-1.0, below)
    close(opt.update(PARAMS, opt.init(PARAMS), PARAMS)[0], tree.map(lambda p: p - 1, PARAMS))
    for wrong in (0.0, torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"^shifted: d must be finite and below 0, got 0\.0$"):
            shifted(wrong, below)


@pytest.mark.parametrize(
    ("opt", "other", "text"),
    [
        (optim.sgd(0.1, 0.9), optim.adam(), "trace: .* expected one with momentum_buffer, got"),
        (optim.sgd(0.1, 0.9), optim.rmsprop(), "trace: .*expected one with momentum_buffer, got"),
        (optim.adam(amsgrad=True), optim.adam(), "max_exp_avg_sq, got one with exp_avg, exp_avg"),
        (optim.adam(), optim.adam(amsgrad=True), "exp_avg_sq, got one with exp_avg, .*max_exp"),
        (optim.sgd(0.1), optim.adam(), "expected the states of 1 .*opt.init.params. makes new"),
    ],
)
def test_update_says_that_a_state_is_of_another_optimizer(opt, other, text):
    with pytest.raises(ValueError, match=text):
        opt.update(PARAMS, other.init(PARAMS), PARAMS)


def test_update_says_that_what_it_is_passed_is_no_state():
    opt = optim.scale_by_adam()
    with pytest.raises(ValueError, match=r"scale_by_adam: the state is .* got dict; opt.init"):
        opt.update(opt.init(PARAMS), PARAMS, PARAMS)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), "ab c"])
@pytest.mark.parametrize("make", [optim.adam, optim.lion, optim.radam, optim.schedule_free_adamw])
def test_betas_are_a_pair(make, betas):
    with pytest.raises(TypeError, match=r": betas must be a tuple of 2 rates, got "):
        make(0.1, betas=betas)


def test_update_compares_structures():
    opt = optim.chain(optim.sgd(0.1), optim.scale(2.0))
    state = opt.init(PARAMS)
    with pytest.raises(ValueError, match=r"chain: expected the states of 2 .*, got 1"):
        opt.update(PARAMS, state[:1], PARAMS)
    with pytest.raises(ValueError, match=r"b: missing .*\n  c: unexpected"):
        optim.apply_updates(PARAMS, {"w": PARAMS["w"], "c": PARAMS["b"]})


def test_a_schedule_may_return_a_number_or_a_tensor_of_its_own():
    own = torch.tensor(0.5, dtype=torch.float64)
    for schedule in (lambda count: 0.5, lambda count: own):
        state = optim.sgd(lr=schedule).init({"w": torch.ones(1)})
        lr = optim.hyperparams(state)["lr"]
        assert lr.dtype == torch.float64 and lr == 0.5 and lr is not own
