"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl.optim._base import Optimizer
from fdl.optim._descent import descend
from fdl.optim._hyperparams import RANGES, ScalarOrSchedule, named_rates
from fdl.optim._leafwise import Result, leafwise
from fdl.optim._masking import Mask


def scale_by_lion(betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.99)) -> Optimizer:
    """Return the sign of an average of the momentum and the new gradient.

    The result is sign(β₁m + (1−β₁)g); then m ← β₂m + (1−β₂)g. Slot: `exp_avg` m. Source: Chen et
    al., Symbolic Discovery of Optimization Algorithms, 2023, https://arxiv.org/abs/2302.06675

    Args:
        betas: β₁, the weight of the momentum in the sign; β₂, its decay rate.

    Raises:
        ValueError: a number that is not in [0, 1).

    >>> opt, params = scale_by_lion(), {"w": torch.ones(2)}
    >>> opt.update({"w": torch.tensor([5.0, -0.1])}, opt.init(params), params)[0]
    {'w': tensor([ 1., -1.])}
    """

    def rule(
        g: Tensor, p: Tensor, t: Tensor, exp_avg: Tensor, beta1: Tensor, beta2: Tensor
    ) -> Result:
        sign = (beta1 * exp_avg + (1 - beta1) * g).sign()
        return sign, {"exp_avg": beta2 * exp_avg + (1 - beta2) * g}

    rates = named_rates("scale_by_lion", "betas", betas, "beta1", "beta2")
    return leafwise("scale_by_lion", rule, rates, {"exp_avg": torch.zeros_like}, RANGES)


def lion(
    lr: ScalarOrSchedule = 1e-4,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.99),
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Step by the same amount in every coordinate, w ← w − lr · (sign(β₁m + (1−β₁)g) + λw).

    See `scale_by_lion`. The defaults are those of the authors' program. Equals `optax.lion`, where
    λ is 1e-3 by default. Compared with `adamw`, divide lr by 3 to 10 and multiply λ by as much.
    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
    https://arxiv.org/abs/2302.06675

    Args:
        lr: the learning rate.
        betas: β₁, β₂.
        weight_decay: λ; each step subtracts lr · λ · w.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.
        maximize: maximize the objective instead.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> opt, params = lion(lr=0.1, weight_decay=0.5), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    direction = [scale_by_lion(betas)]
    return descend("lion", direction, lr, weight_decay, maximize, decoupled=True, mask=mask)
