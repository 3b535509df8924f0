"""One learning rate for each layer, from the norms of its weights and update: `lamb`, `lars`."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl._numerics import norm
from fdl.optim._adaptive import scale_by_adam
from fdl.optim._base import Optimizer, Result, chain, leafwise
from fdl.optim._basic import scale_by_learning_rate, trace
from fdl.optim._descent import decayed, negated
from fdl.optim._hyperparams import ScalarOrSchedule, check_rate, is_zero
from fdl.optim._masking import masked
from fdl.tree import Where


def scale_by_trust_ratio(
    trust_coefficient: ScalarOrSchedule = 1.0, eps: ScalarOrSchedule = 0.0
) -> Optimizer:
    """Give each update a length in proportion to that of its parameter (You et al., 2017).

    The update u of the parameter w becomes η ‖w‖ / (‖u‖ + ε) · u; it stays u where w or u is 0, as
    w could never leave 0 otherwise. The norms are those of whole leaves.

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


def _trust(trust: Optimizer, mask: Where | None) -> Optimizer:
    return trust if mask is None else masked(trust, mask)


def lamb(
    lr: ScalarOrSchedule,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Where | None = None,
    trust_mask: Where | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam with steps in proportion to their parameters, for large batches (You et al., 2020).

    w ← w − lr · ‖w‖/‖u‖ · u, where u is Adam's direction + λw, and the ratio is 1 where w or u is
    0. Source: "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", with
    φ(z) = z, whose betas and ε these are (λ is 0.01 there); see `scale_by_adam` and
    `scale_by_trust_ratio`. Equals `optax.lamb`, defaults included.

    Args:
        lr: the learning rate.
        betas: how much the means of gradients and of their squares keep.
        eps: added to the root in the denominator.
        weight_decay: λ.
        mask: which parameters decay; all if None.
        trust_mask: for which ‖w‖/‖u‖ counts; it is 1 for the others. All if None.
        maximize: climb instead.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) a glob of a mask
            matches no path.

    >>> opt, params = lamb(lr=0.1), {"w": torch.tensor([4.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.4000])}
    """
    check_rate("lamb", "lr", lr)
    return chain(
        *negated(maximize),
        scale_by_adam(betas, eps),
        *decayed("lamb", weight_decay, mask),
        _trust(scale_by_trust_ratio(), trust_mask),
        scale_by_learning_rate(lr),
    )


def lars(
    lr: ScalarOrSchedule,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    trust_coefficient: ScalarOrSchedule = 1e-3,
    eps: ScalarOrSchedule = 0.0,
    mask: Where | None = None,
    trust_mask: Where | None = None,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """SGD whose steps are in proportion to their parameters, for large batches (You et al., 2017).

    u = g + λw; m ← momentum · m + lr · η ‖w‖ / (‖u‖ + ε) · u; w ← w − m, and with w or u = 0
    m ← momentum · m + lr · u. The momentum holds past steps, rate included, unlike that of `sgd`.
    Source: "Large Batch Training of Convolutional Networks", whose η and momentum these are. Equals
    `optax.lars`, defaults included; the paper has ‖g‖ + λ‖w‖ for ‖u‖. See `scale_by_trust_ratio`.

    Args:
        lr: the learning rate.
        momentum: how much of the last step is kept.
        weight_decay: λ.
        trust_coefficient: η.
        eps: ε.
        mask: which parameters decay; all if None.
        trust_mask: for which η ‖w‖ / (‖u‖ + ε) counts; it is 1 for the others. All if None.
        nesterov: look ahead along the momentum.
        maximize: climb instead.

    Raises:
        ValueError: a number that is negative or not finite; (at init) a glob of a mask matches no
            path.

    >>> opt, params = lars(lr=0.1), {"w": torch.tensor([4.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.0004])}
    """
    check_rate("lars", "lr", lr)
    check_rate("lars", "momentum", momentum)
    return chain(
        *negated(maximize),
        *decayed("lars", weight_decay, mask),
        _trust(scale_by_trust_ratio(trust_coefficient, eps), trust_mask),
        scale_by_learning_rate(lr),
        *([] if is_zero(momentum) else [trace(momentum, nesterov=nesterov)]),
    )
