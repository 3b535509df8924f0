"""masked, freeze, multi_transform against torch's param groups, in float64."""

import inspect
import re
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad_and_value, vmap

import fdl
from fdl import losses, nn, optim, random, tree
from fdl.tree._map import match
from tests.support.asserts import close, draw, trees, unchanged
from tests.support.optimizers import default_dtype

NET = nn.sequential(nn.linear(3, 4), nn.tanh, nn.linear(4, 4), nn.tanh, nn.linear(4, 2))
PARAMS = tree.cast(NET.init(random.key(0)), torch.float64)
X, Y = draw(0, 12, 3), draw(1, 12, 2)
WEIGHTS, BIASES = ["0.weight", "2.weight", "4.weight"], ["0.bias", "2.bias", "4.bias"]


def loss(params):
    return losses.mse(NET.apply(params, X), Y)


def train(opt, steps=10, state=None):
    params, state = PARAMS, opt.init(PARAMS) if state is None else state
    for _ in range(steps):
        grads, value = grad_and_value(loss)(params)
        updates, state = opt.update(grads, state, params, value=value)
        params = optim.apply_updates(params, updates)
    return params, state


def train_torch(make, steps=10):
    """`make` gets the parameters by path and gives optimizers."""
    leaves = {path: p.clone().requires_grad_() for path, p in tree.flatten_dict(PARAMS).items()}
    optimizers = make(leaves)
    for _ in range(steps):
        for leaf in leaves.values():
            leaf.grad = None
        loss(tree.unflatten_dict(leaves)).backward()
        for optimizer in optimizers:
            optimizer.step()
    return leaves, optimizers


def agree(params, leaves, still=()):
    for path, p in tree.flatten_dict(params).items():
        began = tree.flatten_dict(PARAMS)[path]
        assert bool((p != began).all()) == (path not in still)
        close(p - began, leaves[path].detach() - began)


def pick(leaves, paths):
    return [leaves[path] for path in paths]


# ------------------------------------------------------------------------------ torch's groups

GROUPS = {"decay": WEIGHTS, "plain": BIASES}


@pytest.mark.curriculum("L3")
@pytest.mark.parametrize(
    "labels",
    [
        {"decay": "*.weight", "plain": "*.bias"},
        {"decay": WEIGHTS, "plain": lambda path, leaf: leaf.ndim == 1},
        lambda path, leaf: "decay" if leaf.ndim > 1 else "plain",
    ],
    ids=["globs", "mixed", "function"],
)
def test_multi_transform_equals_param_groups(labels):
    opts = {"decay": optim.adamw(0.05, weight_decay=0.1), "plain": optim.adamw(0.01, (0.8, 0.9))}
    params, state = train(optim.multi_transform(opts, labels))

    def groups(leaves):
        first = {"params": pick(leaves, WEIGHTS), "lr": 0.05, "weight_decay": 0.1}
        second = {"params": pick(leaves, BIASES), "lr": 0.01, "betas": (0.8, 0.9)}
        return [torch.optim.AdamW([first, second])]

    leaves, (optimizer,) = train_torch(groups)
    agree(params, leaves)
    for label, paths in GROUPS.items():
        slot = tree.flatten_dict(optim.slots(state[label])["exp_avg"])
        assert list(slot) == paths
        for path in paths:
            close(slot[path], optimizer.state[leaves[path]]["exp_avg"])


def test_different_optimizers_for_different_parts():
    opts = {"w": optim.sgd(0.1, momentum=0.9), "b": optim.adam(0.02), "head": optim.rmsprop(0.01)}
    labels = {"w": ["0.weight", "2.weight"], "b": ["0.bias", "2.bias"], "head": "4.*"}
    params, _ = train(optim.multi_transform(opts, labels))
    leaves, _ = train_torch(
        lambda p: [
            torch.optim.SGD(pick(p, labels["w"]), 0.1, 0.9),
            torch.optim.Adam(pick(p, labels["b"]), 0.02),
            torch.optim.RMSprop(pick(p, ["4.weight", "4.bias"]), 0.01),
        ]
    )
    agree(params, leaves)


