"""Transformations of gradients from which optimizers are chained."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import random, tree
from fdl._kinds import register
from fdl._numerics import root
from fdl.optim._base import Optimizer, check_floating, in_32_bits, map_grads, match_grads
from fdl.optim._hyperparams import (
    Hyper,
    ScalarOrSchedule,
    check_rate,
    init_hyper,
    is_zero,
    next_hyper,
    rates_now,
)
from fdl.optim._leafwise import leafwise
from fdl.optim._masking import Mask, masked_for
from fdl.random._checks import check_key
from fdl.tree import Tree


def scale(factor: float) -> Optimizer:
    """Multiply gradients by a constant, which is not a hyperparameter of the state.

    >>> scale(-2.0).update({"w": torch.ones(1)}, (), {"w": torch.ones(1)})
    ({'w': tensor([-2.])}, ())
    """

    def update(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        return map_grads(lambda g: g * factor, grads), state

    return in_32_bits(lambda params: (), update)


def scale_by_learning_rate(lr: ScalarOrSchedule) -> Optimizer:
    """Multiply by −lr: the last link of a chain, which turns a direction into a descent step.

    Args:
        lr: a number, a 0-d tensor or a schedule.

    Raises:
        ValueError: `lr` is negative or not finite.

    >>> opt = scale_by_learning_rate(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> opt.update(params, opt.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """

    def rule(g: Tensor, p: Tensor, t: Tensor, lr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -lr * g, {}

    return leafwise("scale_by_learning_rate", rule, {"lr": lr})


def add_decayed_weights(weight_decay: ScalarOrSchedule, mask: Mask | None = None) -> Optimizer:
    """Add λ·w to the gradient of w: the gradient of the penalty λ · ½ Σ w².

    Args:
        weight_decay: λ: a number, a 0-d tensor or a schedule.
        mask: parameters that decay, as in `masked`: a glob on dotted paths, several globs, a
            predicate `(path, leaf)`, a tree of bools, or a function from the parameters to one; all
            if None. A function sees stacked members or layers as one leaf, unless under `vmap`:
            `leaf.ndim > 1` then also selects biases. Select by path there.

    Raises:
        ValueError: `weight_decay` is negative or not finite; (at init) as for `masked`.

    >>> params = {"weight": torch.tensor([2.0]), "bias": torch.tensor([2.0])}
    >>> opt = add_decayed_weights(0.5, mask="weight")
    >>> opt.update(tree.map(torch.zeros_like, params), opt.init(params), params)[0]
    {'weight': tensor([1.]), 'bias': tensor([0.])}
    """

    def rule(
        g: Tensor, p: Tensor, t: Tensor, weight_decay: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return g + weight_decay * p, {}

    decay = leafwise("add_decayed_weights", rule, {"weight_decay": weight_decay})
    return masked_for("add_decayed_weights", decay, mask)


def trace(
    momentum: ScalarOrSchedule, dampening: ScalarOrSchedule = 0.0, nesterov: bool = False
) -> Optimizer:
    """Accumulate momentum as `torch.optim.SGD` does: m ← momentum · m + (1 − dampening) · g.

    The first update sets m = g, undampened. If the first gradient of a leaf is `None`, all its
    later ones are dampened (torch counts updates per parameter). The result is m, or with
    `nesterov` g + momentum · m. Slot: `momentum_buffer` m. Source: Sutskever et al., On the
    importance of initialization and momentum in deep learning, 2013.

    Args:
        momentum: a number, a 0-d tensor or a schedule.
        dampening: likewise.
        nesterov: use Nesterov momentum.

    Raises:
        ValueError: a number that is negative or not finite.

    >>> params = {"w": torch.ones(1)}
    >>> opt = trace(0.9)
    >>> m, state = opt.update({"w": torch.ones(1)}, opt.init(params), params)
    >>> opt.update({"w": torch.ones(1)}, state, params)[0]
    {'w': tensor([1.9000])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        momentum_buffer: Tensor,
        momentum: Tensor,
        dampening: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kept = g if dampening is None else torch.where(t == 1, 1.0, 1 - dampening) * g
        m = momentum * momentum_buffer + kept
        return (g + momentum * m if nesterov else m), {"momentum_buffer": m}

    rates = {"momentum": momentum} | ({} if is_zero(dampening) else {"dampening": dampening})
    return leafwise("trace", rule, rates, {"momentum_buffer": torch.zeros_like})


def centralize() -> Optimizer:
    """Subtract from each gradient its mean over all axes but the first; vectors are unchanged.

    The sum of the weights of each unit is then constant. Source: Yong et al., Gradient
    Centralization, 2020, https://arxiv.org/abs/2004.01461

    >>> opt, params = centralize(), {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    >>> grads = {"weight": torch.tensor([[1.0, 3.0]]), "bias": torch.ones(1)}
    >>> opt.update(grads, opt.init(params), params)[0]
    {'weight': tensor([[-1.,  1.]]), 'bias': tensor([1.])}
    """

    def rule(g: Tensor, p: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (g - g.mean(tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g), {}

    return leafwise("centralize", rule, {})


@register
class NoiseState(NamedTuple):
    """The state of `add_noise`."""

    hyper: Hyper  # eta, gamma
    key: Tensor  # int64 [2]; constant, each update draws from fold_in(key, count)


def add_noise(key: Tensor, eta: ScalarOrSchedule, gamma: ScalarOrSchedule = 0.55) -> Optimizer:
    """Add normal noise of variance eta / (1 + count)^gamma to gradients.

    Leaf i, in the order of sorted paths, draws from `fold_in(fold_in(key, count), i)`. In a
    population vmapped over states, members with the same key draw the same noise: give each its own
    key. Source: Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks,
    2015, https://arxiv.org/abs/1511.06807

    Args:
        key: random key, which is stored in the state.
        eta: variance of the noise in the first update.
        gamma: exponent with which the variance falls.

    Raises:
        TypeError: `key` is not a key.
        ValueError: a number that is negative or not finite.

    >>> opt = add_noise(random.key(0), eta=0.01)
    >>> params = {"w": torch.zeros(3)}
    >>> opt.update(params, opt.init(params), params)[0]
    {'w': tensor([-0.0575,  0.0800, -0.0260])}
    """
    check_key("add_noise", key)
    rates = {"eta": eta, "gamma": gamma}
    for name, rate in rates.items():
        check_rate("add_noise", name, rate)

    def init(params: Tree) -> NoiseState:
        check_floating(params, "add_noise")
        hyper = init_hyper(rates, params)
        return NoiseState(hyper, key.to(hyper.count.device, copy=True))

    def update(
        grads: Tree, state: NoiseState, params: Tree, **extra: Any
    ) -> tuple[Tree, NoiseState]:
        leaves = match_grads(grads, params, "add_noise")
        now = rates_now(rates, state.hyper)
        deviation = root(now["eta"] / (1 + state.hyper.count).double() ** now["gamma"])
        update_key = random.fold_in(state.key, state.hyper.count)
        paths = list(tree.flatten_dict(params))
        noisy: list[Tensor | None] = []
        for path, g in zip(paths, leaves, strict=True):
            if g is None:
                noisy.append(None)
                continue
            leaf_key = random.fold_in(update_key, sorted(paths).index(path))
            noise = random.normal(leaf_key, g.shape, g.dtype)
            noisy.append(g + (deviation * noise).to(g.dtype))
        updates = pytree.tree_unflatten(noisy, pytree.tree_structure(params))
        return updates, NoiseState(next_hyper(rates, state.hyper), state.key)

    return in_32_bits(init, update)
