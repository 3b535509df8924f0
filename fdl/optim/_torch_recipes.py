"""The dense optimizers of `torch.optim`, in lower case, with torch's options and defaults.

Torch's options `differentiable` and `capturable` are always on here (counts and rates are tensors),
and a compiled step is one fused program. A rate may be a number, a 0-d tensor or a schedule; the
number 0 leaves out the term it would scale.
"""

from __future__ import annotations

from fdl.optim._adaptive import (
    scale_by_adadelta,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_adamax,
    scale_by_nadam,
    scale_by_radam,
    scale_by_rms,
)
from fdl.optim._base import Optimizer
from fdl.optim._basic import trace
from fdl.optim._descent import descend
from fdl.optim._hyperparams import ScalarOrSchedule, check_rate, is_zero
from fdl.optim._masking import Mask


def sgd(
    lr: ScalarOrSchedule = 1e-3,
    momentum: ScalarOrSchedule = 0.0,
    dampening: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Stochastic gradient descent; equals `torch.optim.SGD` in every combination.

    g ← ±g + weight_decay · w; m ← momentum · m + (1 − dampening) · g; w ← w − lr · m. A rate may
    be a number, a 0-d tensor or a schedule, and is a float64 0-d tensor in the state; the number 0
    leaves out the term it would scale.

    Args:
        lr: the learning rate.
        momentum: fraction of the last step that is kept.
        dampening: fraction of the new gradient that is left out of the momentum.
        weight_decay: λ of the penalty λ · ½ Σ w².
        nesterov: use Nesterov momentum; needs momentum and no dampening.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: a number that is negative or not finite, or `nesterov` without momentum or with
            dampening; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = sgd(lr=0.1, momentum=0.9), {"w": torch.tensor([1.0])}
    >>> updates, state = opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)
    >>> updates
    {'w': tensor([-0.2000])}
    """
    check_rate("sgd", "momentum", momentum)
    check_rate("sgd", "dampening", dampening)
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise ValueError(
            "sgd: nesterov needs a momentum and zero dampening, got "
            f"momentum={momentum}, dampening={dampening}"
        )
    direction = [] if is_zero(momentum) else [trace(momentum, dampening, nesterov)]
    return descend("sgd", direction, lr, weight_decay, maximize, mask=mask)


def adam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """Adam; equals `torch.optim.Adam`. See `scale_by_adam`.

    Source: Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015,
    https://arxiv.org/abs/1412.6980

    Args:
        lr: the learning rate.
        betas: decay rates of the means of gradients and of their squares.
        eps: added to the root in the denominator.
        weight_decay: λ; λw is added to the gradient, or with `decoupled_weight_decay` to the
            update.
        amsgrad: divide by the largest second moment so far.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.
        decoupled_weight_decay: if True, identical to `adamw`.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = adam(lr=0.1), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    direction = [scale_by_adam(betas, eps, amsgrad)]
    return descend("adam", direction, lr, weight_decay, maximize, decoupled_weight_decay, mask)


