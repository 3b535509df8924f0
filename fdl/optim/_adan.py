"""Adan: adaptive Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl._numerics import root
from fdl.optim._base import Optimizer
from fdl.optim._descent import descend
from fdl.optim._hyperparams import RANGES, ScalarOrSchedule, named_rates
from fdl.optim._leafwise import Result, leafwise
from fdl.optim._masking import Mask


def scale_by_adan(
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule, ScalarOrSchedule] = (0.98, 0.92, 0.99),
    eps: ScalarOrSchedule = 1e-8,
) -> Optimizer:
    """Scale as Adam does, with Nesterov momentum estimated from differences of gradients.

    With δ = g − the previous g, initially 0: m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)δ;
    n ← β₃n + (1−β₃)(g + β₂δ)². The result is (m̂ + β₂v̂) / (√n̂ + ε), where m̂ = m/(1−β₁ᵗ), and v̂
    and n̂ likewise. The paper writes 1−β for each β here. For a leaf whose first gradients are None,
    the previous g is 0. Slots: `exp_avg` m, `exp_avg_diff` v, `exp_avg_sq` n, `previous_grad`.

    `optax.scale_by_adan` (0.2.8) multiplies δ and v̂ by 1−β₂ where the paper and its authors'
    program multiply by our β₂, so that the two agree only at β₂ = ½. Source: Xie et al., Adan:
    Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models, 2022,
    https://arxiv.org/abs/2208.06677

    Args:
        betas: β₁, β₂, β₃.
        eps: ε, outside the root.

    Raises:
        ValueError: a number that is not finite or out of its range.

    >>> opt, params = scale_by_adan(), {"w": torch.ones(1)}
    >>> opt.update({"w": torch.tensor([5.0])}, opt.init(params), params)[0]
    {'w': tensor([1.])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        exp_avg: Tensor,
        exp_avg_diff: Tensor,
        exp_avg_sq: Tensor,
        previous_grad: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        beta3: Tensor,
        eps: Tensor,
    ) -> Result:
        diff = torch.where(t == 1, 0.0, g - previous_grad)
        ahead = g + beta2 * diff
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_diff + (1 - beta2) * diff
        n = beta3 * exp_avg_sq + (1 - beta3) * (ahead * ahead)
        momentum = m / (1 - beta1**t) + beta2 / (1 - beta2**t) * v
        slots = {"exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "previous_grad": g}
        return momentum / (root(n) / (1 - beta3**t).sqrt() + eps), slots

    names = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")
    rates = named_rates("scale_by_adan", "betas", betas, "beta1", "beta2", "beta3") | {"eps": eps}
    return leafwise("scale_by_adan", rule, rates, dict.fromkeys(names, torch.zeros_like), RANGES)


def adan(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule, ScalarOrSchedule] = (0.98, 0.92, 0.99),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam with Nesterov momentum and decoupled weight decay, w ← w − lr · (direction + λw).

    The defaults are those of the authors' program. The paper subtracts λw of the new w rather than
    of the old one, and so divides by 1 + lr · λ; this step is the `no_prox` of its program.
    `optax.adan` differs as described in `scale_by_adan`, and adds another ε inside the root.
    Source: Xie et al., Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models, 2022, https://arxiv.org/abs/2208.06677

    Args:
        lr: the learning rate.
        betas: decay rates of the means of gradients, of their differences, and of squares.
        eps: added to the root in the denominator.
        weight_decay: λ; each step subtracts lr · λ · w.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.
        maximize: maximize the objective instead.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> opt, params = adan(lr=0.1, weight_decay=0.5), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    direction = [scale_by_adan(betas, eps)]
    return descend("adan", direction, lr, weight_decay, maximize, decoupled=True, mask=mask)
