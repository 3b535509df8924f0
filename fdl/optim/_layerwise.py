"""A learning rate per layer, from the norms of its weights and update: `lamb`, `lars`."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl._numerics import norm
from fdl.optim._adaptive import scale_by_adam
from fdl.optim._base import Optimizer
from fdl.optim._basic import scale_by_learning_rate, trace
from fdl.optim._descent import decayed, negated
from fdl.optim._hyperparams import ScalarOrSchedule, check_rate, is_zero
from fdl.optim._leafwise import Result, chain, leafwise
from fdl.optim._masking import Mask, masked_for


def scale_by_trust_ratio(
    trust_coefficient: ScalarOrSchedule = 1.0, eps: ScalarOrSchedule = 0.0
) -> Optimizer:
    """Scale each update to a norm in proportion to that of its parameter.

    The update u of the parameter w becomes η ‖w‖ / (‖u‖ + ε) · u. It stays u if w or u is 0, as w
    could not leave 0 otherwise. The norms are those of whole leaves. Source: You et al., Large
    Batch Training of Convolutional Networks, 2017, https://arxiv.org/abs/1708.03888

    Args:
        trust_coefficient: η: a number, a 0-d tensor or a schedule.
        eps: ε, likewise.

    Raises:
        ValueError: a number that is negative or not finite.

    >>> opt, params = scale_by_trust_ratio(), {"w": torch.tensor([3.0, 4.0]), "b": torch.zeros(1)}
    >>> updates = {"w": torch.tensor([0.0, 2.0]), "b": torch.ones(1)}
    >>> opt.update(updates, opt.init(params), params)[0]
    {'w': tensor([0., 5.]), 'b': tensor([1.])}
    """

    def rule(g: Tensor, p: Tensor, t: Tensor, trust_coefficient: Tensor, eps: Tensor) -> Result:
        weight, update = norm(p).double(), norm(g).double()
        known = (weight > 0) & (update > 0)
        ratio = trust_coefficient * weight / torch.where(known, update + eps, 1.0)
        return torch.where(known, ratio, 1.0) * g, {}

    rates = {"trust_coefficient": trust_coefficient, "eps": eps}
    return leafwise("scale_by_trust_ratio", rule, rates)


def lamb(
    lr: ScalarOrSchedule,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    trust_mask: Mask | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam with steps in proportion to the norms of their parameters, for large batches.

    w ← w − lr · ‖w‖/‖u‖ · u, where u is Adam's direction + λw, and the ratio is 1 if w or u is 0.
    See `scale_by_adam` and `scale_by_trust_ratio`. Equals `optax.lamb`, defaults included; betas
    and ε are those of the paper (where λ is 0.01, and φ(z) = z here). Source: You et al., Large
    Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020,
    https://arxiv.org/abs/1904.00962

    Args:
        lr: the learning rate; without a default, as in optax, since it depends on the batch size.
        betas: decay rates of the means of gradients and of their squares.
        eps: added to the root in the denominator.
        weight_decay: λ.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.
        trust_mask: parameters scaled by ‖w‖/‖u‖, which is 1 for the others; all if None.
        maximize: maximize the objective instead.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> opt, params = lamb(lr=0.1), {"w": torch.tensor([4.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.4000])}
    """
    check_rate("lamb", "lr", lr)
    return chain(
        *negated(maximize),
        scale_by_adam(betas, eps),
        *decayed("lamb", weight_decay, mask),
        masked_for("lamb", scale_by_trust_ratio(), trust_mask),
        scale_by_learning_rate(lr),
    )


def lars(
    lr: ScalarOrSchedule,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    trust_coefficient: ScalarOrSchedule = 1e-3,
    eps: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    trust_mask: Mask | None = None,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """SGD with steps in proportion to the norms of their parameters, for large batches.

    u = g + λw; m ← momentum · m + lr · η ‖w‖ / (‖u‖ + ε) · u; w ← w − m, and with w or u = 0
    m ← momentum · m + lr · u. Unlike that of `sgd`, the momentum accumulates steps with their
    learning rates. See `scale_by_trust_ratio`. Equals `optax.lars`, defaults included; η and
    momentum are those of the paper, which has ‖g‖ + λ‖w‖ for ‖u‖. Source: You et al., Large Batch
    Training of Convolutional Networks, 2017, https://arxiv.org/abs/1708.03888

    Args:
        lr: the learning rate; without a default, as in optax, since it depends on the batch size.
        momentum: fraction of the last step that is kept.
        weight_decay: λ.
        trust_coefficient: η.
        eps: ε.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.
        trust_mask: parameters scaled by η ‖w‖ / (‖u‖ + ε), which is 1 for the others; all if None.
        nesterov: use Nesterov momentum.
        maximize: maximize the objective instead.

    Raises:
        ValueError: a number that is negative or not finite; (at init) as for `masked`.

    >>> opt, params = lars(lr=0.1), {"w": torch.tensor([4.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.0004])}
    """
    check_rate("lars", "lr", lr)
    check_rate("lars", "momentum", momentum)
    return chain(
        *negated(maximize),
        *decayed("lars", weight_decay, mask),
        masked_for("lars", scale_by_trust_ratio(trust_coefficient, eps), trust_mask),
        scale_by_learning_rate(lr),
        *([] if is_zero(momentum) else [trace(momentum, nesterov=nesterov)]),
    )
