"""Two optimizers of torch with step sizes of their own: `rprop` and `asgd`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl.optim._base import Optimizer
from fdl.optim._descent import decayed, negated
from fdl.optim._hyperparams import RANGES, ScalarOrSchedule, check_rate, named_rates
from fdl.optim._leafwise import Result, chain, leafwise
from fdl.optim._masking import Mask


def rprop(
    lr: float | Tensor = 1e-2,
    etas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.5, 1.2),
    step_sizes: tuple[ScalarOrSchedule, ScalarOrSchedule] = (1e-6, 50.0),
    *,
    maximize: bool = False,
) -> Optimizer:
    """Step by the sign of the gradient, with steps that grow while it keeps its sign.

    Equals `torch.optim.Rprop`. Where g · g' > 0, g' being the last gradient, the step size s grows
    to η⁺s; where it is < 0, s shrinks to η⁻s and g is set to 0. w ← w − sign(g) · s. For full
    batches: the sign of a noisy gradient is unreliable. Slots: `prev` g', `step_size` s. Source:
    Riedmiller & Braun, A direct adaptive method for faster backpropagation learning: the RPROP
    algorithm, 1993.

    Args:
        lr: initial s; it is not a hyperparameter of the state, since only init reads it.
        etas: η⁻ in [0, 1), η⁺ above 1.
        step_sizes: smallest and largest s.
        maximize: maximize the objective instead.

    Raises:
        ValueError: a number that is not finite or out of its range.

    >>> opt, params = rprop(lr=0.1), {"w": torch.tensor([1.0, 1.0])}
    >>> opt.update({"w": torch.tensor([2.0, -3.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1000,  0.1000])}
    """
    if callable(lr) and not isinstance(lr, Tensor):
        raise TypeError(f"rprop: lr cannot be a schedule, since only init reads it, got {lr!r}")
    check_rate("rprop", "lr", lr)

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        prev: Tensor,
        step_size: Tensor,
        etaminus: Tensor,
        etaplus: Tensor,
        step_size_min: Tensor,
        step_size_max: Tensor,
    ) -> Result:
        same = g * prev
        factor = torch.where(same > 0, etaplus, torch.where(same < 0, etaminus, 1.0)).to(g.dtype)
        size = (step_size * factor).clamp(step_size_min.to(g.dtype), step_size_max.to(g.dtype))
        g = torch.where(same < 0, 0.0, g)
        return -g.sign() * size, {"prev": g, "step_size": size}

    limits = ("step_size_min", "step_size_max")
    rates = {
        **named_rates("rprop", "etas", etas, "etaminus", "etaplus"),
        **named_rates("rprop", "step_sizes", step_sizes, *limits),
    }
    slots = {
        "prev": torch.zeros_like,
        "step_size": lambda p: (
            torch.as_tensor(lr, dtype=p.dtype, device=p.device).expand_as(p).clone()
        ),
    }
    return chain(*negated(maximize), leafwise("rprop", rule, rates, slots, RANGES))


def asgd(
    lr: ScalarOrSchedule = 1e-2,
    lambd: ScalarOrSchedule = 1e-4,
    alpha: ScalarOrSchedule = 0.75,
    t0: ScalarOrSchedule = 1e6,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Gradient descent that also averages its iterates; equals `torch.optim.ASGD`.

    w ← (1 − λη)w − ηg, η = lr / (1 + λ·lr·t)^α; the average a ← a + (w − a)μ, μ = 1/max(1, t − t0),
    is for evaluation: `slots(state)["ax"]`. Slots: `ax` a, and for the next update `eta` η, `mu` μ
    (float64 []). As in torch, η is computed one update ahead: an lr that is replaced or scheduled
    takes effect one update later. Statistics of batch normalization belong to w. Source: Polyak &
    Juditsky, Acceleration of stochastic approximation by averaging, 1992.

    Args:
        lr: the learning rate.
        lambd: λ, the decay.
        alpha: α, exponent with which η falls.
        t0: number of updates after which the average starts; until then it is w.
        weight_decay: coefficient of w in the gradient, in addition to λ.
        maximize: maximize the objective instead.
        mask: parameters with this `weight_decay`, as in `add_decayed_weights`; all if None. λ
            applies to every parameter.

    Raises:
        ValueError: a number that is not finite or out of its range.

    >>> opt, params = asgd(lr=0.1, lambd=0.5), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.2500])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        ax: Tensor,
        eta: Tensor,
        mu: Tensor,
        lr: Tensor,
        lambd: Tensor,
        alpha: Tensor,
        t0: Tensor,
    ) -> Result:
        update = -eta * (lambd * p + g)
        average = ax + (p + update - ax) * mu
        next_eta = lr / (1 + lambd * lr * t) ** alpha
        next_mu = 1 / (t - t0).clamp(min=1.0)
        return update, {"ax": average, "eta": next_eta, "mu": next_mu}

    decay = decayed("asgd", weight_decay, mask)

    def first_eta(p: Tensor) -> Tensor:
        value = lr(torch.zeros((), dtype=torch.float64, device=p.device)) if callable(lr) else lr
        return torch.as_tensor(value, dtype=torch.float64, device=p.device).clone()

    slots: dict[str, Callable[[Tensor], Tensor]] = {
        "ax": torch.zeros_like,
        "eta": first_eta,
        "mu": lambda p: torch.ones((), dtype=torch.float64, device=p.device),
    }
    rates = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0}
    return chain(*negated(maximize), *decay, leafwise("asgd", rule, rates, slots))
