"""A table of docs/differences/optimizers.md: schedule-free training.

Compared are the parameters of training; what the mean x weighs is seen in them one step later.
"""

from functools import partial

import torch

from fdl import optim
from tests.differences.tables import Table
from tests.differences.walks import (
    constant,
    library,
    moved,
    noise,
    parted,
    start,
    walk_fdl,
    walk_optax,
    walk_torch,
)

CAUSE = "cause of the difference"


def warm(count):
    """The rate of schedulefree's `warmup_steps=10`: a tenth in the first step."""
    return 0.1 * ((count + 1.0) / 10).clamp(max=1)


def optax_warm(count):
    """The same for optax, which asks for the rate of the step after."""
    import jax.numpy as jnp

    return 0.1 * jnp.minimum(jnp.float64(count) / 10, 1.0)


def _theirs(name, **options):
    return lambda parameters: getattr(library("schedulefree"), name)(parameters, **options)


# Ours, schedulefree's, optax's, and why they part.
CASES = {
    "SGD": (
        lambda: optim.schedule_free_sgd(0.1),
        _theirs("SGDScheduleFree", lr=0.1),
        lambda o: o.contrib.schedule_free_sgd(0.1),
        "–",
    ),
    "SGD, decay 0.1": (
        lambda: optim.schedule_free_sgd(0.1, weight_decay=0.1),
        _theirs("SGDScheduleFree", lr=0.1, weight_decay=0.1),
        lambda o: o.contrib.schedule_free_sgd(0.1, weight_decay=0.1),
        "–",
    ),
    "AdamW, decay 0.1": (
        lambda: optim.schedule_free_adamw(0.1, weight_decay=0.1),
        _theirs("AdamWScheduleFree", lr=0.1, weight_decay=0.1),
        lambda o: o.contrib.schedule_free_adamw(0.1, weight_decay=0.1),
        "–",
    ),
    "AdamW, `weight_lr_power=0`, β 0.5": (
        lambda: optim.schedule_free_adamw(0.1, (0.5, 0.999), weight_lr_power=0.0),
        _theirs("AdamWScheduleFree", lr=0.1, betas=(0.5, 0.999), weight_lr_power=0.0),
        lambda o: o.contrib.schedule_free_adamw(0.1, b1=0.5, weight_lr_power=0.0),
        "–",
    ),
    "AdamW, `warmup_steps=10`": (
        lambda: optim.schedule_free_adamw(warm),
        _theirs("AdamWScheduleFree", lr=0.1, warmup_steps=10),
        lambda o: o.contrib.schedule_free_adamw(0.1, warmup_steps=10),
        "the rates of schedulefree begin at lr / 10, those of optax at 0; optax weighs a step by "
        "the rate of the next one",
    ),
    "SGD, the same rates in all": (
        lambda: optim.schedule_free_sgd(warm),
        _theirs("SGDScheduleFree", lr=0.1, warmup_steps=10),
        lambda o: o.contrib.schedule_free(
            o.sgd(lambda count: optax_warm(count + 1)), lambda count: optax_warm(count + 1)
        ),
        "optax weighs a step by the rate of the next one",
    ),
    "SGD, and optax's weights one step back": (
        lambda: optim.schedule_free_sgd(warm),
        None,
        lambda o: o.contrib.schedule_free(o.sgd(lambda count: optax_warm(count + 1)), optax_warm),
        "–",
    ),
}


def _walks(theirs, optax):
    walks = {}
    if theirs is not None and library("schedulefree"):
        walks["schedulefree"] = partial(walk_torch, theirs)
    if library("optax"):
        walks["optax"] = partial(walk_optax, optax(library("optax")))
    return walks


def same_steps(ours, theirs, optax, cause):
    """A row in float64: where each library parts from fdl."""
    begin, gradients = start(), noise()
    path = moved(walk_fdl(ours(), begin, gradients), begin)
    return {
        name: parted(path, moved(walk(begin, gradients), begin))
        for name, walk in _walks(theirs, optax).items()
    } | {"fdl": "–", CAUSE: cause}


def long_mean():
    """A row in bfloat16: 300 steps up and then 300 down, so that the mean x is where it began.

    The gradient is ±2⁻⁸, which every sum here holds exactly, if it holds the number of steps.
    """
    zeros = {name: torch.zeros_like(x, dtype=torch.bfloat16) for name, x in start().items()}
    up, down = (constant(sign * 2.0**-8, torch.bfloat16, 300) for sign in (-1, 1))
    ours, theirs, optax, _ = CASES["SGD"]
    walks = {"fdl": partial(walk_fdl, ours())} | _walks(theirs, optax)
    last = {name: walk(zeros, up + down)[-1]["vector"][0] for name, walk in walks.items()}
    wide = {name: x.double() for name, x in zeros.items()}
    both = [{name: x.double() for name, x in g.items()} for g in up + down]
    right = walk_fdl(ours(), wide, both)[-1]["vector"][0]
    why = f"in float64 {float(right):.3g}: optax sums the weights in the dtype of the parameters"
    return {name: f"{float(x):.3g}" for name, x in last.items()} | {CAUSE: why}


TABLE = Table(
    "schedule-free",
    ("optimizer", "fdl", "schedulefree", "optax", CAUSE),
    {name: partial(same_steps, *case) for name, case in CASES.items()}
    | {"SGD, bfloat16: the parameter after 300 steps up and 300 down": long_mean},
    ("torch", "schedulefree", "optax", "jax"),
)
