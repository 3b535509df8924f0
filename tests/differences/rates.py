"""A table of docs/differences/optimizers.md: rates, schedules and counts."""

import warnings
from functools import partial

import torch

from fdl import optim
from fdl.optim import schedules
from tests.differences.tables import Table
from tests.differences.walks import library, walk_fdl, walk_optax, walk_torch
from tests.support.jax import x64

CAUSE = "cause of the difference"
ONE = {"w": torch.ones(1)}


def shown(rates):
    """Rates as a reader compares them."""
    return ", ".join(f"{float(x):.6g}" for x in rates)


def torch_rates(make, steps, lr=1.0):
    """The rates of the first updates under a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def at(schedule, counts):
    """The values of a pure schedule of fdl at some counts."""
    return shown(schedule(torch.tensor(counts)))


def optax_at(make, counts):
    """Those of a schedule of optax, in float64, if it is installed."""
    if (optax := library("optax")) is None:
        return {}
    with x64():
        schedule = make(optax)
        return {"optax": shown([schedule(count) for count in counts])}


def one_cycle_past_the_end():
    """The last rate of ten, and the next one."""
    make = torch.optim.lr_scheduler.OneCycleLR
    last = torch_rates(lambda o: make(o, 1.0, total_steps=10), 9)[-1]
    try:
        torch_rates(lambda o: make(o, 1.0, total_steps=10), 11)
        theirs = "no error"
    except ValueError as error:
        theirs = f"ValueError: {str(error).partition('.')[0]}"
    return {
        "fdl": at(schedules.one_cycle(1.0, 10), [8, 9, 10]),
        "torch": f"{last:.6g}, …, {theirs}",
        **optax_at(lambda o: o.cosine_onecycle_schedule(10, 1.0), [8, 9, 10]),
        CAUSE: "the last of ten is update 9, in optax 10; only torch raises an error past it",
    }


def cosine_past_the_end():
    """Half a cosine over 10 updates, and beyond."""
    make = torch.optim.lr_scheduler.CosineAnnealingLR
    found = torch_rates(lambda o: make(o, 10), 21)
    return {
        "fdl": at(schedules.cosine_annealing(1.0, 10), [10, 15, 20]),
        "torch": shown(found[i] for i in (10, 15, 20)),
        **optax_at(lambda o: o.cosine_decay_schedule(1.0, 10), [10, 15, 20]),
        CAUSE: "optax holds the last value",
    }


def cosine_in_float32():
    """Update 5 of 10 of a cosine as each computes it by default."""
    cells = {"fdl": f"{float(schedules.cosine_annealing(0.1, 10)(torch.tensor(3))):.17g}"}
    make = torch.optim.lr_scheduler.CosineAnnealingLR
    cells["torch"] = f"{torch_rates(lambda o: make(o, 10), 4, 0.1)[3]:.17g}"
    if optax := library("optax"):
        cells["optax"] = f"{float(optax.cosine_decay_schedule(0.1, 10)(3)):.17g}"
    cause = "float64; torch multiplies the last rate, so errors add up; optax: float32"
    return cells | {CAUSE: cause}


def plateau(value, cause):
    """The rate after ten looks at one loss, with a patience of two."""
    opt = optim.reduce_on_plateau(optim.sgd(1.0), patience=2)
    state = opt.init(ONE)
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
    for _ in range(10):
        _, state = opt.update(ONE, state, ONE, value=value)
        scheduler.step(value)
    cells = {
        "fdl": shown([optim.hyperparams(state)["lr"]]),
        "torch": shown([optimizer.param_groups[0]["lr"]]),
    }
    if optax := library("optax"):
        import jax.numpy as jnp

        link = optax.contrib.reduce_on_plateau(factor=0.1, patience=2, rtol=1e-4)
        w = jnp.ones(1)
        state = link.init(w)
        for _ in range(10):
            _, state = link.update(w, state, value=value)
        cells["optax"] = shown([state.scale])
    return cells | {CAUSE: cause}


def tensor_rate():
    """A step of SGD with a float32 tensor as rate and float64 parameters, on a gradient of 1."""
    start = {"w": torch.zeros(1, dtype=torch.float64)}
    gradient = [{"w": torch.ones(1, dtype=torch.float64)}]
    lr = torch.tensor(0.1)
    cells = {
        "fdl": walk_fdl(optim.sgd(lr), start, gradient)[0]["w"].item(),
        "torch": walk_torch(lambda p: torch.optim.SGD(p, lr=lr), start, gradient)[0]["w"].item(),
    }
    if optax := library("optax"):
        import jax.numpy as jnp

        opt = optax.sgd(jnp.float32(0.1))
        cells["optax"] = walk_optax(opt, start, gradient)[0]["w"].item()
    why = "write a number, or a float64 tensor"
    return {name: f"{x:.12g}" for name, x in cells.items()} | {CAUSE: why}


def rate_in_the_state():
    """The rate that an optimizer of bfloat16 parameters keeps, given 0.1."""
    half = {"w": torch.ones(1).bfloat16()}
    cells = {"fdl": optim.hyperparams(optim.sgd(0.1).init(half))["lr"].item()}
    cells["torch"] = torch.optim.SGD([half["w"].requires_grad_()], lr=0.1).param_groups[0]["lr"]
    if optax := library("optax"):
        import jax.numpy as jnp

        opt, w = optax.inject_hyperparams(optax.sgd)(0.1), jnp.ones(1, dtype=jnp.bfloat16)
        _, state = opt.update(w, opt.init(w), w)
        cells["optax"] = float(state.hyperparams["learning_rate"])
    why = "`inject_hyperparams` casts rates to the dtype of the gradients"
    return {name: f"{x:.9g}" for name, x in cells.items()} | {CAUSE: why}


def cosine_at_5():
    """An optimizer of torch and its cosine of 10 updates, after 5 of them."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def another_horizon():
    """A cosine of 10 updates, resumed at update 5 with one of 20: the rates of updates 5 and 6."""
    optimizer, scheduler = cosine_at_5()
    saved = optimizer.state_dict(), scheduler.state_dict()
    again = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    longer = torch.optim.lr_scheduler.CosineAnnealingLR(again, 20)
    again.load_state_dict(saved[0])
    longer.load_state_dict(saved[1])
    first = again.param_groups[0]["lr"]
    again.step()
    longer.step()
    return {
        "fdl": at(schedules.cosine_annealing(1.0, 20), [5, 6]),
        "torch": shown([first, again.param_groups[0]["lr"]]),
        **optax_at(lambda o: o.cosine_decay_schedule(1.0, 20), [5, 6]),
        CAUSE: "`load_state_dict` of a scheduler brings back the old `T_max` as well",
    }


