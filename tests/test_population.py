"""Populations: every member equals the same model trained alone, and the small tools around it."""

import math

import pytest
import torch
from torch.func import vmap

import fdl
import models
from fdl import _numerics, data, losses, nn, optim, population, random, transforms, tree
from tests.support.asserts import close, unchanged

MEMBERS, STEPS, BATCH = 3, 50, 8
KEYS = random.split(random.key(3), MEMBERS)
RATES = {
    "lr": torch.tensor([0.1, 0.3, 0.7]),
    "momentum": torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64),
    "weight_decay": torch.tensor(0.01),  # the same for all
}
MODELS = {
    "dropout": nn.sequential(nn.linear(4, 8), nn.tanh, nn.dropout(0.3), nn.linear(8, 3)),
    "conv": nn.sequential(
        nn.conv2d(1, 2, 2, weight_init=nn.init.xavier_uniform()),
        nn.tanh,
        nn.flatten(),
        nn.linear(2, 3),
    ),
    # Without a bias, whose gradient before a norm is nothing but rounding.
    "norm": nn.sequential(nn.linear(4, 8, bias=False), nn.batch_norm(8), nn.tanh, nn.linear(8, 3)),
}
SHAPES = {"dropout": (4,), "conv": (1, 2, 2), "norm": (4,)}
MODEL, OPT = MODELS["dropout"], optim.sgd(0.1, 0.9, weight_decay=0.1)


def of_float64(state):
    """Params and slots in float64: a trajectory then shows no rounding to speak of."""
    return state._replace(
        params=tree.cast(state.params, torch.float64),
        buffers=tree.cast(state.buffers, torch.float64),
        opt_state=tree.cast(state.opt_state, torch.float64),
    )


def dataset(name):
    x = random.normal(random.key(0), (40, *SHAPES[name]), torch.float64)
    return x, random.randint(random.key(1), (40,), 0, 3)


def alone(model, i):
    """What everybody would write for one member."""
    rates = {name: value if value.ndim == 0 else value[i] for name, value in RATES.items()}
    state = fdl.TrainState.create(model, OPT, key=KEYS[i])
    return state._replace(opt_state=optim.with_hyperparams(state.opt_state, **rates))