def test_each_part_is_clipped_by_its_own_norm():
    part = optim.chain(optim.clip_by_global_norm(1e-3), optim.sgd(1.0))
    opt = optim.multi_transform({"a": part, "b": part}, {"a": "0.*", "b": ["2.*", "4.*"]})
    grads = grad_and_value(loss)(PARAMS)[0]
    updates = tree.flatten_dict(opt.update(grads, opt.init(PARAMS), PARAMS)[0])
    for where in ("0.", "24"):
        found = [u.flatten() for path, u in updates.items() if path[0] in where]
        close(torch.cat(found).norm(), torch.tensor(1e-3).double(), rtol=2e-3)


def test_freeze_equals_parameters_the_optimizer_does_not_have():
    opt = optim.freeze(optim.adamw(0.05, weight_decay=0.1), ["0.*", "2.bias"])
    params, state = train(opt)
    still = ["0.weight", "0.bias", "2.bias"]
    leaves, _ = train_torch(
        lambda p: [
            torch.optim.AdamW(
                [x for path, x in p.items() if path not in still], 0.05, weight_decay=0.1
            )
        ]
    )
    agree(params, leaves, still)
    assert list(tree.flatten_dict(optim.slots(state)["exp_avg"])) == ["2.weight", *tree_head()]
    bad = tree.map(lambda p: torch.full_like(p, torch.nan), PARAMS["0"])
    updates, _ = opt.update({**PARAMS, "0": bad}, state, params)
    assert updates["0"] == {"weight": None, "bias": None}


def tree_head():
    return ["4.weight", "4.bias"]


@pytest.mark.parametrize(
    "where", ["4.*", tree_head(), lambda path, leaf: path[0] == "4"], ids=["glob", "list", "fn"]
)
def test_masked_transforms_what_is_selected_and_passes_the_rest(where):
    opt = optim.masked(optim.scale_by_adam(), where)
    grads = grad_and_value(loss)(PARAMS)[0]
    with unchanged(grads, PARAMS):
        updates, state = opt.update(grads, opt.init(PARAMS), PARAMS)
    alone = optim.scale_by_adam()
    expected, _ = alone.update(grads["4"], alone.init(PARAMS["4"]), PARAMS["4"])
    assert tree.diff(updates["4"], expected) == []
    assert all(updates[i][name] is grads[i][name] for i in "02" for name in ("weight", "bias"))
    assert list(tree.flatten_dict(optim.slots(state)["exp_avg"])) == tree_head()


# ------------------------------------------------------------------------------ any tree


@settings(max_examples=50, deadline=None)
@given(trees(st.integers(0, 9)), st.integers(0, 2**12))
def test_one_optimizer_in_parts_is_one_optimizer(shapes, bits):
    """Dicts, lists, tuples, NamedTuples, empty ones, lone leaves; a part may be empty."""
    params = tree.map(lambda n: draw(n, n % 4), shapes)
    grads = tree.map(lambda n: draw(n + 50, n % 4), shapes)
    paths = list(tree.flatten_dict(params))
    opt = optim.adam(0.1, weight_decay=0.1)
    state = opt.init(params)

    def label(path, leaf):
        return "ab"[bits >> paths.index(path) & 1]

    parts = optim.multi_transform({"a": opt, "b": opt}, label)
    part_state = parts.init(params)
    for _ in range(2):
        expected, state = opt.update(grads, state, params)
        with unchanged(params, grads, part_state):
            got, part_state = parts.update(grads, part_state, params)
        assert tree.diff(expected, got) == []
        match(expected, got, "same containers")


class Pair(NamedTuple):
    left: Tensor
    right: list[Tensor]


def test_paths_into_lists_and_named_tuples():
    params = {"x": [draw(0, 2), (draw(1, 1), draw(2))], "p": Pair(draw(3, 1), [draw(4, 2)])}
    opt = optim.multi_transform(
        {"up": optim.scale(2.0), "down": optim.scale(-1.0)},
        {"up": ["x.0", "p.right.*"], "down": ["x.1.*", "p.left"]},
    )
    got, _ = opt.update(params, opt.init(params), params)
    assert isinstance(got["p"], Pair) and isinstance(got["x"][1], tuple)
    signs = {path: 2 if path in ("x.0", "p.right.0") else -1 for path in tree.flatten_dict(params)}
    for path, u in tree.flatten_dict(got).items():
        assert torch.equal(u, signs[path] * tree.flatten_dict(params)[path])


# ------------------------------------------------------------------------------ states