def another_horizon_by_last_epoch():
    """The same without the state of the scheduler: `last_epoch` says where it is."""
    optimizer, _ = cosine_at_5()
    longer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, last_epoch=4)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(15):
        optimizer.step()
        longer.step()
        found.append(optimizer.param_groups[0]["lr"])
    return {
        "fdl": at(schedules.cosine_annealing(1.0, 20), [5, 6, 20]),
        "torch": shown([found[0], found[1], found[-1]]),
        **optax_at(lambda o: o.cosine_decay_schedule(1.0, 20), [5, 6, 20]),
        CAUSE: "torch goes on from the old rate by the factors of the new curve",
    }


def count_after(count, cause):
    """A row: the count of Adam one update after `count`."""
    w = torch.ones(1, requires_grad=True)
    w.grad = torch.ones(1)
    theirs = torch.optim.Adam([w])
    theirs.step()
    theirs.state[w]["step"].fill_(float(count))
    theirs.step()
    opt = optim.adam()
    first, *rest = opt.init(ONE)
    late = first._replace(hyper=first.hyper._replace(count=torch.tensor(count)))
    _, (first, *_) = opt.update(ONE, (late, *rest), ONE)
    cells = {"fdl": str(int(first.hyper.count)), "torch": str(int(theirs.state[w]["step"]))}
    if optax := library("optax"):
        import jax.numpy as jnp

        link, one = optax.scale_by_adam(), jnp.ones(1)
        state = link.init(one)._replace(count=jnp.int32(count))
        cells["optax"] = str(int(link.update(one, state)[1].count))
    return cells | {CAUSE: cause}


