"""Measures docs/differences/optimizers.md: the steps of every library on the same gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from fdl import optim
from tests.differences import free, rates
from tests.differences.elsewhere import oldest
from tests.differences.tables import Table
from tests.differences.walks import (
    STEPS,
    WALKS,
    constant,
    library,
    moved,
    noise,
    parted,
    start,
    walk_fdl,
)


class Case(NamedTuple):
    """An optimizer of fdl and what the other libraries call it, with the options of fdl."""

    ours: Callable[[], Any]
    cause: str = ""  # of what differs
    torch: Callable[[Any, Any], Any] | None = None  # of the module and the parameters
    optax: Callable[[Any], Any] | None = None  # of the module
    torchopt: Callable[[Any], Any] | None = None
    keras: Callable[[Any], Any] | None = None

    def theirs(self, name):
        """What walks with a library, or None where it has no such optimizer or is not there."""
        make, module = getattr(self, name), library(name)
        if make is None or module is None:
            return None
        if name == "torch":
            return partial(WALKS[name], lambda p: make(module.optim, p))
        if name == "keras":
            return partial(WALKS[name], lambda: make(module.optimizers))
        return partial(WALKS[name], make(module))


PEERS = ("torch", "optax", "torchopt", "keras")

CASES = {
    "SGD, momentum 0.9": Case(
        lambda: optim.sgd(0.1, 0.9),
        "",
        lambda t, p: t.SGD(p, 0.1, 0.9),
        lambda o: o.sgd(0.1, 0.9),
        lambda o: o.sgd(0.1, 0.9),
        lambda k: k.SGD(0.1, 0.9),
    ),
    "SGD, Nesterov": Case(
        lambda: optim.sgd(0.1, 0.9, nesterov=True),
        "",
        lambda t, p: t.SGD(p, 0.1, 0.9, nesterov=True),
        lambda o: o.sgd(0.1, 0.9, nesterov=True),
        lambda o: o.sgd(0.1, 0.9, nesterov=True),
        lambda k: k.SGD(0.1, 0.9, nesterov=True),
    ),
    "SGD, momentum, decay 0.1": Case(
        lambda: optim.sgd(0.1, 0.9, weight_decay=0.1),
        "in Keras the decay is subtracted from the weight, lr · λw, and does not enter the "
        "momentum; in optax `add_decayed_weights` is chained before",
        lambda t, p: t.SGD(p, 0.1, 0.9, weight_decay=0.1),
        lambda o: o.chain(o.add_decayed_weights(0.1), o.sgd(0.1, 0.9)),
        lambda o: o.sgd(0.1, 0.9, weight_decay=0.1),
        lambda k: k.SGD(0.1, 0.9, weight_decay=0.1),
    ),
    "SGD, dampening 0.5": Case(
        lambda: optim.sgd(0.1, 0.9, 0.5),
        "the first momentum is the gradient itself in both",
        lambda t, p: t.SGD(p, 0.1, 0.9, 0.5),
        None,
        lambda o: o.sgd(0.1, 0.9, 0.5),
    ),
    "Adam": Case(
        lambda: optim.adam(0.1),
        "TorchOpt corrects the moments in float32; Keras adds ε to √v before the correction of v, "
        "so that ε counts for more",
        lambda t, p: t.Adam(p, 0.1),
        lambda o: o.adam(0.1),
        lambda o: o.adam(0.1),
        lambda k: k.Adam(0.1, epsilon=1e-8),
    ),
    "Adam, the rate a float32 tensor": Case(
        lambda: optim.adam(torch.tensor(0.1)),
        "torch divides the tensor by 1 − β₁ᵗ in float32, fdl in float64",
        lambda t, p: t.Adam(p, torch.tensor(0.1)),
    ),
    "Adam, the rate a float64 tensor": Case(
        lambda: optim.adam(torch.tensor(0.1, dtype=torch.float64)),
        "",
        lambda t, p: t.Adam(p, torch.tensor(0.1, dtype=torch.float64)),
    ),
    "Adam, ε = 0.1": Case(
        lambda: optim.adam(0.1, eps=0.1),
        "as for Adam",
        lambda t, p: t.Adam(p, 0.1, eps=0.1),
        lambda o: o.adam(0.1, eps=0.1),
        lambda o: o.adam(0.1, eps=0.1),
        lambda k: k.Adam(0.1, epsilon=0.1),
    ),
    "Adam, decay 0.1 in the gradient": Case(
        lambda: optim.adam(0.1, weight_decay=0.1),
        "in Keras `weight_decay` is decoupled in every optimizer; TorchOpt as above",
        lambda t, p: t.Adam(p, 0.1, weight_decay=0.1),
        lambda o: o.chain(o.add_decayed_weights(0.1), o.adam(0.1)),
        lambda o: o.adam(0.1, weight_decay=0.1),
        lambda k: k.Adam(0.1, epsilon=1e-8, weight_decay=0.1),
    ),
    "AdamW, decay 0.1": Case(
        lambda: optim.adamw(0.1, weight_decay=0.1),
        "as for Adam: all of them scale the decay by lr",
        lambda t, p: t.AdamW(p, 0.1, weight_decay=0.1),
        lambda o: o.adamw(0.1, weight_decay=0.1),
        lambda o: o.adamw(0.1, weight_decay=0.1),
        lambda k: k.AdamW(0.1, epsilon=1e-8, weight_decay=0.1),
    ),
    "AdamW, all defaults but lr": Case(
        lambda: optim.adamw(0.1),
        "λ is 0.01 in torch, TorchOpt and fdl, 1e-4 in optax, 0.004 in Keras, whose ε is 1e-7",
        lambda t, p: t.AdamW(p, 0.1),
        lambda o: o.adamw(0.1),
        lambda o: o.adamw(0.1),
        lambda k: k.AdamW(0.1),
    ),
    "AMSGrad": Case(
        lambda: optim.adam(0.1, amsgrad=True),
        "optax keeps the largest corrected v̂, torch and Keras the largest v, then corrected",
        lambda t, p: t.Adam(p, 0.1, amsgrad=True),
        lambda o: o.amsgrad(0.1),
        None,
        lambda k: k.Adam(0.1, epsilon=1e-8, amsgrad=True),
    ),
    "NAdam": Case(
        lambda: optim.nadam(0.1),
        "torch keeps the product of momenta in float32; optax has a constant momentum; "
        "Keras warms it up along another curve",
        lambda t, p: t.NAdam(p, 0.1),
        lambda o: o.nadam(0.1),
        None,
        lambda k: k.Nadam(0.1, epsilon=1e-8),
    ),
    "RAdam, ε = 1e-3": Case(
        lambda: optim.radam(0.1, eps=1e-3),
        "ε is 1e-3: torch adds it to √v before the correction, optax to √v̂; the first five steps "
        "do not divide by v",
        lambda t, p: t.RAdam(p, 0.1, eps=1e-3),
        lambda o: o.radam(0.1, eps=1e-3),
        lambda o: o.radam(0.1, eps=1e-3),
    ),
    "Adamax": Case(
        lambda: optim.adamax(0.1),
        "",
        lambda t, p: t.Adamax(p, 0.1),
        lambda o: o.adamax(0.1),
        lambda o: o.adamax(0.1, eps=1e-8),
        lambda k: k.Adamax(0.1, epsilon=1e-8),
    ),
    "Adamax, ε = 0.1": Case(
        lambda: optim.adamax(0.1, eps=0.1),
        "max(β₂u, abs(g) + ε) in torch and optax; Keras adds ε to the maximum when it divides",
        lambda t, p: t.Adamax(p, 0.1, eps=0.1),
        lambda o: o.adamax(0.1, eps=0.1),
        lambda o: o.adamax(0.1, eps=0.1),
        lambda k: k.Adamax(0.1, epsilon=0.1),
    ),
    "RMSprop, ε = 1e-4": Case(
        lambda: optim.rmsprop(0.1, 0.9, 1e-4),
        "optax and Keras add ε inside the root",
        lambda t, p: t.RMSprop(p, 0.1, 0.9, 1e-4),
        lambda o: o.rmsprop(0.1, 0.9, 1e-4),
        lambda o: o.rmsprop(0.1, 0.9, 1e-4),
        lambda k: k.RMSprop(0.1, 0.9, epsilon=1e-4),
    ),
    "RMSprop, ε = 1e-4, optax with `eps_in_sqrt=False`": Case(
        lambda: optim.rmsprop(0.1, 0.9, 1e-4),
        "",
        None,
        lambda o: o.rmsprop(0.1, 0.9, 1e-4, eps_in_sqrt=False),
    ),
    "RMSprop, centered, momentum 0.9": Case(
        lambda: optim.rmsprop(0.01, 0.9, 1e-8, momentum=0.9, centered=True),
        "Keras adds ε inside the root; optax does with its default `eps_in_sqrt=True`",
        lambda t, p: t.RMSprop(p, 0.01, 0.9, 1e-8, momentum=0.9, centered=True),
        lambda o: o.rmsprop(0.01, 0.9, 1e-8, momentum=0.9, centered=True, eps_in_sqrt=False),
        lambda o: o.rmsprop(0.01, 0.9, 1e-8, momentum=0.9, centered=True),
        lambda k: k.RMSprop(0.01, 0.9, momentum=0.9, centered=True, epsilon=1e-8),
    ),
    "Adagrad": Case(
        lambda: optim.adagrad(0.1),
        "defaults: the sum starts at 0 in torch, at 0.1 in optax and Keras; ε inside the root "
        "there, 1e-7",
        lambda t, p: t.Adagrad(p, 0.1),
        lambda o: o.adagrad(0.1),
        lambda o: o.adagrad(0.1),
        lambda k: k.Adagrad(0.1),
    ),
    "Adagrad, sum from 0.1, ε = 0": Case(
        lambda: optim.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0),
        "",
        lambda t, p: t.Adagrad(p, 0.1, initial_accumulator_value=0.1, eps=0.0),
        lambda o: o.adagrad(0.1, 0.1, 0.0),
        lambda o: o.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0),
        lambda k: k.Adagrad(0.1, 0.1, epsilon=0.0),
    ),
    "Adadelta, decay 0.1": Case(
        lambda: optim.adadelta(1.0, weight_decay=0.1),
        "Keras subtracts lr · λw, here with lr = 1",
        lambda t, p: t.Adadelta(p, 1.0, weight_decay=0.1),
        lambda o: o.adadelta(1.0, 0.9, 1e-6, weight_decay=0.1),
        lambda o: o.adadelta(1.0, 0.9, 1e-6, weight_decay=0.1),
        lambda k: k.Adadelta(1.0, 0.9, 1e-6, weight_decay=0.1),
    ),
    "Adadelta": Case(
        lambda: optim.adadelta(1.0),
        "",
        lambda t, p: t.Adadelta(p, 1.0),
        lambda o: o.adadelta(1.0, 0.9, 1e-6),
        lambda o: o.adadelta(1.0, 0.9, 1e-6),
        lambda k: k.Adadelta(1.0, 0.9, 1e-6),
    ),
    "Adafactor, defaults but lr": Case(
        lambda: optim.adafactor(0.1),
        "optax factors only leaves with axes of 128 or more; Keras rounds a number to float32",
        lambda t, p: t.Adafactor(p, 0.1),
        lambda o: o.adafactor(0.1),
        None,
        lambda k: k.Adafactor(0.1),
    ),
    "Adafactor, optax with `min_dim_size_to_factor=1`": Case(
        lambda: optim.adafactor(0.1),
        "optax computes the decay of v in float32, also for float64 parameters",
        None,
        lambda o: o.adafactor(0.1, min_dim_size_to_factor=1),
    ),
    "Lion, decay 0.1": Case(
        lambda: optim.lion(0.01, weight_decay=0.1),
        "",
        None,
        lambda o: o.lion(0.01, weight_decay=0.1),
        None,
        lambda k: k.Lion(0.01, weight_decay=0.1),
    ),
    "LAMB, decay 0.1": Case(
        lambda: optim.lamb(0.01, weight_decay=0.1),
        "Keras adds the decay outside the ratio, and its ε before the correction",
        None,
        lambda o: o.lamb(0.01, weight_decay=0.1),
        None,
        lambda k: k.Lamb(0.01, epsilon=1e-6, weight_decay=0.1),
    ),
    "LARS, decay 0.1": Case(
        lambda: optim.lars(1.0, weight_decay=0.1),
        "",
        None,
        lambda o: o.lars(1.0, weight_decay=0.1),
    ),
    "Adan": Case(
        lambda: optim.adan(0.1),
        "optax weighs the difference of gradients by 1 − β₂ where the paper has β₂",
        None,
        lambda o: o.adan(0.1, eps_root=0.0),
    ),
    "Adan, β₂ = ½": Case(
        lambda: optim.adan(0.1, (0.98, 0.5, 0.99)),
        "",
        None,
        lambda o: o.adan(0.1, 0.98, 0.5, 0.99, eps_root=0.0),
    ),
}

# Gradients of 1 and then 300 of 0.01: a second moment that cannot decay keeps the steps small.
FADING = constant(1.0, torch.bfloat16) + constant(0.01, torch.bfloat16, 300)

NARROW = (
    "SGD, momentum 0.9",
    "Adam",
    "AdamW, decay 0.1",
    "RMSprop, ε = 1e-4",
    "Adagrad, sum from 0.1, ε = 0",
    "Adadelta",
    "Lion, decay 0.1",
)


OLDEST = "torch 2.11"


def with_torch():
    """Where torch parts from fdl, by case: what another release of torch is asked for."""
    return {name: same_steps(name)["torch"] for name, case in CASES.items() if case.torch}


def same_steps(name):
    """A row of the first table: where each library parts from fdl in float64."""
    case = CASES[name]
    begin, gradients = start(), noise()
    ours = moved(walk_fdl(case.ours(), begin, gradients), begin)
    cells = {"cause of the difference": case.cause or "–"}
    for peer in PEERS:
        if walk := case.theirs(peer):
            cells[peer] = parted(ours, moved(walk(begin, gradients), begin))
    return cells


def steps_row(name):
    """The same, and with the oldest release of torch as well."""
    old = oldest("tests.differences.optimizers", "with_torch") or {}
    return same_steps(name) | ({OLDEST: old[name]} if name in old else {})


def in_16_bits(case, begin, gradients):
    """A row: how far bfloat16 is after all steps from float64 in the same library."""
    cells = {}
    exact = {name: x.double() for name, x in begin.items()}
    wide = [{name: x.double() for name, x in g.items()} for g in gradients]
    walks = {"fdl": partial(walk_fdl, case.ours())} | {n: case.theirs(n) for n in PEERS}
    for name, walk in walks.items():
        if walk is None:
            continue
        narrow = moved(walk(begin, gradients)[-1:], begin)[0]
        right = moved(walk(exact, wide)[-1:], exact)[0]
        apart = (narrow - right).abs().max() / right.abs().max()
        cells[name] = f"{float(apart):.2g}"
    return cells


HALF = {name: x.bfloat16() for name, x in start().items()}
PROBLEMS = {
    "50 steps of noise": (HALF, noise(torch.bfloat16)),
    "1, then 300 times 0.01": ({name: 0 * x for name, x in HALF.items()}, FADING),
}

# Gradients that are all alike, and the first step that they make, in units of the rate.
EXTREMES = {
    "1e-30, whose square is 0": (1e-30, torch.float32),
    "1e30, whose square is inf": (1e30, torch.float32),
    "0, in float16": (0.0, torch.float16),
}
STEEP = ("Adam", "Adamax", "RMSprop, ε = 1e-4", "Adagrad", "Adadelta", "Lion, decay 0.1")


def first_step(case, value, dtype):
    """A row: the first step from weights of 0."""
    zeros = {name: torch.zeros_like(x, dtype=dtype) for name, x in start().items()}
    walks = {"fdl": partial(walk_fdl, case.ours())} | {n: case.theirs(n) for n in PEERS}
    cells = {}
    for name, walk in walks.items():
        if walk is not None:
            cells[name] = f"{float(walk(zeros, constant(value, dtype))[0]['vector'][0]):.3g}"
    return cells


MADE_WITH = ("torch", "optax", "jax", "torchopt", "keras", "schedulefree")

TABLES = (
    Table(
        "steps",
        ("optimizer", OLDEST, *PEERS, "cause of the difference"),
        {name: partial(steps_row, name) for name in CASES},
        MADE_WITH,
    ),
    Table(
        "bfloat16",
        ("optimizer", "fdl", *PEERS),
        {
            f"{name}; {what}": partial(in_16_bits, CASES[name], *problem)
            for what, problem in PROBLEMS.items()
            for name in NARROW
        },
        MADE_WITH,
    ),
    Table(
        "extremes",
        ("optimizer and gradient", "fdl", *PEERS),
        {
            f"{name}; {what}": partial(first_step, CASES[name], value, dtype)
            for name in STEEP
            for what, (value, dtype) in EXTREMES.items()
        },
        MADE_WITH,
    ),
    free.TABLE,
    *rates.TABLES,
)

assert STEPS == 50, "the page says so"