BOTH = optim.multi_transform(
    {"slow": optim.sgd(0.01, momentum=0.9), "fast": optim.adam(0.1)},
    {"slow": "0.*", "fast": ["2.*", "4.*"]},
)


def test_hyperparameters_and_slots_have_the_label_in_their_names():
    state = BOTH.init(PARAMS)
    assert {name: v.item() for name, v in optim.hyperparams(state).items()} == {
        "momentum": 0.9,
        "slow.1.lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "fast.1.lr": 0.1,
    }
    found = optim.slots(state)
    assert found.keys() == {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert list(tree.flatten_dict(found["momentum_buffer"])) == ["0.weight", "0.bias"]
    set_ = optim.with_hyperparams(state, **{"slow.1.lr": 0.0, "beta1": 0.5})
    params, after = train(BOTH, state=set_)
    assert tree.diff(params["0"], PARAMS["0"]) == [] and tree.diff(params["2"], PARAMS["2"])
    assert optim.hyperparams(after)["beta1"] == 0.5


def test_a_population_over_the_rate_of_one_part():
    rates = torch.tensor([0.0, 0.01, 0.1]).double()

    def member(lr):
        return train(BOTH, 3, optim.with_hyperparams(BOTH.init(PARAMS), **{"slow.1.lr": lr}))

    for lr, (params, _) in zip(rates.tolist(), tree.unstack(vmap(member)(rates)), strict=True):
        opts = {"slow": optim.sgd(lr, momentum=0.9), "fast": optim.adam(0.1)}
        alone = optim.multi_transform(opts, {"slow": "0.*", "fast": ["2.*", "4.*"]})
        close(params, train(alone, 3)[0])


def test_a_jitted_step_compiles_once_and_equals_eager(count_programs):
    opt = optim.freeze(optim.masked(optim.chain(BOTH, optim.params_ema(0.9)), "*"), "4.bias")
    step = fdl.train_step(fdl.supervised(NET, losses.mse), opt)
    eager = fdl.TrainState.create(NET, opt, key=random.key(0), params=PARAMS)
    compiled, jitted, graphs = eager, fdl.jit(step), count_programs()
    for _ in range(4):
        eager, _ = step(eager, (X, Y))
        compiled, _ = jitted(compiled, (X, Y))
    assert graphs.count == 1
    close(compiled, eager)
    assert tree.diff(eager.params["0"], PARAMS["0"]) and eager.step == 4


def test_a_part_evaluates_the_loss_where_only_it_has_moved():
    """A transformation that asks `value_fn`: it halves a step that would not lower the loss."""

    def update(grads, state, params, *, value=None, value_fn=None):
        steps = tree.map(lambda g: -g, grads)
        better = value_fn(optim.apply_updates(params, steps)) < value
        return tree.map(lambda u: torch.where(better, u, u / 2), steps), state

    careful = optim.Optimizer(lambda params: (), update)
    params = {"x": [draw(0, 2), draw(1, 2)], "y": draw(2, 2)}
    opts = {"a": careful, "b": careful, "c": optim.sgd(1.0)}
    opt = optim.multi_transform(opts, {"a": "x.1", "b": "x.0", "c": "y"})

    def value_fn(p):  # the whole step lowers the first term and raises the second
        return 0.3 * p["x"][0].pow(2).sum() + 2 * p["x"][1].pow(2).sum() + p["y"].sum()

    grads, value = grad_and_value(value_fn)(params)
    updates, _ = opt.update(grads, opt.init(params), params, value=value, value_fn=value_fn)
    close(updates, {"x": [-grads["x"][0], -grads["x"][1] / 2], "y": -grads["y"]})


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({"a": "0.*", "b": "2.*"}, r"label of \['a', 'b'\]:\n  4.weight: no label\n  4.bias: no l"),
        ({"a": "*", "b": "2.*"}, r"2.weight: \['a', 'b'\]\n  2.bias: \['a', 'b'\]$"),
        (lambda path, leaf: path[0], r"0.weight: \['0'\]\n"),
        ({"a": "*.wieght", "b": "2.*"}, r"a: '\*.wieght' matches no path; the"),
    ],
    ids=["uncovered", "twice", "unknown", "misspelt"],
)
def test_every_path_needs_one_label(labels, text):
    opt = optim.multi_transform({"a": optim.sgd(), "b": optim.sgd()}, labels)
    with pytest.raises(ValueError, match=r"^multi_transform: (.|\n)*" + text):
        opt.init(PARAMS)


