"""Adafactor: Adam with the second moments of a matrix factored into one row and one column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl import tree
from fdl._numerics import norm
from fdl.optim._base import Optimizer, State
from fdl.optim._descent import negated
from fdl.optim._hyperparams import RANGES, ScalarOrSchedule, is_zero, named_rates
from fdl.optim._leafwise import Result, chain, leafwise
from fdl.optim._masking import Mask, selected
from fdl.tree import Tree


def adafactor(
    lr: ScalarOrSchedule = 1e-2,
    beta2_decay: ScalarOrSchedule = -0.8,
    eps: tuple[ScalarOrSchedule | None, ScalarOrSchedule] = (None, 1e-3),
    d: ScalarOrSchedule = 1.0,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    maximize: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Adam without first moments, with second moments factored into row and column means.

    With β = 1 − t^`beta2_decay`: R ← βR + (1−β) mean(g², over columns), C likewise over rows,
    V = R C / mean(R); for leaves of fewer than two axes V ← βV + (1−β)g². U = g/√V;
    w ← (1 − lr·λ)w − α U / max(1, rms(U)/d), α = max(ε₂, rms(w)) · min(lr, 1/√t). Equals
    `torch.optim.Adafactor`. Slots: `row_var`, `col_var` and `variance`, of shape `[0]` if unused;
    with a mask also `decays` (bool []).
    Source: Shazeer & Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
    https://arxiv.org/abs/1804.04235

    Args:
        lr: the largest relative step; the step of update t is at most 1/√t.
        beta2_decay: exponent that sets how fast β goes to 1, at most 0.
        eps: ε₁, the lower bound of mean(R) and √V (None: the dtype's epsilon), and ε₂.
        d: root mean square at which an update is clipped, at least 1.
        weight_decay: λ, decoupled.
        maximize: maximize the objective instead.
        mask: parameters that decay, as in `add_decayed_weights`; all if None. It is read at init.

    Raises:
        ValueError: a number that is not finite or out of its range; (at init) as for `masked`.

    >>> opt, params = adafactor(), {"w": torch.ones(2, 2)}
    >>> opt.update({"w": torch.full((2, 2), 3.0)}, opt.init(params), params)[0]
    {'w': tensor([[-0.0100, -0.0100],
            [-0.0100, -0.0100]])}
    """

    def rule(
        g: Tensor,
        p: Tensor,
        t: Tensor,
        row_var: Tensor,
        col_var: Tensor,
        variance: Tensor,
        lr: Tensor,
        beta2_decay: Tensor,
        eps2: Tensor,
        d: Tensor,
        eps1: Tensor | None = None,
        weight_decay: Tensor | None = None,
        decays: Tensor | None = None,
    ) -> Result:
        new = t**beta2_decay  # 1 − β
        least = torch.full_like(t, torch.finfo(p.dtype).eps) if eps1 is None else eps1
        square = g * g
        if g.ndim > 1:
            row_var = row_var + new * (square.mean(-1, keepdim=True) - row_var)
            col_var = col_var + new * (square.mean(-2, keepdim=True) - col_var)
            v = row_var * col_var / _at_least(row_var.mean(-2, keepdim=True), least)
        else:
            v = variance = variance + new * (square - variance)
        u = g * _at_least(v, least * least).rsqrt()
        alpha = torch.maximum(eps2, _rms(p)) * torch.minimum(lr, t.rsqrt())
        update = -alpha / (_rms(u) / d).clamp(min=1.0) * u
        if weight_decay is not None:
            decay = lr * weight_decay
            update = update - (decay if decays is None else torch.where(decays, decay, 0.0)) * p
        moments = {"row_var": row_var, "col_var": col_var, "variance": variance}
        return update, moments if decays is None else {**moments, "decays": decays}

    slots: dict[str, Callable[[Tensor], Tensor]] = {
        "row_var": lambda p: torch.zeros_like(p[..., :1]) if p.ndim > 1 else p.new_zeros(0),
        "col_var": lambda p: torch.zeros_like(p[..., :1, :]) if p.ndim > 1 else p.new_zeros(0),
        "variance": lambda p: p.new_zeros(0) if p.ndim > 1 else torch.zeros_like(p),
    }
    eps1, eps2 = named_rates("adafactor", "eps", eps, "eps1", "eps2").values()
    rates = {"lr": lr, "beta2_decay": beta2_decay, "eps2": eps2, "d": d}
    if eps1 is not None:
        rates["eps1"] = eps1
    if is_zero(weight_decay):
        mask = None
    else:
        rates["weight_decay"] = weight_decay
    if mask is not None:
        slots["decays"] = lambda p: torch.ones((), dtype=torch.bool, device=p.device)
    direct = leafwise("adafactor", rule, rates, slots, RANGES)

    def init(params: Tree) -> State:
        state = direct.init(params)
        if mask is None:
            return state
        chosen = tree.unflatten_dict(selected(params, mask, "adafactor"), like=params)
        decays = tree.map(lambda ones, chosen: ones & chosen, state.slots["decays"], chosen)
        return State(state.hyper, {**state.slots, "decays": decays})

    return chain(*negated(maximize), Optimizer(init, direct.update))


def _rms(x: Tensor) -> Tensor:
    """Return the root mean square as float64 [], which scales a leaf of any dtype."""
    return norm(x).double() / x.numel() ** 0.5


def _at_least(x: Tensor, low: Tensor) -> Tensor:
    return torch.maximum(x, low.to(x.dtype))
