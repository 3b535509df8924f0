"""Transformations that scale each coordinate by statistics of its past gradients.

Slots are named as in torch.optim; t, the number of the update, counts from 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl._checks import check_number
from fdl._numerics import root
from fdl.optim._base import Optimizer
from fdl.optim._hyperparams import AT_LEAST_0, RANGES, ScalarOrSchedule, named_rates
from fdl.optim._leafwise import Result, leafwise


def _zeros(*names: str) -> dict[str, Callable[[Tensor], Tensor]]:
    return dict.fromkeys(names, torch.zeros_like)


def scale_by_adam(
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    amsgrad: bool = False,
) -> Optimizer:
    """Divide the mean of gradients by the root of the mean of their squares.

    m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; the result is m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε). Slots:
    `exp_avg` m, `exp_avg_sq` v, and with amsgrad `max_exp_avg_sq`. Source: Kingma & Ba, Adam: A
    Method for Stochastic Optimization, 2015, https://arxiv.org/abs/1412.6980

    Args:
        betas: β₁, β₂.
        eps: ε, outside the root.
        amsgrad: use the largest v so far, before its bias is corrected. Source: Reddi et al., On
            the Convergence of Adam and Beyond, 2018, https://arxiv.org/abs/1904.09237

    >>> opt, params = scale_by_adam(), {"w": torch.ones(1)}
    >>> opt.update({"w": torch.tensor([5.0])}, opt.init(params), params)[0]
    {'w': tensor([1.])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        eps: Tensor,
        max_exp_avg_sq: Tensor | None = None,
    ) -> Result:
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
        slots = {"exp_avg": m, "exp_avg_sq": v}
        if max_exp_avg_sq is not None:
            v = slots["max_exp_avg_sq"] = torch.maximum(max_exp_avg_sq, v)
        denominator = root(v) / (1 - beta2**t).sqrt() + eps
        return m / denominator / (1 - beta1**t), slots

    rates = named_rates("scale_by_adam", "betas", betas, "beta1", "beta2") | {"eps": eps}
    names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
    return leafwise("scale_by_adam", rule, rates, _zeros(*names), RANGES)


def scale_by_adamax(
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999), eps: ScalarOrSchedule = 1e-8
) -> Optimizer:
    """Divide the mean of gradients by their largest absolute value, which decays.

    m ← β₁m + (1−β₁)g; u ← max(β₂u, |g| + ε); the result is m/(1−β₁ᵗ) / u. Slots: `exp_avg` m,
    `exp_inf` u. Source: Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015, section 7,
    https://arxiv.org/abs/1412.6980

    >>> opt, params = scale_by_adamax(), {"w": torch.ones(1)}
    >>> opt.update({"w": torch.tensor([5.0])}, opt.init(params), params)[0]
    {'w': tensor([1.])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        exp_avg: Tensor,
        exp_inf: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        eps: Tensor,
    ) -> Result:
        m = beta1 * exp_avg + (1 - beta1) * g
        u = torch.maximum(beta2 * exp_inf, g.abs() + eps)
        return m / u / (1 - beta1**t), {"exp_avg": m, "exp_inf": u}

    rates = named_rates("scale_by_adamax", "betas", betas, "beta1", "beta2") | {"eps": eps}
    return leafwise("scale_by_adamax", rule, rates, _zeros("exp_avg", "exp_inf"), RANGES)


def scale_by_nadam(
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    momentum_decay: ScalarOrSchedule = 4e-3,
) -> Optimizer:
    """Scale as Adam does, with Nesterov momentum that warms up.

    μ(t) = β₁ (1 − ½·0.96^(t·ψ)), ψ = `momentum_decay`. With m, v as in Adam and Π = μ(1)···μ(t) the
    result is ((1−μ(t)) g/(1−Π) + μ(t+1) m/(1−Π·μ(t+1))) / (√(v/(1−β₂ᵗ)) + ε). Slots: `exp_avg` m,
    `exp_avg_sq` v, `mu_product` Π (float64 []). Source: Dozat, Incorporating Nesterov Momentum into
    Adam, 2016.

    Args:
        betas: β₁, β₂.
        eps: ε.
        momentum_decay: ψ.

    >>> opt, params = scale_by_nadam(), {"w": torch.ones(1)}
    >>> opt.update({"w": torch.tensor([5.0])}, opt.init(params), params)[0]
    {'w': tensor([1.0565])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        mu_product: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        eps: Tensor,
        momentum_decay: Tensor,
    ) -> Result:
        mu, mu_next = (
            beta1 * (1 - 0.5 * torch.full_like(i, 0.96) ** (i * momentum_decay)) for i in (t, t + 1)
        )
        product = mu_product * mu
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
        ahead = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
        slots = {"exp_avg": m, "exp_avg_sq": v, "mu_product": product}
        return ahead / (root(v / (1 - beta2**t)) + eps), slots

    rates = named_rates("scale_by_nadam", "betas", betas, "beta1", "beta2")
    rates |= {"eps": eps, "momentum_decay": momentum_decay}
    slots = _zeros("exp_avg", "exp_avg_sq")
    slots["mu_product"] = lambda p: torch.ones((), dtype=torch.float64, device=p.device)
    return leafwise("scale_by_nadam", rule, rates, slots, RANGES)


