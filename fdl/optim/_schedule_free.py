"""Optimizers that average their iterates instead of lowering the learning rate.

There are three sequences: z takes the steps, x is a mean of the z, and gradients are taken at y,
between the two. The parameters of training are y, and the state holds z. Evaluate and keep x, which
`schedule_free_params` computes from both. Source: Defazio et al., The Road Less Scheduled, 2024,
https://arxiv.org/abs/2405.15682
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._kinds import register
from fdl._numerics import root
from fdl.optim._base import Optimizer, State, check_floating, in_32_bits
from fdl.optim._descent import decayed, negated
from fdl.optim._hyperparams import (
    AT_LEAST_0,
    RANGES,
    ScalarOrSchedule,
    check_rate,
    init_hyper,
    named_rates,
    next_hyper,
    rates_now,
)
from fdl.optim._leafwise import Result, Step, apply_rules, chain, leafwise
from fdl.optim._masking import Mask
from fdl.tree import Tree


@register
class ScheduleFreeState(NamedTuple):
    """The state of `schedule_free`."""

    steps: State  # its slot: z
    weight_sum: Tensor  # float64 [], sum of the weights of all z so far
    lr_max: Tensor  # float64 [], largest lr so far
    beta: Tensor  # float64 [], β with which y was computed; initially 1, as x = y = z


def schedule_free(
    lr: ScalarOrSchedule, beta: ScalarOrSchedule = 0.9, weight_lr_power: ScalarOrSchedule = 2.0
) -> Optimizer:
    """Step and average: the last link of a chain, in place of `scale_by_learning_rate`.

    With d the direction that the chain computed from the gradient at the parameters y:
    z ← z − γd; x ← (1−c)x + cz; y ← βx + (1−β)z. Here γ is the lr, c = w / Σw, and w = γₘₐₓᵖ with
    γₘₐₓ the largest lr so far, so that steps during warm-up count less. Do not add momentum to the
    chain: β takes its place. Slot: `z`.

    x is not stored but recomputed as (y − (1−β)z)/β; with 16-bit parameters y the mean soon stops
    moving. Running statistics of batch normalization belong to y: recompute them for x with
    `fdl.update_bn` before you evaluate it. `optax.contrib.schedule_free` (0.2.8) computes w from
    the lr of the next step, which differs during warm-up, and sums w in the dtype of the
    parameters.

    Args:
        lr: γ: a number, a 0-d tensor or a schedule; it may warm up and should not decay.
        beta: β in (0, 1), likewise.
        weight_lr_power: p; with 0 all steps have the same weight.

    Raises:
        ValueError: `beta` is not in (0, 1), or another number is negative or not finite.

    >>> from fdl import optim
    >>> opt = chain(optim.clip_by_global_norm(1.0), schedule_free(0.5))
    >>> params = {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.5000])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        z: Tensor,
        lr: Tensor,
        beta: Tensor,
        old_beta: Tensor,
        share: Tensor,
    ) -> Result:
        x = _average(p, z, old_beta)
        z = z - lr * g
        x = (1 - share) * x + share * z
        return beta * x + (1 - beta) * z - p, {"z": z}

    rates = {"lr": lr, "beta": beta, "weight_lr_power": weight_lr_power}
    for name, rate in rates.items():
        check_rate("schedule_free", name, rate, RANGES.get(name, AT_LEAST_0))

    def init(params: Tree) -> ScheduleFreeState:
        check_floating(params, "schedule_free")
        steps = State(init_hyper(rates, params), {"z": tree.map(torch.clone, params)})
        zero = torch.zeros_like(steps.hyper.count, dtype=torch.float64)
        return ScheduleFreeState(steps, zero, zero.clone(), torch.ones_like(zero))

    def update(
        grads: Tree, state: ScheduleFreeState, params: Tree, **extra: Any
    ) -> tuple[Tree, ScheduleFreeState]:
        hyper, slots = state.steps
        now = rates_now(rates, hyper)
        lr_max = torch.maximum(state.lr_max, now["lr"])
        weight = lr_max ** now["weight_lr_power"]
        total = state.weight_sum + weight
        share = weight / torch.where(total > 0, total, 1.0)  # 0 / 1 while the lr is 0
        scalars = {
            "lr": now["lr"],
            "beta": now["beta"],
            "old_beta": state.beta,
            "share": share,
        }
        step = Step("schedule_free", rule, slots, hyper.count, scalars)
        updates, (slots,) = apply_rules([step], grads, params)
        steps = State(next_hyper(rates, hyper), slots)
        return updates, ScheduleFreeState(steps, total, lr_max, now["beta"].clone())

    return in_32_bits(init, update)


def _average(y: Tensor, z: Tensor, beta: Tensor) -> Tensor:
    return (y - (1 - beta) * z) / beta