def a_sequence():
    """Two schedules, one after the other at update 3."""
    kinds = torch.optim.lr_scheduler

    def make(optimizer):
        parts = [kinds.ConstantLR(optimizer, 0.5, 100), kinds.ExponentialLR(optimizer, 0.5)]
        return kinds.SequentialLR(optimizer, parts, [3])

    joined = schedules.join([schedules.constant(0.5), schedules.exponential(1.0, 0.5)], [3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch_rates(make, 5)
    return {
        "fdl": at(joined, [0, 1, 2, 3, 4]),
        "torch": shown(theirs),
        **optax_at(
            lambda o: o.join_schedules(
                [o.constant_schedule(0.5), o.exponential_decay(1.0, 1, 0.5)], [3]
            ),
            range(5),
        ),
        CAUSE: "–",
    }


def clipped():
    """A gradient of norm 2, clipped to 1."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    w.grad = torch.full_like(w, 2.0)
    torch.nn.utils.clip_grad_norm_([w], 1.0)
    opt, g = optim.clip_by_global_norm(1.0), {"w": torch.full((1,), 2.0).double()}
    cells = {"fdl": opt.update(g, opt.init(g), g)[0]["w"].item(), "torch": w.grad.item()}
    if optax := library("optax"):
        import jax.numpy as jnp

        with x64():
            two = jnp.full((1,), 2.0)
            link = optax.clip_by_global_norm(1.0)
            cells["optax"] = link.update(two, link.init(two))[0].item()
    why = "torch divides by the norm + 1e-6"
    return {name: f"{x:.9g}" for name, x in cells.items()} | {CAUSE: why}


ROWS = {
    "OneCycle of 10 updates: updates 8, 9, 10": one_cycle_past_the_end,
    "cosine over 10 updates: updates 10, 15, 20": cosine_past_the_end,
    "cosine of 0.1 over 10 updates: update 3": cosine_in_float32,
    "SequentialLR: constant, then exponential from update 3": a_sequence,
    "plateau, loss 10 ten times, patience 2": partial(
        plateau, 10.0, "fdl, torch: a look more than `patience`; optax reduces at `patience`"
    ),
    "plateau, loss −10 ten times, patience 2": partial(
        plateau, -10.0, "torch: −10 is better than −10 · (1 − 1e-4), so each look is an improvement"
    ),
    "plateau, loss NaN ten times, patience 2": partial(
        plateau, float("nan"), "as for 10: NaN is no improvement"
    ),
    "rate a float32 tensor of 0.1, float64 parameters: first step": tensor_rate,
    "rate 0.1 in the state, bfloat16 parameters": rate_in_the_state,
    "cosine of 10 resumed at 5 as one of 20, by `load_state_dict`: 5, 6": another_horizon,
    "cosine of 10 resumed at 5 as one of 20, by `last_epoch`: 5, 6, 20": (
        another_horizon_by_last_epoch
    ),
    "Adam's count after 2²⁴ + 1 updates": partial(
        count_after, 2**24, "torch counts in float32; fdl in int64, optax in int32"
    ),
    "Adam's count after 2³¹ updates": partial(
        count_after, 2**31 - 1, "optax holds its largest count"
    ),
    "gradient of norm 2 clipped to 1": clipped,
}

TABLES = (
    Table("rates", ("what", "fdl", "torch", "optax", CAUSE), ROWS, ("torch", "optax", "jax")),
)