def scale_by_radam(
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999), eps: ScalarOrSchedule = 1e-8
) -> Optimizer:
    """Scale as Adam does, but return plain momentum until v averages enough gradients.

    ρ∞ = 2/(1−β₂) − 1 and ρ = ρ∞ − 2t β₂ᵗ/(1−β₂ᵗ). With m, v as in Adam the result is m/(1−β₁ᵗ),
    times r √(1−β₂ᵗ)/(√v + ε) once ρ > 5, r² = (ρ−4)(ρ−2)ρ∞ / ((ρ∞−4)(ρ∞−2)ρ). Slots: `exp_avg` m,
    `exp_avg_sq` v. Source: Liu et al., On the Variance of the Adaptive Learning Rate and Beyond,
    2020, https://arxiv.org/abs/1908.03265

    >>> opt, params = scale_by_radam(), {"w": torch.ones(1)}
    >>> opt.update({"w": torch.tensor([5.0])}, opt.init(params), params)[0]
    {'w': tensor([5.])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        beta1: Tensor,
        beta2: Tensor,
        eps: Tensor,
    ) -> Result:
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
        bias2 = 1 - beta2**t
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / bias2
        known = rho > 5  # otherwise the variance of the step size is infinite
        r = torch.where(known, rho, 6.0)
        r = (r - 4) * (r - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * r)
        adapted = (r * bias2).sqrt() / (root(v) + eps)
        update = m / (1 - beta1**t) * torch.where(known, adapted, 1.0)
        return update, {"exp_avg": m, "exp_avg_sq": v}

    rates = named_rates("scale_by_radam", "betas", betas, "beta1", "beta2") | {"eps": eps}
    return leafwise("scale_by_radam", rule, rates, _zeros("exp_avg", "exp_avg_sq"), RANGES)


def scale_by_adagrad(
    lr_decay: ScalarOrSchedule = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: ScalarOrSchedule = 1e-10,
) -> Optimizer:
    """Divide by the root of the sum of squared gradients.

    s ← s + g²; the result is g / (√s + ε) / (1 + (t−1)·lr_decay). Slot: `sum` s. Source: Duchi et
    al., Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, 2011.

    Args:
        lr_decay: further decay of the step, see above.
        initial_accumulator_value: initial s.
        eps: ε.

    >>> opt, params = scale_by_adagrad(), {"w": torch.ones(1)}
    >>> opt.update({"w": torch.tensor([5.0])}, opt.init(params), params)[0]
    {'w': tensor([1.])}
    """

    def rule(g: Tensor, p: Tensor, t: Tensor, sum: Tensor, lr_decay: Tensor, eps: Tensor) -> Result:
        s = sum + g * g
        return g / (root(s) + eps) / (1 + (t - 1) * lr_decay), {"sum": s}

    name, value = "initial_accumulator_value", initial_accumulator_value
    check_number("scale_by_adagrad", name, value, *AT_LEAST_0)
    slots = {"sum": lambda p: torch.full_like(p, initial_accumulator_value)}
    return leafwise("scale_by_adagrad", rule, {"lr_decay": lr_decay, "eps": eps}, slots)


def scale_by_adadelta(rho: ScalarOrSchedule = 0.9, eps: ScalarOrSchedule = 1e-6) -> Optimizer:
    """Scale gradients to the size of past updates.

    v ← ρv + (1−ρ)g²; the result is δ = √(u+ε)/√(v+ε) · g; u ← ρu + (1−ρ)δ². Slots: `square_avg` v,
    `acc_delta` u. Source: Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012,
    https://arxiv.org/abs/1212.5701

    >>> opt, params = scale_by_adadelta(), {"w": torch.ones(1)}
    >>> opt.update({"w": torch.tensor([5.0])}, opt.init(params), params)[0]
    {'w': tensor([0.0032])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        square_avg: Tensor,
        acc_delta: Tensor,
        rho: Tensor,
        eps: Tensor,
    ) -> Result:
        v = rho * square_avg + (1 - rho) * (g * g)
        delta = (acc_delta + eps).sqrt() / (v + eps).sqrt() * g
        u = rho * acc_delta + (1 - rho) * (delta * delta)
        return delta, {"square_avg": v, "acc_delta": u}

    rates = {"rho": rho, "eps": eps}
    return leafwise("scale_by_adadelta", rule, rates, _zeros("square_avg", "acc_delta"), RANGES)


def scale_by_rms(
    alpha: ScalarOrSchedule = 0.99, eps: ScalarOrSchedule = 1e-8, centered: bool = False
) -> Optimizer:
    """Divide by the root of the mean of squared gradients.

    v ← αv + (1−α)g²; the result is g / (√v + ε). If `centered`, the variance v − m² takes the place
    of v, where m ← αm + (1−α)g. Slots: `square_avg` v, and centered `grad_avg` m.

    While a gradient stays constant, its variance goes to 0 as αᵗ, and a centered step grows up to
    g/ε, 1e8 times the gradient: choose a larger ε if that may happen. Source: Tieleman & Hinton,
    Lecture 6.5: RMSProp, 2012; centered: Graves, Generating Sequences With Recurrent Neural
    Networks, 2013, https://arxiv.org/abs/1308.0850

    Args:
        alpha: α.
        eps: ε, outside the root.
        centered: divide by the standard deviation.

    >>> opt, params = scale_by_rms(), {"w": torch.ones(1)}
    >>> opt.update({"w": torch.tensor([5.0])}, opt.init(params), params)[0]
    {'w': tensor([10.])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        square_avg: Tensor,
        alpha: Tensor,
        eps: Tensor,
        grad_avg: Tensor | None = None,
    ) -> Result:
        v = alpha * square_avg + (1 - alpha) * (g * g)
        slots = {"square_avg": v}
        if grad_avg is not None:
            m = slots["grad_avg"] = alpha * grad_avg + (1 - alpha) * g
            # At least the rounding error of v − m², below which its value is meaningless.
            v = torch.maximum(v - m * m, torch.finfo(v.dtype).eps * v)
        return g / (root(v) + eps), slots

    names = ("square_avg", *(["grad_avg"] if centered else []))
    return leafwise("scale_by_rms", rule, {"alpha": alpha, "eps": eps}, _zeros(*names))