def orders(key):
    """Ten epochs of five batches: [50, 8]."""
    epochs = [data.epoch_indices(random.fold_in(key, e), 40, BATCH) for e in range(STEPS // 5)]
    return tree.map(lambda *parts: torch.cat(parts), *epochs)


@pytest.mark.parametrize("name", ["mlp", "lenet", "dropout", "conv", "norm"])
def test_create_equals_train_state_create_bit_for_bit(name):
    model = {"mlp": models.mlp(), "lenet": models.lenet()}.get(name) or MODELS[name]
    with unchanged(KEYS, RATES):
        states = population.create(model, OPT, KEYS, RATES)
    assert tree.diff(tree.stack([alone(model, i) for i in range(MEMBERS)]), states) == []
    assert all(leaf.is_contiguous() for leaf in tree.leaves(states))
    weights = [leaf for leaf in tree.leaves(states.params) if leaf.ndim > 2]
    assert weights and not any(torch.equal(leaf[0], leaf[1]) for leaf in weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("own_order", [False, True], ids=["one order", "own orders"])
@pytest.mark.parametrize("each", [vmap, transforms.sequential_vmap], ids=["vmap", "sequential"])
def test_each_member_equals_the_model_trained_alone(name, own_order, each):
    model, images = MODELS[name], dataset(name)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), OPT)
    of_member = [orders(random.key(7 + i * own_order)) for i in range(MEMBERS)]

    def one_step(state, row):
        return step(state, data.batch(images, row))

    if own_order:
        rows = tree.map(lambda *parts: torch.stack(parts, 1), *of_member)  # [steps, members, batch]
        many_steps = each(one_step)
    else:
        rows, many_steps = of_member[0], each(one_step, (0, None))
    states, metrics = fdl.scan(
        many_steps, of_float64(population.create(model, OPT, KEYS, RATES)), rows
    )
    for i in range(MEMBERS):
        start = of_float64(alone(model, i))
        state, found = fdl.scan(one_step, start, of_member[i])
        got = population.member(states, i)
        assert tree.diff(state, got, rtol=1e-9, atol=1e-12) == []
        losses_of_i = metrics["loss"].value[:, i]
        torch.testing.assert_close(losses_of_i, found["loss"].value, rtol=1e-9, atol=0)
        assert any(
            (a - b).abs().max() > 0.1
            for a, b in zip(tree.leaves(start.params), tree.leaves(got.params), strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("each", [vmap, transforms.sequential_vmap], ids=["vmap", "sequential"])
def test_an_epoch_of_a_population_compiles_to_one_program(each):
    model, images = MODELS["conv"], tree.cast(dataset("conv"), torch.float32)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), OPT)

    def epoch(states, images, rows):
        def many_steps(states, row):
            return each(step, (0, None))(states, data.batch(images, row))

        return fdl.scan(many_steps, states, rows)

    rows, states = orders(random.key(7)), population.create(model, OPT, KEYS, RATES)
    jitted = fdl.jit(epoch)
    got, expected = jitted(states, images, rows), epoch(states, images, rows)
    assert tree.diff(expected, got, rtol=1e-4, atol=1e-5) == []
    (report,) = jitted.report()
    assert report.route == "one program"


def test_a_member_that_overflows_leaves_the_others_as_they_are():
    images, rows = dataset("dropout"), orders(random.key(7))
    step = fdl.train_step(fdl.supervised(MODEL, losses.cross_entropy), OPT)

    def final(lr):
        states = of_float64(population.create(MODEL, OPT, KEYS, {"lr": lr}))
        return fdl.scan(
            lambda s, row: vmap(step, (0, None))(s, data.batch(images, row)), states, rows
        )

    good, _ = final(torch.tensor([0.1, 0.1, 0.1]))
    states, metrics = final(torch.tensor([0.1, 1e200, 0.1]))
    assert not metrics["loss"].value[-1, 1].isfinite()
    for i in (0, 2):
        assert tree.diff(population.member(good, i), population.member(states, i)) == []
    assert population.best(states, metrics["loss"].value[-1]).params["0"]["weight"].isfinite().all()


def test_an_ensemble_is_the_mean_of_probabilities():
    states = population.create(MODEL, OPT, KEYS)
    x = dataset("dropout")[0].float()
    got = population.ensemble(MODEL.apply, states.params, x)
    each = [MODEL.apply(population.member(states.params, i), x).softmax(1) for i in range(MEMBERS)]
    torch.testing.assert_close(got, sum(each) / MEMBERS)
    torch.testing.assert_close(got.sum(1), torch.ones(len(x)))


@pytest.mark.parametrize(
    ("loss", "index"),
    [([3.0, 1.0, 2.0], 1), ([math.nan, 5.0, math.inf], 1), ([-math.inf, 0.0, -1.0], 2)],
)
def test_best_is_the_smallest_finite_loss(loss, index):
    states = population.create(MODEL, OPT, KEYS)
    found = population.best(states, torch.tensor(loss))
    assert tree.diff(population.member(states, index), found) == []
    assert tree.diff(population.member(states, torch.tensor(index)), found) == []
    assert tree.diff(population.member(states, index - MEMBERS), found) == []
    assert population.size(states) == MEMBERS


def test_a_bootstrap_sample_draws_each_example_once_in_the_mean():
    n, samples = 200, 400
    drawn = vmap(lambda key: data.bootstrap_indices(key, n, 64).index)(
        random.split(random.key(5), samples)
    )
    counts = drawn.flatten(1)[:, :n].flatten().bincount(minlength=n) / samples
    assert drawn.shape == (samples, 4, 64)
    assert (counts - 1).abs().max() < 5 / math.sqrt(samples)  # five standard deviations
    there = torch.stack([row.bincount(minlength=n) > 0 for row in drawn.flatten(1)[:, :n]])
    assert abs(there.double().mean() - (1 - 1 / math.e)) < 0.01
    mask = data.bootstrap_indices(KEYS[0], n, 64).mask
    assert mask.sum() == n and not mask[-1, n % 64 :].any()


@pytest.mark.parametrize(
    ("keys", "rates", "error", "text"),
    [
        (KEYS[0], {}, ValueError, r"keys must have the shape \[members, 2\], got \[2\]"),
        (KEYS[:0], {}, ValueError, r"keys must have the shape \[members, 2\], got \[0, 2\]"),
        (3, {}, TypeError, r"keys must be a tensor, got 3; make them with random.split"),
        (KEYS, {"lr": 0.1}, TypeError, "'lr' must be a tensor, got 0.1"),
        (KEYS, {"lr": torch.ones(2)}, ValueError, r"'lr' must have the shape \[3\].*got \[2\]"),
        (KEYS, {"rate": torch.ones(3)}, ValueError, "'rate' is not in this state; can be set: "),
    ],
)
def test_create_says_what_is_wrong(keys, rates, error, text):
    with pytest.raises(error, match=text):
        population.create(MODEL, OPT, keys, rates)


def test_the_other_functions_say_what_is_wrong():
    with pytest.raises(TypeError, match=r"best: loss must be a tensor, got Mean; .*metric.value"):
        population.best({"w": torch.zeros(3)}, fdl.metrics.mean(torch.ones(3)))
    states = {"w": torch.zeros(3), "b": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"one common first axis, the members, got \{'w': \[3\], 'b': \[2\]\}"
    ):
        population.size(states)
    with pytest.raises(ValueError, match="one common first axis"):
        population.member({"w": torch.zeros(())}, 0)
    with pytest.raises(IndexError, match=r"index must be in \[-3, 3\), got 3"):
        population.member({"w": torch.zeros(3)}, 3)
    with pytest.raises(ValueError, match=r"loss must have the shape \[3\].*got \[2\]"):
        population.best({"w": torch.zeros(3)}, torch.zeros(2))


BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_best_is_finite_or_there_is_none(bad, dtype, plain_backend):
    states = {"w": torch.arange(3.0), "n": torch.arange(3)}
    loss = torch.tensor([0.5, bad, 0.25], dtype=dtype)
    for f in (population.best, fdl.jit(population.best)):
        assert tree.diff({"w": torch.tensor(2.0), "n": torch.tensor(2)}, f(states, loss)) == []
        huge = torch.tensor([bad, torch.finfo(dtype).max, bad], dtype=dtype)
        assert f(states, huge)["n"] == 1
    none = torch.tensor(BAD, dtype=dtype)
    with pytest.raises(ValueError, match=r"no loss is finite, got \[nan, inf, -inf\]"):
        population.best(states, none)
    assert fdl.jit(population.best)(states, none)["w"].isnan()
    both = vmap(population.best, (None, 0))(states, torch.stack([loss, none]))
    assert both["n"][0] == 2 and both["w"][1].isnan()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_rule_of_the_host_is_that_of_tensors(bad, mode):
    sign = {"min": 1, "max": -1}[mode]
    for values in ([0.5, bad, 0.25, 0.25, 0.75], [bad, 3.0], [3.0, bad], [bad, -0.0, 0.0]):
        index, found = _numerics.best_row(sign * torch.tensor(values))
        assert found and _numerics.best_index(values, mode) == index
        assert math.isfinite(values[index])
    assert _numerics.best_index([bad, bad], mode) is _numerics.best_index([], mode) is None
    assert not _numerics.best_row(torch.tensor([bad, bad]))[1]


def test_one_member_that_diverged_is_left_out_of_the_ensemble():
    model = nn.linear(2, 3)
    params = population.create(model, OPT, KEYS).params
    x = random.normal(random.key(5), (4, 2))
    others = tree.map(lambda leaf: leaf[[0, 2]], params)
    expected = vmap(model.apply, (0, None))(others, x).softmax(-1).mean(0)
    for bad in BAD:
        broken = tree.map(lambda leaf, bad=bad: leaf.index_fill(0, torch.tensor(1), bad), params)
        close(population.ensemble(model.apply, broken, x), expected, rtol=1e-6)
        nobody = tree.map(lambda leaf, bad=bad: torch.full_like(leaf, bad), params)
        assert population.ensemble(model.apply, nobody, x).isnan().all()
    # For one example alone; and a class that is excluded is no divergence.
    logits = torch.tensor([[[0.0, -torch.inf], [torch.nan, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    got = population.ensemble(lambda p, x: p, logits, x)
    assert torch.equal(got, torch.tensor([[0.75, 0.25], [0.5, 0.5]]))


def test_an_ensemble_needs_logits_of_classes():
    """Without an axis of classes the softmax would go over the batch."""
    one = nn.sequential(nn.linear(3, 1), lambda x: x[:, 0])
    states = population.create(one, optim.sgd(0.1), random.split(random.key(0), 2))
    text = r"must return logits \[batch, classes\], got \[4\] from each member"
    with pytest.raises(ValueError, match=text):
        population.ensemble(one, states.params, torch.ones(4, 3))


def test_an_ensemble_of_members_with_buffers_equals_members_trained_alone():
    """Each member has buffers of its own, which training changes and evaluation reads."""
    model, (x, y) = MODELS["norm"], dataset("norm")
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), OPT)
    states = of_float64(population.create(model, OPT, KEYS, RATES))
    each = [of_float64(alone(model, i)) for i in range(MEMBERS)]
    start = states.buffers
    for i in range(4):
        rows = slice(8 * i, 8 * i + 8)
        states, _ = vmap(step, (0, None))(states, (x[rows], y[rows]))
        each = [step(state, (x[rows], y[rows]))[0] for state in each]
    moved = (states.buffers["1"]["running_mean"] - start["1"]["running_mean"]).abs()
    assert moved.amax(1).min() > 1e-3
    close(states.buffers, tree.stack([state.buffers for state in each]))
    alone_each = [model.apply(s.params, s.buffers, x)[0].softmax(-1) for s in each]
    expected = torch.stack(alone_each).mean(0)
    with unchanged(states):
        got = population.ensemble(model, states.params, x, states.buffers)
    close(got, expected)
    both = (states.params, states.buffers)  # a function of one's own
    close(population.ensemble(lambda both, x: model.apply(*both, x)[0], both, x), expected)
    with_key = vmap(lambda p, b: model.apply(p, b, x, train=True))(*both)  # new buffers of each
    close(with_key, tree.stack([model.apply(s.params, s.buffers, x, train=True) for s in each]))


def test_an_ensemble_takes_models_functions_and_trees_of_inputs():
    states = population.create(MODEL, OPT, KEYS)
    x = dataset("dropout")[0].float()
    got = population.ensemble(MODEL, states.params, x)
    close(got, population.ensemble(MODEL.apply, states.params, x), rtol=0, atol=0)
    of_pair = nn.Model(MODEL.init, lambda p, pair, **_: MODEL.apply(p, pair["a"] + pair["b"]))
    close(population.ensemble(of_pair, states.params, {"a": x / 2, "b": x / 2}), got)


@pytest.mark.parametrize(
    ("model", "buffers", "kind", "message"),
    [
        (MODELS["norm"], None, ValueError, r"the model has buffers; pass .*, x, states.buffers\)"),
        (MODEL, {}, ValueError, "buffers are for a StatefulModel, got a Model"),
        (MODEL.apply, {}, ValueError, "buffers are for a StatefulModel, got the function apply"),
        (3, None, TypeError, "model must be a model or a function, got an int"),
    ],
)
def test_what_an_ensemble_refuses(model, buffers, kind, message):
    with pytest.raises(kind, match=f"population.ensemble: {message}"):
        population.ensemble(model, {}, torch.ones(2, 4), buffers)


@pytest.mark.parametrize(
    ("model", "params", "kind", "message"),
    [
        (MODEL, MODEL.init(KEYS[0]), ValueError, "leaves need one common first axis"),
        (lambda p, x: (p, x), torch.ones(3, 2), TypeError, r"return logits .*, got a tuple"),
    ],
)
def test_an_ensemble_needs_members_and_logits(model, params, kind, message):
    with pytest.raises(kind, match=f"population.*: .*{message}"):
        population.ensemble(model, params, dataset("dropout")[0].float())


TAKE = {
    "number": lambda states: population.member(states, 1),
    "tensor": lambda states: population.member(states, torch.tensor(1)),
    "best": lambda states: population.best(states, torch.tensor([2.0, 1.0, 3.0])),
}


@pytest.mark.parametrize("how", TAKE)
def test_a_member_has_memory_of_its_own(how):
    states = {"w": torch.arange(6.0).reshape(3, 2)}
    TAKE[how](states)["w"].fill_(9)
    assert torch.equal(states["w"], torch.arange(6.0).reshape(3, 2))
