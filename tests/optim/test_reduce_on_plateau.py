"""reduce_on_plateau against torch's ReduceLROnPlateau: every look, to the last bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap
from torch.optim.lr_scheduler import ReduceLROnPlateau

import fdl
from fdl import losses, nn, optim, random, tree
from tests.support.asserts import draw

PARAMS = {"w": torch.zeros(1).double(), "b": torch.zeros(1).double()}
CASES = {
    f"{mode}-{kind}-{i}": {"mode": mode, "threshold_mode": kind, **options}
    for (mode, kind), (i, options) in itertools.product(
        itertools.product(["min", "max"], ["rel", "abs"]),
        enumerate(
            [
                {},
                {"factor": 0.5, "patience": 3, "threshold": 0.02, "cooldown": 4},
                {"factor": 0.7, "patience": 0, "threshold": 0.0, "min_lr": 1e-3, "cooldown": 1},
                {"factor": 0.9, "patience": 1, "threshold": 0.1, "eps": 0.01},
                {"factor": 0.0, "patience": 20},
            ]
        ),
    )
}
each_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def walk(seed, steps=300, start=5.0):
    """A random walk: it rises, falls, stands still, and passes 0."""
    steps_ = draw(seed, steps)
    return start + torch.where(steps_.abs() < 0.3, 0.0, 0.3 * steps_).cumsum(0)


def torch_rates(values, lrs=(0.3,), every=1, **options):
    """Learning rates of every group after each update."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups)
    scheduler = ReduceLROnPlateau(optimizer, **options)
    found, seen = [], []
    for value in values:
        seen.append(value)
        if len(seen) == every:
            scheduler.step(sum(seen) / every)
            seen = []
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


def rates(opt, values, names=("lr",)):
    state, found = opt.init(PARAMS), []
    for value in values:
        _, state = opt.update(PARAMS, state, PARAMS, value=value)
        found.append([optim.hyperparams(state)[name].item() for name in names])
    return found


@each_case
def test_every_rate_is_that_of_torch(options):
    values = walk(sum(map(ord, str(options)))).tolist()
    expected = torch_rates(values, **options)
    assert rates(optim.reduce_on_plateau(optim.sgd(0.3), **options), values) == expected
    assert len({lr for (lr,) in expected}) > 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 10) | st.just(math.nan) | st.just(math.inf), min_size=20, max_size=60),
    st.sampled_from(["min", "max"]),
    st.sampled_from(["rel", "abs"]),
    st.floats(0.1, 0.9),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 1e-4, 0.5]),
)
def test_also_with_values_that_are_not_finite(
    values, mode, kind, factor, patience, cooldown, threshold
):
    options = {
        "mode": mode,
        "threshold_mode": kind,
        "factor": factor,
        "patience": patience,
        "cooldown": cooldown,
        "threshold": threshold,
    }
    opt = optim.reduce_on_plateau(optim.sgd(0.3), **options)
    assert rates(opt, values) == torch_rates(values, **options)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=20, max_size=60),
    st.sampled_from([-1, 1]),
    st.sampled_from([0.0, 1e-4, 0.5, 2.0]),
)
def test_a_relative_margin_is_a_fraction_of_the_size_of_the_best_value(values, sign, threshold):
    """A loop of its own; and to maximize is to minimize the negative, whatever the sign."""
    mode = {-1: "min", 1: "max"}[sign]
    opt = optim.reduce_on_plateau(
        optim.sgd(0.3), mode, patience=0, factor=0.5, eps=0.0, threshold=threshold
    )
    lr, best, expected = 0.3, None, []
    for value in values:
        if best is None or sign * (value - best) > threshold * abs(best):
            best = value
        else:
            lr /= 2
        expected.append([lr])
    assert rates(opt, values) == expected
    other = optim.reduce_on_plateau(
        optim.sgd(0.3),
        {-1: "max", 1: "min"}[sign],
        patience=0,
        factor=0.5,
        eps=0.0,
        threshold=threshold,
    )
    assert rates(other, [-value for value in values]) == expected


def test_a_negative_loss_that_stands_still_lowers_the_rate():
    """A log-likelihood: torch's bound is −9.999, so that −10 beats itself."""
    (found,) = {
        tuple(map(tuple, rates(optim.reduce_on_plateau(optim.sgd(1.0), mode), [-10.0] * 30)))
        for mode in ("min", "max")
    }
    assert [found[i] for i in (10, 11, 22)] == [(1.0,), (0.1,), (0.1 * 0.1,)]
    assert torch_rates([-10.0] * 30, mode="min")[-1] == [0.3]


@pytest.mark.parametrize("every", [2, 7])
def test_it_looks_at_the_mean_of_the_values_since_the_last_look(every):
    values, options = (
        walk(3).tolist(),
        {"patience": 2, "factor": 0.5, "threshold": 0.2, "threshold_mode": "abs"},
    )
    opt = optim.reduce_on_plateau(optim.sgd(0.3), **options, every=every)
    expected = torch_rates(values, every=every, **options)
    assert rates(opt, values) == expected != torch_rates(values, **options)


def test_all_learning_rates_fall_each_by_itself():
    parts = {
        "w": optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.3)),
        "b": optim.chain(optim.sgd(0.002, momentum=0.9), optim.params_ema(0.9)),
    }
    inner = optim.multi_transform(parts, {"w": "w", "b": "b"})
    opt = optim.reduce_on_plateau(inner, patience=1, factor=0.3, min_lr=1e-3)
    names = ("inner.w.1.2.lr", "inner.b.0.1.lr")
    values = walk(5).tolist()
    expected = torch_rates(values, (0.3, 0.002), patience=1, factor=0.3, min_lr=1e-3)
    assert rates(opt, values, names) == expected and expected[-1] == [1e-3, 1e-3]
    others = optim.hyperparams(opt.init(PARAMS)).keys() - names
    state = opt.init(PARAMS)
    _, after = opt.update(PARAMS, state, PARAMS, value=1.0)
    for name in others:
        assert optim.hyperparams(after)[name] == optim.hyperparams(state)[name]


