"""Optimizers of other libraries: pairs of functions in several conventions, used as they are."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import fdl
from fdl import io, losses, nn, optim, population, random, tree
from fdl.optim._as_optimizer import as_optimizer
from tests.support.asserts import close, draw, unchanged

NET = nn.sequential(nn.linear(3, 4), nn.tanh, nn.linear(4, 2))
PARAMS = tree.cast(NET.init(random.key(0)), torch.float64)
BATCH = draw(1, 6, 3), draw(2, 6, 2)
LOSS = fdl.supervised(NET, losses.mse)
OURS = optim.sgd(0.1, momentum=0.9)  # the oracle


class TraceState(NamedTuple):
    trace: Any


class GradientTransformation(NamedTuple):
    init: Any
    update: Any


def start(params):
    return TraceState(tree.map(torch.zeros_like, params))


def momentum(grads, state):
    trace = tree.map(lambda g, t: 0.9 * t + g, grads, state.trace)
    return tree.map(lambda t: -0.1 * t, trace), TraceState(trace)


def as_torchopt(updates, state, *, params=None, inplace=True):
    """Overwrites gradients and state unless it is told not to."""
    assert params is not None
    if not inplace:
        return momentum(updates, state)
    trace = tree.map(lambda g, t: t.mul_(0.9).add_(g), updates, state.trace)
    return tree.map(lambda g, t: g.copy_(t).mul_(-0.1), updates, trace), state


class Object:
    """Two methods, of which one is given the loss."""

    def init(self, params):
        return start(params)

    def update(self, grads, state, params=None, *, value):
        assert value.ndim == 0 and params is not None
        return momentum(grads, state)


OTHERS = {
    "torchopt": GradientTransformation(start, as_torchopt),
    "optax": GradientTransformation(start, lambda g, state, params=None: momentum(g, state)),
    "any keyword": (start, lambda grads, state, params=None, **extra: momentum(grads, state)),
    "two arguments": (start, momentum),
    "an object": Object(),
}  # fmt: skip
each = pytest.mark.parametrize("theirs", OTHERS.values(), ids=OTHERS)


def trained(opt, steps=3, step=None):
    state = fdl.TrainState.create(NET, opt, key=random.key(1), params=PARAMS)
    step = step or fdl.train_step(LOSS, opt)
    for _ in range(steps):
        with unchanged(state, BATCH):
            new = step(state, BATCH)[0]
        state = new
    return state


@each
def test_a_step_equals_that_of_the_same_optimizer_of_fdl_and_changes_no_input(theirs):
    close(trained(theirs).params, trained(OURS).params)


@pytest.mark.parametrize(
    "around",
    [
        lambda opt: optim.chain(optim.clip_by_global_norm(0.1), opt),
        lambda opt: optim.accumulate(opt, 2),
        lambda opt: optim.lookahead(opt, 2),
        optim.apply_if_finite,
        optim.loss_scale,
        lambda opt: optim.masked(opt, "0.*"),
        lambda opt: optim.freeze(opt, "0.*"),
        lambda opt: optim.multi_transform({"a": opt, "b": opt}, {"a": "0.*", "b": "2.*"}),
    ],
)
def test_what_takes_an_optimizer_takes_one_of_others(around):
    theirs = OTHERS["torchopt"]
    close(trained(around(theirs)).params, trained(around(OURS)).params)


def test_16_bits_are_rounded_once_inside_a_chain():
    opt = optim.chain(OTHERS["torchopt"])
    params = tree.cast(PARAMS, torch.bfloat16)
    updates, state = opt.update(params, opt.init(params), params)
    assert {leaf.dtype for leaf in tree.leaves(updates)} == {torch.bfloat16}
    assert {leaf.dtype for leaf in tree.leaves(state)} == {torch.float32}


@each
def test_members_of_a_population_train_as_they_would_alone(theirs):
    keys = random.split(random.key(3), 2)
    states = population.create(NET, theirs, keys)
    step = fdl.train_step(LOSS, theirs)
    batch = tree.cast(BATCH, torch.float32)
    trained, _ = torch.vmap(step, (0, None))(states, batch)
    alone, _ = step(fdl.TrainState.create(NET, theirs, key=keys[1]), batch)
    close(population.member(trained, 1), alone, rtol=1e-5, atol=1e-7)


def test_a_jitted_step_equals_an_eager_one(plain_backend):
    theirs = OTHERS["torchopt"]
    close(trained(theirs, step=fdl.jit(fdl.train_step(LOSS, theirs))), trained(theirs))


@each
def test_a_state_is_saved_and_loaded(theirs, tmp_path):
    state = trained(theirs)
    io.save(tmp_path / "state.safetensors", state)
    like = trained(theirs, 0)
    assert tree.diff(io.load(tmp_path / "state.safetensors", like=like), state) == []


def seen_by(update):
    """The arguments that an update gets, by name; `update` returns its locals as updates."""
    opt = as_optimizer("here", (lambda params: (), update))
    return opt.update("grads", "state", "params", value=1, value_fn=2, count=3)[0]


@pytest.mark.parametrize(
    ("update", "seen"),
    [
        (lambda g, s: (locals(), ()), {"g": "grads", "s": "state"}),
        (lambda g, s, p: (locals(), ()), {"g": "grads", "s": "state", "p": "params"}),
        (lambda g, s, p, /: (locals(), ()), {"g": "grads", "s": "state", "p": "params"}),
        (lambda *all: (locals(), ()), {"all": ("grads", "state", "params")}),
        (lambda g, s, value: (locals(), ()), {"g": "grads", "s": "state", "value": 1}),
        (lambda g, s, inplace=True: (locals(), ()), {"g": "grads", "s": "state", "inplace": False}),
        (lambda g, s, *, params, count=0: (locals(), ()),
         {"g": "grads", "s": "state", "params": "params", "count": 3}),
        (lambda g, s, **rest: (locals(), ()),
         {"g": "grads", "s": "state",
          "rest": {"value": 1, "value_fn": 2, "count": 3, "params": "params"}}),
        (lambda g, s, p, grad=None, value_fn=None: (locals(), ()),
         {"g": "grads", "s": "state", "p": "params", "grad": None, "value_fn": 2}),
    ],
)  # fmt: skip
def test_an_update_gets_what_its_signature_has(update, seen):
    assert seen_by(update) == seen


def test_an_update_that_returns_no_pair_is_named():
    """A dict of two parameters would unpack into its keys."""
    step = fdl.train_step(LOSS, (start, lambda grads, state: {"weight": grads, "bias": state}))
    with pytest.raises(TypeError, match=r"^train_step: opt.update must return \(updates, state\)"):
        step(fdl.TrainState.create(NET, optim.sgd(0.1), key=random.key(1), params=PARAMS), BATCH)


def test_an_optimizer_that_takes_everything_is_returned_as_it_is():
    opt = optim.adam()
    assert as_optimizer("here", opt) is opt


class Class:
    init = staticmethod(start)
    update = staticmethod(momentum)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ((start, 3), "opt must be an optimizer such as .*, got a tuple"),
        ((start, momentum, momentum), "opt must be an optimizer such as .*, got a tuple"),
        ((GradientTransformation, momentum), "opt must be an optimizer such as .*, got a tuple"),
        (Class, "opt must be an optimizer such as .*, got the class Class"),
        (SimpleNamespace(init=start), "opt must be an optimizer such as .*, got a SimpleNamespace"),
        (NET, "opt must be an optimizer such as .*, got a Model"),
        (
            optim.adam,
            r"opt must be an optimizer such as .*, got the function adam; call it: adam\(",
        ),
        (torch.optim.SGD([torch.ones(1)]), "opt must be an optimizer such as .*, got a SGD"),
        (
            (lambda: (), momentum),
            r"opt.init must accept \(params\), got .* with the signature \(\)",
        ),
        ((start, lambda grads: grads), r"opt.update must accept \(grads, state, params\), got "),
        ((start, lambda g, s, p, closure: g), "opt.update must accept .*'closure'"),
    ],
)
def test_what_is_no_optimizer_is_an_error_that_says_what_is(wrong, text):
    for make in (
        lambda: fdl.train_step(LOSS, wrong),
        lambda: fdl.TrainState.create(NET, wrong, key=random.key(0)),
    ):
        with pytest.raises(TypeError, match=f"^(train_step|TrainState.create): {text}"):
            make()


def test_torch_compile_cannot_read_a_signature_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(TypeError, match=r"^chain: part 0 is a tuple, .* outside of the function"):
        optim.chain((start, momentum))