def test_labels_are_those_of_the_optimizers():
    with pytest.raises(ValueError, match=r"must be those of the optimizers, \['a'\], got \['b'\]"):
        optim.multi_transform({"a": optim.sgd()}, {"b": "*"})


@pytest.mark.parametrize("name", ["masked", "freeze"])
def test_what_does_not_fit_raises(name):
    opt = getattr(optim, name)(optim.sgd(), "4.*")
    state = opt.init(PARAMS)
    with pytest.raises(ValueError, match=rf"^{name}: '5.\*' matches no path"):
        getattr(optim, name)(optim.sgd(), "5.*").init(PARAMS)
    with pytest.raises(ValueError, match=rf"^{name}: grads: .*\n  4.bias: missing"):
        opt.update({"0": PARAMS["0"], "2": PARAMS["2"]}, state, PARAMS)
    with pytest.raises(ValueError, match=rf"^{name}: expected the states of .*, got tuple"):
        opt.update(PARAMS, optim.sgd().init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=rf"^{name}: expected the states of .*, got \['a'\]"):
        opt.update(PARAMS, {"a": ()}, PARAMS)


# ------------------------------------------------------------------------------ what is frozen


def frozen_run(opt, absent_from=0, steps=6):
    """Steps in which the gradient of "b" is None from some step on."""
    params = {"a": draw(1, 3), "b": draw(2, 2)}
    state = opt.init(params)
    for step in range(steps):
        grads = {k: (step + 2) * draw(step + 3, *p.shape) for k, p in params.items()}
        if step >= absent_from:
            grads["b"] = None
        updates, state = opt.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return params


def torch_run(make, absent_from=0, steps=6, max_norm=1.0):
    a, b = (draw(i, n).requires_grad_() for i, n in ((1, 3), (2, 2)))
    optimizer = make([a, b])
    for step in range(steps):
        b.requires_grad_(step < absent_from)
        for leaf in (a, b):
            leaf.grad = (step + 2) * draw(step + 3, *leaf.shape) if leaf.requires_grad else None
        torch.nn.utils.clip_grad_norm_([a, b], max_norm)
        optimizer.step()
    return {"a": a.detach(), "b": b.detach()}


