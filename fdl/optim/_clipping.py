"""Transformations that bound gradients: by element, by unit, or globally."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdl import tree
from fdl._numerics import global_norm, norm
from fdl.optim._base import Optimizer, State, in_32_bits, map_grads
from fdl.optim._hyperparams import ScalarOrSchedule, check_rate, init_hyper, next_hyper, rates_now
from fdl.optim._leafwise import leafwise
from fdl.tree import Tree


def clip(max_value: ScalarOrSchedule) -> Optimizer:
    """Clip each element to [−max_value, max_value]; equals `torch.nn.utils.clip_grad_value_`.

    Args:
        max_value: a number, a 0-d tensor or a schedule.

    Raises:
        ValueError: `max_value` is negative or not finite.

    >>> opt, params = clip(1.0), {"w": torch.ones(3)}
    >>> opt.update({"w": torch.tensor([-3.0, 0.5, 3.0])}, opt.init(params), params)[0]
    {'w': tensor([-1.0000,  0.5000,  1.0000])}
    """

    def rule(
        g: Tensor, p: Tensor, t: Tensor, max_value: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.clamp(g, -max_value, max_value), {}

    return leafwise("clip", rule, {"max_value": max_value})


def clip_by_global_norm(max_norm: ScalarOrSchedule) -> Optimizer:
    """Scale all gradients by one factor so that their global norm is at most `max_norm`.

    The factor is min(1, max_norm / (norm + 1e-6)), as in `torch.nn.utils.clip_grad_norm_`.
    Source: Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063

    Args:
        max_norm: a number, a 0-d tensor or a schedule.

    Raises:
        ValueError: `max_norm` is negative or not finite.

    >>> opt = clip_by_global_norm(1.0)
    >>> grads = {"w": torch.tensor([3.0, 4.0])}
    >>> opt.update(grads, opt.init(grads), grads)[0]
    {'w': tensor([0.6000, 0.8000])}
    """
    check_rate("clip_by_global_norm", "max_norm", max_norm)
    rates = {"max_norm": max_norm}

    def init(params: Tree) -> State:
        return State(init_hyper(rates, params), {})

    def update(grads: Tree, state: State, params: Tree, **extra: Any) -> tuple[Tree, State]:
        leaves = [g for g in tree.leaves(grads) if g is not None]
        next_state = State(next_hyper(rates, state.hyper), {})
        if not leaves:
            return grads, next_state
        limit = rates_now(rates, state.hyper)["max_norm"]
        factor = (limit / (global_norm(leaves) + 1e-6)).clamp(max=1.0)
        return map_grads(lambda g: g * factor.to(g.dtype), grads), next_state

    return in_32_bits(init, update)


def adaptive_grad_clip(
    clipping: ScalarOrSchedule = 0.01, eps: ScalarOrSchedule = 1e-3
) -> Optimizer:
    """Clip the gradient of each unit to at most `clipping` times the norm of its weights.

    A unit is a slice along the first axis: a row of `[out, in]`, a filter of `OIHW`; a vector or a
    scalar is one unit. Gᵢ ← Gᵢ · min(1, clipping · max(‖Wᵢ‖, ε) / ‖Gᵢ‖). The paper does not clip
    the last layer: use `masked` for that. Source: Brock et al., High-Performance Large-Scale Image
    Recognition Without Normalization, 2021, https://arxiv.org/abs/2102.06171

    Args:
        clipping: largest ratio of the norms of gradient and weights.
        eps: ε, lower bound of the norm of weights, so that weights of 0 can be trained.

    Raises:
        ValueError: a number that is negative or not finite.

    >>> opt, params = adaptive_grad_clip(0.1), {"weight": torch.ones(2, 4)}  # row norms 2
    >>> opt.update({"weight": torch.ones(2, 4)}, opt.init(params), params)[0]["weight"][0]
    tensor([0.1000, 0.1000, 0.1000, 0.1000])
    """

    def rule(
        g: Tensor, p: Tensor, t: Tensor, clipping: Tensor, eps: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        limit = clipping * torch.maximum(_unit_norms(p), eps)
        norm = _unit_norms(g)
        above = norm > limit
        factor = torch.where(above, limit / torch.where(above, norm, 1.0), 1.0)
        return (g * factor).to(g.dtype), {}

    return leafwise("adaptive_grad_clip", rule, {"clipping": clipping, "eps": eps})


def _unit_norms(x: Tensor) -> Tensor:
    """Take the norm over all axes but the first, or over the only axis of a vector."""
    # In float64: the norm of a few numbers of 3e38 overflows in float32, their quotients do not.
    return norm(x.double(), dim=tuple(range(1, x.ndim)) or None, keepdim=True)
