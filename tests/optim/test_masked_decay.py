"""`mask=` of every optimizer with weight decay: torch's param groups, optax, laws of its own."""

import inspect
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from fdl import io, jit, optim, tree
from fdl.optim import _foreach
from tests.support.asserts import close, draw
from tests.support.jax import x64
from tests.support.optimizers import (
    MATRICES,
    SHAPES,
    agree,
    default_dtype,
    grads_at,
    run,
    run_torch,
    start,
)

DECAYED = {path: path.startswith("nested") for path in SHAPES | MATRICES}
MASK = tree.unflatten_dict({path: DECAYED[path] for path in SHAPES})
FORMS = {
    "tree": MASK,
    "function": lambda params: tree.map(lambda p: p.ndim > 1, params),
    "glob": "nested.*",
    "globs": ["nested.matrix", "*.kernel"],
    "predicate": lambda path, leaf: leaf.ndim > 1,
    "default": lambda path, leaf=None: path.startswith("nested"),
}
TORCH = {
    "adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 0.05}),
    "adamax": (torch.optim.Adamax, {"lr": 0.05}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05}),
    "asgd": (torch.optim.ASGD, {"lr": 0.05, "lambd": 0.1}),
    "muon": (torch.optim.Muon, {"lr": 0.05}),
    "nadam": (torch.optim.NAdam, {"lr": 0.05, "decoupled_weight_decay": True}),
    "radam": (torch.optim.RAdam, {"lr": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.9}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}
OTHERS = {
    "adan": {"lr": 0.05},
    "lamb": {"lr": 0.05},
    "lars": {"lr": 0.05},
    "lion": {"lr": 0.05},
    "schedule_free_adamw": {"lr": 0.05},
    "schedule_free_sgd": {"lr": 0.05},
}
OPTIONS = {name: options for name, (_, options) in TORCH.items()} | OTHERS


def begin(name):
    return start(shapes=MATRICES if name == "muon" else SHAPES)


def like(params, mask):
    return tree.unflatten_dict({path: mask[path] for path in tree.flatten_dict(params)})


def groups(make, options):
    """Two param groups: those that decay by 0.1, and the others."""

    def optimizer(leaves):
        return make(
            [
                {"params": [x for path, x in leaves.items() if DECAYED[path]], "weight_decay": 0.1},
                {
                    "params": [x for path, x in leaves.items() if not DECAYED[path]],
                    "weight_decay": 0.0,
                },
            ],
            **options,
        )

    return optimizer


def test_every_optimizer_with_weight_decay_has_a_mask():
    made = {name: getattr(optim, name) for name in optim.__all__}
    found = {
        name: inspect.signature(f).parameters
        for name, f in made.items()
        if inspect.isfunction(f) and "weight_decay" in inspect.signature(f).parameters
    }
    assert all("mask" in parameters for parameters in found.values())
    assert found.keys() - {"add_decayed_weights"} == OPTIONS.keys()