def test_a_lower_rate_is_that_of_the_next_update():
    opt = optim.reduce_on_plateau(optim.sgd(1.0), patience=0, factor=0.5)
    state, g, steps = opt.init(PARAMS), tree.map(torch.ones_like, PARAMS), []
    for value in (3.0, 3.0, 2.0, 2.0):
        updates, state = opt.update(g, state, PARAMS, value=torch.tensor(value))
        steps.append(updates["w"].item())
    assert steps == [-1.0, -1.0, -0.5, -0.5]


def test_a_rate_may_be_set_in_between():
    opt = optim.reduce_on_plateau(optim.sgd(1.0), patience=0, factor=0.5)
    _, state = opt.update(PARAMS, opt.init(PARAMS), PARAMS, value=1.0)
    _, state = opt.update(PARAMS, optim.with_hyperparams(state, lr=0.25), PARAMS, value=1.0)
    assert optim.hyperparams(state)["lr"] == 0.125


# ------------------------------------------------------------------------------ transformations


def follow(opt):
    def f(values):
        state, found = opt.init(PARAMS), []
        for value in values.unbind():
            _, state = opt.update(PARAMS, state, PARAMS, value=value)
            found.append(optim.hyperparams(state)["lr"])
        return torch.stack(found)

    return f


@each_case
def test_each_member_of_a_population_has_its_own_plateaus(options):
    values = torch.stack([walk(seed, 100) for seed in range(5)])
    opt = optim.reduce_on_plateau(optim.sgd(0.3), **options)
    for row, found in zip(values.tolist(), vmap(follow(opt))(values).tolist(), strict=True):
        assert found == [lr for (lr,) in torch_rates(row, **options)]


@pytest.mark.slow
def test_one_compiled_program_looks_300_times(count_programs):
    """All cases in one program, by Inductor, each with its own walk."""
    opts = {name: optim.reduce_on_plateau(optim.sgd(0.3), **o) for name, o in CASES.items()}
    walks = {name: walk(seed) for seed, name in enumerate(opts)}

    @fdl.jit
    def look(states, values):
        new = {
            name: opt.update(PARAMS, states[name], PARAMS, value=values[name])[1]
            for name, opt in opts.items()
        }
        return new, {name: optim.hyperparams(state)["lr"] for name, state in new.items()}

    graphs, states = count_programs(), {name: opt.init(PARAMS) for name, opt in opts.items()}
    found = {name: [] for name in opts}
    for i in range(300):
        states, lrs = look(states, {name: values[i] for name, values in walks.items()})
        for name, lr in lrs.items():
            found[name].append([lr.item()])
    assert graphs.count == 1
    for name, options in CASES.items():
        assert found[name] == torch_rates(walks[name].tolist(), **options), name


def test_train_step_passes_the_value():
    model, opt = nn.linear(2, 1), optim.reduce_on_plateau(optim.sgd(0.0), patience=2)
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    for _ in range(4):
        state, _ = step(state, (torch.ones(4, 2), torch.zeros(4, 1)))
    assert state.opt_state.bad == 0 and state.opt_state.best < math.inf


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "least"}, r"mode must be one of \('min', 'max'\), got 'least'"),
        ({"threshold_mode": "x"}, r"threshold_mode must be one of \('rel', 'abs'\), got 'x'"),
        ({"factor": 1.0}, r"factor must be a number in \[0, 1\), got 1.0"),
        ({"threshold": -1}, r"threshold must be a number in \[0, inf\), got -1"),
        ({"min_lr": math.nan}, r"min_lr must be a number in \[0, inf\), got nan"),
        ({"eps": "0"}, r"eps must be a number in \[0, inf\), got '0'"),
        ({"patience": -1}, "patience must be an int of at least 0, got -1"),
        ({"cooldown": 1.5}, "cooldown must be an int of at least 0, got 1.5"),
        ({"every": 0}, "every must be an int of at least 1, got 0"),
    ],
)
def test_bad_arguments_raise_when_built(options, text):
    with pytest.raises(ValueError, match=f"^reduce_on_plateau: {text}$"):
        optim.reduce_on_plateau(optim.sgd(), **options)


def test_it_needs_a_rate_of_its_own():
    with pytest.raises(TypeError, match=r"^reduce_on_plateau: opt must be an optimizer"):
        optim.reduce_on_plateau(0.1)
    with pytest.raises(ValueError, match=r"must have an lr of its own, got none"):
        optim.reduce_on_plateau(optim.scale_by_adam()).init(PARAMS)
    scheduled = optim.chain(optim.sgd(0.1), optim.sgd(optim.schedules.constant(0.1)))
    with pytest.raises(ValueError, match=r"got one that follows a schedule, at \['1.0'\]"):
        optim.reduce_on_plateau(scheduled).init(PARAMS)


def test_it_needs_a_scalar_value():
    opt = optim.reduce_on_plateau(optim.sgd())
    state = opt.init(PARAMS)
    with pytest.raises(
        ValueError, match=r"^reduce_on_plateau: update needs the loss, .*value=loss"
    ):
        opt.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=r"^reduce_on_plateau: value must be a scalar, got \[2\]"):
        opt.update(PARAMS, state, PARAMS, value=torch.ones(2))