FROZEN = {
    "sgd": (
        optim.sgd(0.1, 0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1),
    ),
    "adamw": (
        optim.adamw(0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
    ),
    "nadam": (
        optim.nadam(0.1, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, 0.1, weight_decay=0.1),
    ),
    "asgd": (optim.asgd(0.1, 0.5), lambda p: torch.optim.ASGD(p, 0.1, 0.5)),
}


@pytest.mark.parametrize("absent_from", [0, 3])
@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_leaf_is_out_of_the_norm_and_stays_as_in_torch(name, absent_from):
    """Neither its gradient counts, nor does it decay, nor go on by its momentum."""
    ours, theirs = FROZEN[name]
    opt = optim.chain(optim.clip_by_global_norm(1.0), ours)
    got = frozen_run(opt, absent_from)
    with default_dtype(torch.float64):  # in which torch keeps its counts
        expected = torch_run(theirs, absent_from)
    close(got, expected)
    if not absent_from:
        whole = optim.freeze(opt, "b")
        params = {"a": draw(1, 3), "b": draw(2, 2)}
        state = whole.init(params)
        for step in range(6):
            grads = {k: (step + 2) * draw(step + 3, *p.shape) for k, p in params.items()}
            updates, state = whole.update(grads, state, params)
            params = optim.apply_updates(params, updates)
        close(params, expected)


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: optim.chain(optim.clip_by_global_norm, optim.sgd()),
            r"chain: part 0 must be an optimizer .*, got the function clip_by_global_norm; "
            r"call it: clip_by_global_norm\(...\)",
        ),
        (lambda: optim.chain(optim.sgd(), None), "chain: part 1 must be .* got a NoneType"),
        (lambda: optim.chain([optim.sgd()]), r"chain: part 0 must be an optimizer .* got a list"),
        (lambda: optim.masked(optim.sgd, "a"), "masked: opt must be an optimizer .* call it: sgd"),
        (
            lambda: optim.freeze(optim.adam, "a"),
            "freeze: opt must be an optimizer .* call it: adam",
        ),
        (
            lambda: optim.multi_transform({"x": optim.sgd(), "y": 3}, {"x": "a", "y": "b"}),
            r"multi_transform: opts\['y'\] must be an optimizer .* got an int",
        ),
        (lambda: optim.loss_scale(optim.sgd), "loss_scale: opt must be an optimizer"),
        (lambda: optim.reduce_on_plateau(optim.sgd), "reduce_on_plateau: opt must be an optimizer"),
        (lambda: optim.apply_if_finite(optim.sgd), "apply_if_finite: opt must be an optimizer"),
        (lambda: optim.lookahead(optim.sgd), "lookahead: opt must be an optimizer"),
        (lambda: optim.accumulate(torch.optim.SGD, 2), "accumulate: opt must be an optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused_by_name(make, text):
    with pytest.raises(TypeError, match=f"^{text}"):
        make()


def first_parameter(name):
    function = getattr(optim, name)
    kinds = inspect.signature(function).parameters.values() if inspect.isfunction(function) else ()
    return next(iter(kinds), None)


TAKING = {
    name: parameter.name
    for name in optim.__all__
    if (parameter := first_parameter(name))
    and re.search(r"(?<!torch\.optim\.)\bOptimizer(Like)?\b", str(parameter.annotation))
}
# What they need besides.
BESIDES = {"accumulate": (2,), "freeze": ("w",), "masked": ("w",), "multi_transform": ({"a": "w"},)}


def test_every_function_of_optimizers_is_known():
    around = {"apply_if_finite", "lookahead", "loss_scale", "reduce_on_plateau", "chain"}
    assert TAKING.keys() == around | BESIDES.keys()


@pytest.mark.parametrize("wrong", [None, 0.1, optim.sgd, (optim.sgd, 0.1)])
@pytest.mark.parametrize("name", TAKING)
def test_every_function_of_optimizers_checks_what_it_is_given(name, wrong):
    argument = {"a": wrong} if name == "multi_transform" else wrong
    label = {"chain": "part 0", "multi_transform": r"opts\['a'\]"}.get(name, TAKING[name])
    with pytest.raises(TypeError, match=f"^{name}: {label} must be an optimizer such as .*, got "):
        getattr(optim, name)(argument, *BESIDES.get(name, ()))


@pytest.mark.parametrize(
    "make",
    [
        lambda where: optim.add_decayed_weights(0.1, mask=where),
        lambda where: optim.masked(optim.sgd(), where),
        lambda where: optim.freeze(optim.sgd(), where),
        lambda where: optim.multi_transform(
            {"x": optim.sgd(), "y": optim.sgd()}, {"x": where, "y": "*"}
        ),
        lambda where: optim.lion(weight_decay=0.1, mask=where),
        lambda where: optim.adan(weight_decay=0.1, mask=where),
        lambda where: optim.lamb(0.1, weight_decay=0.1, mask=where),
        lambda where: optim.lamb(0.1, trust_mask=where),
        lambda where: optim.lars(0.1, weight_decay=0.1, mask=where),
        lambda where: optim.lars(0.1, trust_mask=where),
    ],
)
def test_a_function_that_selects_nothing_is_refused_as_a_glob_is(make):
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"selects no path; there are \['a', 'b'\]"):
        make(lambda path, leaf: leaf.ndim > 1).init(params)
    with pytest.raises(ValueError, match=r"selects no path; there are \['a', 'b'\]"):
        make(lambda params: tree.map(lambda leaf: leaf.ndim > 1, params)).init(params)
    with pytest.raises(ValueError, match=r"matches no path; the paths are \['a', 'b'\]"):
        make("c").init(params)


def test_a_mask_by_path_is_the_same_for_stacked_leaves_and_one_by_rank_is_not():
    params = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    stacked = tree.stack([params, params])
    zeros = tree.map(torch.zeros_like, stacked)
    for mask, decays in (("weight", False), (lambda path, leaf: leaf.ndim > 1, True)):
        opt = optim.add_decayed_weights(0.1, mask)
        outside = opt.update(zeros, opt.init(stacked), stacked)[0]
        inside = torch.vmap(lambda g, p, opt=opt: opt.update(g, opt.init(p), p)[0])(zeros, stacked)
        assert not inside["bias"].any() and bool(outside["bias"].any()) == decays
        assert torch.equal(inside["weight"], outside["weight"])
