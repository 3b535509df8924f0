"""Optimizers that `torch.optim` does not have: `lion`, `lamb`, `lars`, `adan`, and their atoms.

Options have the names of those that it has. A rate may be a number, a 0-d tensor or a schedule; the
number 0 leaves out what it would scale. `mask` says which parameters decay, `trust_mask` to which
the trust ratio applies, both as in `tree.partition`; biases and gains are commonly left out.
"""

from __future__ import annotations  # Dynamo would run those of nested functions

import torch
from torch import Tensor

from fdl._numerics import norm, root
from fdl.optim.adaptive import scale_by_adam
from fdl.optim.base import Optimizer, chain, leafwise
from fdl.optim.hyper import Rate, check_rate, is_zero
from fdl.optim.parts import masked
from fdl.optim.transforms import add_decayed_weights, scale, scale_by_learning_rate, trace
from fdl.tree import Where

__all__ = ["adan", "lamb", "lars", "lion", "scale_by_adan", "scale_by_lion", "scale_by_trust_ratio"]

Result = tuple[Tensor, dict[str, Tensor]]


# ------------------------------------------------------------------------------ atoms


def scale_by_lion(betas: tuple[Rate, Rate] = (0.9, 0.99)) -> Optimizer:
    """Take the sign of a mean of gradients and the new one (Chen et al., 2023).

    The result is sign(β₁m + (1−β₁)g); then m ← β₂m + (1−β₂)g. Slot: `exp_avg` m.

    Args:
        betas: β₁, how much the mean weighs in the sign; β₂, how much of itself it keeps.

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

    rates = {"beta1": betas[0], "beta2": betas[1]}
    return leafwise("scale_by_lion", rule, rates, {"exp_avg": torch.zeros_like})


def scale_by_trust_ratio(trust_coefficient: Rate = 1.0, eps: Rate = 0.0) -> Optimizer:
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


def scale_by_adan(
    betas: tuple[Rate, Rate, Rate] = (0.98, 0.92, 0.99), eps: Rate = 1e-8
) -> Optimizer:
    """Adam with Nesterov momentum estimated from differences of gradients (Xie et al., 2022).

    With δ = g − the previous g, at first 0: m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)δ;
    n ← β₃n + (1−β₃)(g + β₂δ)². The result is (m̂ + β₂v̂) / (√n̂ + ε), where m̂ = m/(1−β₁ᵗ), and v̂
    and n̂ likewise. The paper writes 1−β for each β here. A leaf without a gradient at first starts
    from a previous g of 0. Slots: `exp_avg` m, `exp_avg_diff` v, `exp_avg_sq` n, `previous_grad`.

    `optax.scale_by_adan` (0.2.8) weighs δ and v̂ by 1−β₂ where the paper and its authors' program
    have what is β₂ here, so that the two agree at β₂ = ½ alone.

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
    rates = {"beta1": betas[0], "beta2": betas[1], "beta3": betas[2], "eps": eps}
    return leafwise("scale_by_adan", rule, rates, dict.fromkeys(names, torch.zeros_like))


# ------------------------------------------------------------------------------ optimizers


def _decay(caller: str, weight_decay: Rate, mask: Where | None) -> list[Optimizer]:
    check_rate(caller, "weight_decay", weight_decay)
    return [] if is_zero(weight_decay) else [add_decayed_weights(weight_decay, mask)]


def _trust(trust: Optimizer, mask: Where | None) -> Optimizer:
    return trust if mask is None else masked(trust, mask)


def _sign(maximize: bool) -> list[Optimizer]:
    return [scale(-1.0)] if maximize else []


def lion(
    lr: Rate = 1e-4,
    betas: tuple[Rate, Rate] = (0.9, 0.99),
    weight_decay: Rate = 0.0,
    mask: Where | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Steps of one size for every coordinate, w ← w − lr · (sign(β₁m + (1−β₁)g) + λw).

    Source: Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", whose program has
    these defaults; see `scale_by_lion`. Equals `optax.lion`, where λ is 1e-3 by default. An lr that
    suits `adamw` is 3 to 10 times too large here, and λ as much too small.

    Args:
        lr: the learning rate.
        betas: β₁, β₂.
        weight_decay: λ; the step takes lr · λ · w away.
        mask: which parameters decay; all if None.
        maximize: climb instead.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) a glob of `mask`
            matches no path.

    >>> opt, params = lion(lr=0.1, weight_decay=0.5), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    check_rate("lion", "lr", lr)
    decay = _decay("lion", weight_decay, mask)
    return chain(*_sign(maximize), scale_by_lion(betas), *decay, scale_by_learning_rate(lr))


def adan(
    lr: Rate = 1e-3,
    betas: tuple[Rate, Rate, Rate] = (0.98, 0.92, 0.99),
    eps: Rate = 1e-8,
    weight_decay: Rate = 0.0,
    mask: Where | None = None,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam with Nesterov momentum and decoupled weight decay, w ← w − lr · (direction + λw).

    Source: Xie et al., 2022, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models", whose program has these defaults; see `scale_by_adan`, also for where `optax.adan`
    differs, which besides adds another ε inside the root. The paper takes λw from the new w rather
    than the old one, and so divides by 1 + lr · λ; this step is the `no_prox` of its program.

    Args:
        lr: the learning rate.
        betas: how much the means of gradients, of their differences, and of squares keep.
        eps: added to the root in the denominator.
        weight_decay: λ; the step takes lr · λ · w away.
        mask: which parameters decay; all if None.
        maximize: climb instead.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) a glob of `mask`
            matches no path.

    >>> opt, params = adan(lr=0.1, weight_decay=0.5), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    check_rate("adan", "lr", lr)
    decay = _decay("adan", weight_decay, mask)
    return chain(*_sign(maximize), scale_by_adan(betas, eps), *decay, scale_by_learning_rate(lr))


def lamb(
    lr: Rate,
    betas: tuple[Rate, Rate] = (0.9, 0.999),
    eps: Rate = 1e-6,
    weight_decay: Rate = 0.0,
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
        *_sign(maximize),
        scale_by_adam(betas, eps),
        *_decay("lamb", weight_decay, mask),
        _trust(scale_by_trust_ratio(), trust_mask),
        scale_by_learning_rate(lr),
    )


def lars(
    lr: Rate,
    momentum: Rate = 0.9,
    weight_decay: Rate = 0.0,
    trust_coefficient: Rate = 1e-3,
    eps: Rate = 0.0,
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
        *_sign(maximize),
        *_decay("lars", weight_decay, mask),
        _trust(scale_by_trust_ratio(trust_coefficient, eps), trust_mask),
        scale_by_learning_rate(lr),
        *([] if is_zero(momentum) else [trace(momentum, nesterov=nesterov)]),
    )