def schedule_free_params(state: Tree, params: Tree) -> Tree:
    """Compute the averaged parameters x, to evaluate and to keep, from those of training, y.

    Parameters that no schedule-free part of the state covers are returned unchanged. For the states
    of a population, `vmap` it.

    Args:
        state: state of an optimizer with `schedule_free` anywhere in it.
        params: the parameters of training, y.

    Raises:
        ValueError: the state has no schedule-free part, or belongs to other parameters (each path
            is listed).

    >>> opt, params = schedule_free_sgd(lr=0.5), {"w": torch.tensor([1.0])}
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     updates, state = opt.update({"w": torch.tensor([1.0])}, state, params)
    ...     params = {"w": params["w"] + updates["w"]}
    >>> params, schedule_free_params(state, params)
    ({'w': tensor([0.2250])}, {'w': tensor([0.2500])})
    """
    nodes = pytree.tree_leaves(state, is_leaf=lambda node: isinstance(node, ScheduleFreeState))
    parts = [node for node in nodes if isinstance(node, ScheduleFreeState)]
    if not parts:
        raise ValueError(
            "schedule_free_params: the state has no schedule-free part; it must be the state of an "
            "optimizer with optim.schedule_free in it, such as optim.schedule_free_sgd"
        )
    flat = tree.flatten_dict(params)
    lines = []
    for part in parts:
        for path, z in tree.flatten_dict(part.steps.slots["z"]).items():
            if path not in flat or flat[path].shape != z.shape:
                got = f"got {list(flat[path].shape)}" if path in flat else "missing"
                lines.append(f"{path}: expected {list(z.shape)}, {got}")
            else:
                y = flat[path]
                flat[path] = _average(y, z, part.beta).to(y.dtype)
    if lines:
        raise ValueError(
            "schedule_free_params: the state belongs to other parameters:\n  " + "\n  ".join(lines)
        )
    return tree.unflatten_dict(flat, like=params)


def schedule_free_sgd(
    lr: ScalarOrSchedule = 1.0,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_lr_power: ScalarOrSchedule = 2.0,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """SGD without a schedule: averaged steps −lr · (g + λy).

    See `schedule_free`, also for batch normalization and for the difference from optax during
    warm-up; evaluate `schedule_free_params`. The defaults are those of the authors' program and of
    `optax.contrib.schedule_free_sgd`. Source: Defazio et al., The Road Less Scheduled, 2024,
    https://arxiv.org/abs/2405.15682

    Args:
        lr: the learning rate; it may warm up and should not decay.
        momentum: β in (0, 1); the larger, the closer the parameters of training are to the mean.
        weight_decay: λ.
        weight_lr_power: p; the weight of a step in the mean is lrᵖ.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: `momentum` is not in (0, 1), or another number is negative or not finite.

    >>> opt, params = schedule_free_sgd(lr=0.1), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.2000])}
    """
    return _average_steps(
        "schedule_free_sgd",
        [],
        lr,
        ("momentum", momentum),
        decayed("schedule_free_sgd", weight_decay, mask),
        weight_lr_power,
        maximize,
    )


def schedule_free_adamw(
    lr: ScalarOrSchedule = 2.5e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_lr_power: ScalarOrSchedule = 2.0,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """AdamW without a schedule: averaged steps −lr · (g / (√v̂ + ε) + λy).

    v ← β₂v + (1−β₂)g² and v̂ = v/(1−β₂ᵗ) as in Adam. Slots: `exp_avg_sq` v, `z`. See
    `schedule_free`, also for batch normalization and for the difference from optax during warm-up;
    evaluate `schedule_free_params`. The defaults are those of the authors' program and of
    `optax.contrib.schedule_free_adamw`. Source: Defazio et al., The Road Less Scheduled, 2024,
    https://arxiv.org/abs/2405.15682

    Args:
        lr: the learning rate; it may warm up and should not decay.
        betas: β in (0, 1), with a larger one the parameters of training are closer to the mean; β₂.
        eps: added to the root in the denominator.
        weight_decay: λ.
        weight_lr_power: p; the weight of a step in the mean is lrᵖ.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: `betas[0]` is not in (0, 1), or another number is not finite or out of its
            range.

    >>> opt, params = schedule_free_adamw(lr=0.1), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """

    def rule(
        g: Tensor, p: Tensor, t: Tensor, exp_avg_sq: Tensor, beta2: Tensor, eps: Tensor
    ) -> Result:
        v = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
        return g / (root(v) / (1 - beta2**t).sqrt() + eps), {"exp_avg_sq": v}

    caller = "schedule_free_adamw"
    beta1, beta2 = named_rates(caller, "betas", betas, "beta1", "beta2").values()
    rates = {"beta2": beta2, "eps": eps}
    direction = leafwise(caller, rule, rates, {"exp_avg_sq": torch.zeros_like}, RANGES)
    return _average_steps(
        caller,
        [direction],
        lr,
        ("betas[0]", beta1),
        decayed(caller, weight_decay, mask),
        weight_lr_power,
        maximize,
    )


def _average_steps(
    caller: str,
    direction: list[Optimizer],
    lr: ScalarOrSchedule,
    beta: tuple[str, ScalarOrSchedule],
    decay: list[Optimizer],
    weight_lr_power: ScalarOrSchedule,
    maximize: bool,
) -> Optimizer:
    check_rate(caller, "lr", lr)
    check_rate(caller, "weight_lr_power", weight_lr_power)
    name, rate = beta
    if isinstance(rate, (int, float)) and not 0 < rate < 1:
        raise ValueError(f"{caller}: {name} must be in (0, 1), got {rate}")
    check_rate(caller, name, rate, RANGES["beta"])
    steps = schedule_free(lr, rate, weight_lr_power)
    return chain(*negated(maximize), *direction, *decay, steps)