def adamw(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay, w ← w − lr · (direction + λw); `torch.optim.AdamW`.

    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019,
    https://arxiv.org/abs/1711.05101

    Args:
        lr: the learning rate.
        betas: decay rates of the means of gradients and of their squares.
        eps: added to the root in the denominator.
        weight_decay: λ; each step subtracts lr · λ · w.
        amsgrad: divide by the largest second moment so far.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = adamw(lr=0.1, weight_decay=0.5), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    direction = [scale_by_adam(betas, eps, amsgrad)]
    return descend("adamw", direction, lr, weight_decay, maximize, decoupled=True, mask=mask)


def adamax(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Adam with the largest gradient in the denominator; equals `torch.optim.Adamax`.

    See `scale_by_adamax`. Source: Kingma & Ba, Adam: A Method for Stochastic Optimization, 2015,
    section 7, https://arxiv.org/abs/1412.6980

    Args:
        lr: the learning rate.
        betas: decay rates of the mean of gradients and of their largest absolute value.
        eps: added to the absolute value of each gradient.
        weight_decay: λ; λw is added to the gradient.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = adamax(lr=0.1), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    return descend("adamax", [scale_by_adamax(betas, eps)], lr, weight_decay, maximize, mask=mask)


def nadam(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    momentum_decay: ScalarOrSchedule = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Adam with Nesterov momentum; equals `torch.optim.NAdam`.

    See `scale_by_nadam`. Source: Dozat, Incorporating Nesterov Momentum into Adam, 2016.

    Args:
        lr: the learning rate.
        betas: decay rates of the means of gradients and of their squares.
        eps: added to the root in the denominator.
        weight_decay: λ; λw is added to the gradient, or with `decoupled_weight_decay` to the
            update.
        momentum_decay: rate at which the momentum warms up.
        decoupled_weight_decay: decay as in `adamw`.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = nadam(lr=0.1), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1056])}
    """
    direction = [scale_by_nadam(betas, eps, momentum_decay)]
    return descend("nadam", direction, lr, weight_decay, maximize, decoupled_weight_decay, mask)


def radam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[ScalarOrSchedule, ScalarOrSchedule] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Adam with an adaptive rate that is rectified while its variance is large.

    Equals `torch.optim.RAdam`; see `scale_by_radam`. Source: Liu et al., On the Variance of the
    Adaptive Learning Rate and Beyond, 2020, https://arxiv.org/abs/1908.03265

    Args:
        lr: the learning rate.
        betas: decay rates of the means of gradients and of their squares.
        eps: added to the root in the denominator.
        weight_decay: λ; λw is added to the gradient, or with `decoupled_weight_decay` to the
            update.
        decoupled_weight_decay: decay as in `adamw`.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = radam(lr=0.1), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.2000])}
    """
    direction = [scale_by_radam(betas, eps)]
    return descend("radam", direction, lr, weight_decay, maximize, decoupled_weight_decay, mask)


def adagrad(
    lr: ScalarOrSchedule = 1e-2,
    lr_decay: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: ScalarOrSchedule = 1e-10,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Divide by the root of the sum of squared gradients; equals `torch.optim.Adagrad`.

    See `scale_by_adagrad`. Source: Duchi et al., Adaptive Subgradient Methods for Online Learning
    and Stochastic Optimization, 2011.

    Args:
        lr: the learning rate.
        lr_decay: the learning rate of update t is lr / (1 + (t−1) · lr_decay).
        weight_decay: λ; λw is added to the gradient.
        initial_accumulator_value: initial value of the sum.
        eps: added to the root in the denominator.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = adagrad(lr=0.1), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    direction = [scale_by_adagrad(lr_decay, initial_accumulator_value, eps)]
    return descend("adagrad", direction, lr, weight_decay, maximize, mask=mask)


def adadelta(
    lr: ScalarOrSchedule = 1.0,
    rho: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Scale gradients to the size of past updates; equals `torch.optim.Adadelta`.

    See `scale_by_adadelta`. Source: Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012,
    https://arxiv.org/abs/1212.5701

    Args:
        lr: the learning rate.
        rho: decay rate of the means of squares.
        eps: added inside both roots.
        weight_decay: λ; λw is added to the gradient.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = adadelta(), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-0.0032])}
    """
    return descend("adadelta", [scale_by_adadelta(rho, eps)], lr, weight_decay, maximize, mask=mask)


def rmsprop(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    momentum: ScalarOrSchedule = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Divide by the root of the mean of squared gradients; equals `torch.optim.RMSprop`.

    See `scale_by_rms`. Source: Tieleman & Hinton, Lecture 6.5: RMSProp, 2012.

    Args:
        lr: the learning rate.
        alpha: decay rate of the mean of squares.
        eps: added to the root in the denominator.
        weight_decay: λ; λw is added to the gradient.
        momentum: fraction of the last step that is kept.
        centered: divide by the standard deviation instead.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> import torch
    >>> opt, params = rmsprop(lr=0.1), {"w": torch.tensor([1.0])}
    >>> opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)[0]
    {'w': tensor([-1.0000])}
    """
    check_rate("rmsprop", "momentum", momentum)
    direction = [scale_by_rms(alpha, eps, centered)]
    if not is_zero(momentum):
        direction.append(trace(momentum))
    return descend("rmsprop", direction, lr, weight_decay, maximize, mask=mask)