@pytest.mark.parametrize("name", TORCH)
def test_a_mask_equals_two_param_groups_of_torch(name):
    make, options = TORCH[name]
    params = begin(name)
    opt = getattr(optim, name)(weight_decay=0.1, mask=like(params, DECAYED), **options)
    ours, state = run(opt, params, steps=20)
    with default_dtype(torch.float64):
        leaves, theirs = run_torch(groups(make, options), params, steps=20)
    agree(ours, leaves)
    for slot, values in optim.slots(state).items():
        for path, value in tree.flatten_dict(values).items():
            if slot in theirs.state[leaves[path]] and value.numel():
                close(value, theirs.state[leaves[path]][slot])


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_form_of_a_mask(name, mask):
    make, options = TORCH[name]
    ours, _ = run(getattr(optim, name)(weight_decay=0.1, mask=mask, **options), begin(name), 10)
    agree(ours, run_torch(groups(make, options), begin(name), 10)[0])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_of_two_groups_continues_with_the_bits_of_a_mask(name):
    make, options = TORCH[name]
    leaves, theirs = run_torch(groups(make, options), begin(name), 0)
    opt, state = optim.from_torch(theirs, tree.unflatten_dict(leaves))
    masked = getattr(optim, name)(weight_decay=0.1, mask=MASK, **options)
    assert (
        tree.diff(run(opt, begin(name), 10, state=state)[0], run(masked, begin(name), 10)[0]) == []
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adamax"])
def test_a_mask_equals_that_of_optax(name):
    optax, jax = pytest.importorskip("optax"), pytest.importorskip("jax")

    def mask(params):
        return {path: DECAYED[path] for path in params}

    theirs = {
        "adamw": lambda: optax.adamw(0.05, weight_decay=0.1, mask=mask),
        "lion": lambda: optax.lion(0.05, weight_decay=0.1, mask=mask),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(0.1, mask=mask), optax.sgd(0.05, momentum=0.9)
        ),
        "adamax": lambda: optax.chain(
            optax.add_decayed_weights(0.1, mask=mask), optax.adamax(0.05)
        ),
    }[name]()
    with x64():
        flat = {
            path: jax.numpy.array(p.numpy()) for path, p in tree.flatten_dict(begin(name)).items()
        }
        state = theirs.init(flat)
        for step in range(20):
            now = tree.unflatten_dict(
                {path: torch.tensor(p.tolist(), dtype=torch.float64) for path, p in flat.items()}
            )
            grads = {
                path: jax.numpy.array(g.numpy())
                for path, g in tree.flatten_dict(grads_at(now, step)).items()
            }
            updates, state = theirs.update(grads, state, flat)
            flat = optax.apply_updates(flat, updates)
    ours, _ = run(
        getattr(optim, name)(weight_decay=0.1, mask=MASK, **OPTIONS[name]), begin(name), 20
    )
    for path, p in tree.flatten_dict(ours).items():
        close(p, torch.tensor(flat[path].tolist(), dtype=torch.float64))


# ------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_each_leaf_moves_as_in_a_run_that_decays_all_or_none(name, data):
    """No optimizer with weight decay mixes leaves, so that this says everything of a mask."""
    params, make = begin(name), getattr(optim, name)
    mask = {path: data.draw(st.booleans(), path) for path in tree.flatten_dict(params)}
    runs = {
        flag: tree.flatten_dict(run(make(weight_decay=w, **OPTIONS[name]), params, 3)[0])
        for flag, w in {True: 0.3, False: torch.tensor(0.0)}.items()
    }
    # For a leaf of one number the trust ratios of LAMB and LARS cancel its decay.
    assert all(not torch.equal(runs[True][p], runs[False][p]) for p in mask if p != "scalar")
    ours, _ = run(make(weight_decay=0.3, mask=like(params, mask), **OPTIONS[name]), params, 3)
    for path, p in tree.flatten_dict(ours).items():
        assert torch.equal(p, runs[mask[path]][path])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "schedule_free_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_by_one_has_the_same_bits(name, dtype, monkeypatch):
    params = tree.cast(begin(name), dtype)
    opt = getattr(optim, name)(weight_decay=0.1, mask=MASK, **OPTIONS[name])
    together = run(opt, params, 3)
    monkeypatch.setattr(_foreach, "_is_plain", lambda: False)
    assert tree.diff(together, run(opt, params, 3)) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tree", "function", "glob", "predicate"])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_traced(form, inside):
    """Made outside of the traced function, or inside it."""
    torch._dynamo.reset()
    params, mask = begin("adamw"), FORMS[form]
    outer = optim.adamw(0.05, weight_decay=0.1, mask=mask)

    def step(p, state):
        opt = optim.adamw(0.05, weight_decay=0.1, mask=mask) if inside else outer
        return opt.update(p, state, p)

    traced = torch.compile(step, fullgraph=True, backend="eager")
    close(traced(params, outer.init(params)), step(params, outer.init(params)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_jit(name):
    opt = getattr(optim, name)(weight_decay=0.1, mask=FORMS["function"], **OPTIONS[name])
    params = begin(name)
    close(run(opt._replace(update=jit(opt.update)), params, 3), run(opt, params, 3))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "schedule_free_sgd"])
def test_a_population_has_the_runs_of_its_members(name):
    opt = getattr(optim, name)(weight_decay=0.1, mask=FORMS["function"], **OPTIONS[name])
    members = [begin(name), tree.map(lambda p: 2 * p, begin(name))]
    stacked = tree.stack(members)
    updates, _ = vmap(opt.update)(stacked, vmap(opt.init)(stacked), stacked)
    alone = [opt.update(p, opt.init(p), p)[0] for p in members]
    close(updates, tree.stack(alone))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_state_in_a_file(name, tmp_path):
    opt = getattr(optim, name)(weight_decay=0.1, mask=MASK, **OPTIONS[name])
    params, state = run(opt, begin(name), 3)
    io.save(tmp_path / "state", state)
    again = io.load(tmp_path / "state", like=opt.init(params))
    assert tree.diff(run(opt, params, 3, state=again), run(opt, params, 3, state=state)) == []


def test_nothing_decays_if_a_tree_says_so():
    none = tree.map(lambda p: False, MASK)
    opt, plain = optim.adamw(weight_decay=0.1, mask=none), optim.adamw(weight_decay=0.0)
    assert tree.diff(run(opt, begin("adamw"), 3)[0], run(plain, begin("adamw"), 3)[0]) == []


def test_masked_freeze_and_labels_take_the_same_masks():
    params = begin("sgd")
    grads = tree.map(torch.ones_like, params)
    scaled = optim.masked(optim.scale(2.0), MASK)
    close(
        scaled.update(grads, scaled.init(params), params)[0],
        tree.map(lambda g, m: (1 + m) * g, grads, MASK),
    )
    frozen = optim.freeze(optim.scale(2.0), FORMS["function"])
    updates = frozen.update(grads, frozen.init(params), params)[0]
    assert tree.map(lambda u: u is None, updates) == MASK
    other = tree.map(lambda decays: not decays, MASK)
    opts = {"a": optim.scale(1.0), "b": optim.scale(2.0)}
    both = optim.multi_transform(opts, {"a": other, "b": MASK})
    close(both.update(grads, both.init(params), params), scaled_update(scaled, grads, params))


def scaled_update(opt, grads, params):
    return opt.update(grads, opt.init(params), params)[0], {"a": (), "b": ()}


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"vector": True}, ["adamw: mask: the trees have different structures", "nested.kernel"]),
        (lambda params: None, ["adamw: mask: the trees", "nested.matrix: missing"]),
        (
            tree.map(lambda m: int(m), MASK),
            ["adamw: a mask must have a bool for each parameter", "scalar: expected True or False"],
        ),
        (tree.map(lambda m: torch.tensor(m), MASK), ["nested.kernel: expected True or False, got"]),
        (True, ["adamw: a mask must have a bool for each parameter, got True alone; leave it out"]),
        ("*.wieght", ["adamw: '*.wieght' matches no path"]),
        (lambda path, leaf: leaf.ndim > 9, ["adamw: <function", "selects no path"]),
    ],
)
def test_errors_name_the_optimizer_and_every_path(mask, words):
    for name in ("adamw", "adafactor"):
        opt = getattr(optim, name)(weight_decay=0.1, mask=mask)
        with pytest.raises(ValueError, match=name) as caught:
            opt.init(start())
        for word in words:
            assert re.search(re.escape(word.replace("adamw", name)), str(caught.value))


class Matrices:
    """Masks that are objects and methods: of the parameters, and of a path and a leaf."""

    def __call__(self, params):
        return tree.map(lambda leaf: leaf.ndim == 2, params)

    def of_leaf(self, path, leaf):
        return leaf.ndim == 2


@pytest.mark.parametrize(
    "mask", [Matrices(), Matrices().__call__, Matrices().of_leaf], ids=range(3)
)
def test_objects_and_methods_as_masks_are_traced_by_dynamo(mask):
    params = {"w": draw(1, 2, 2), "b": draw(2, 2)}
    opt = optim.sgd(0.1, weight_decay=0.5, mask=mask)
    state = opt.init(params)
    update = torch.compile(opt.update, fullgraph=True, backend="eager")
    updates, _ = update(tree.map(torch.zeros_like, params), state, params)
    close(updates, {"w": -0.05 * params["w"], "b": torch.zeros_like(params["b"])})
