"""Muon: orthogonalized momentum for matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdl import tree
from fdl._checks import check_number
from fdl._numerics import norm
from fdl.optim._base import Optimizer
from fdl.optim._descent import descend
from fdl.optim._hyperparams import ScalarOrSchedule
from fdl.optim._leafwise import Result, leafwise
from fdl.optim._masking import Mask
from fdl.tree import Tree


def scale_by_muon(
    momentum: ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> Optimizer:
    """Orthogonalize the momentum of a matrix: bring its singular values near 1.

    M ← μM + (1−μ)G; X = (1−μ)G + μM with `nesterov`, else M. X/‖X‖ then undergoes `ns_steps`
    iterations of Newton–Schulz, X ← aX + (bA + cA²)X with A = XXᵀ, in bfloat16. Leaves must have
    two axes. Slot: `momentum_buffer` M. Source: Jordan et al., Muon: An optimizer for hidden layers
    in neural networks, 2024, https://kellerjordan.github.io/posts/muon/

    Args:
        momentum: μ.
        nesterov: use Nesterov momentum.
        ns_coefficients: a, b, c.
        eps: lower bound of ‖X‖.
        ns_steps: number of iterations.
        adjust_lr_fn: factor of the update of a matrix `[out, in]`: "original" (the default),
            √max(1, out/in); "match_rms_adamw", 0.2 √max(out, in); "spectral_unclamped", √(out/in).

    Raises:
        ValueError: an unknown `adjust_lr_fn`, or a number out of its range; (at init) a leaf does
            not have two axes (each path is listed).

    >>> opt, params = scale_by_muon(), {"w": torch.ones(2, 2)}
    >>> opt.update({"w": torch.eye(2)}, opt.init(params), params)[0]["w"].diag()
    tensor([1.1250, 1.1250])
    """
    ratios = {
        "original": lambda out, into: math.sqrt(max(1, out / into)),
        "match_rms_adamw": lambda out, into: 0.2 * math.sqrt(max(out, into)),
        "spectral_unclamped": lambda out, into: math.sqrt(out / into),
    }
    name = adjust_lr_fn or "original"
    if name not in ratios:
        raise ValueError(
            f"scale_by_muon: adjust_lr_fn must be one of {list(ratios)}, got {adjust_lr_fn!r}"
        )
    words = "from 1 to 99"
    check_number("scale_by_muon", "ns_steps", ns_steps, words, lambda steps: 1 <= steps < 100)

    def rule(g: Tensor, p: Tensor, t: Tensor, momentum_buffer: Tensor, momentum: Tensor) -> Result:
        # torch.lerp, to equal torch bit by bit before x is rounded to bfloat16.
        m = torch.lerp(momentum_buffer, g, (1 - momentum).to(g.dtype))
        x = torch.lerp(g, m, momentum.to(g.dtype)) if nesterov else m
        ratio = ratios[name](*p.shape)
        return ratio * _orthogonalize(x, ns_coefficients, ns_steps, eps).to(g.dtype), {
            "momentum_buffer": m
        }

    inner = leafwise(
        "scale_by_muon", rule, {"momentum": momentum}, {"momentum_buffer": torch.zeros_like}
    )

    def init(params: Tree) -> Tree:
        lines = [
            f"{path}: {list(leaf.shape)}"
            for path, leaf in tree.flatten_dict(params).items()
            if leaf.ndim != 2
        ]
        if lines:
            raise ValueError(
                "scale_by_muon: leaves must be matrices [out, in]; use another optimizer for the "
                "others, with multi_transform:\n  " + "\n  ".join(lines)
            )
        return inner.init(params)

    return Optimizer(init, inner.update)


def _orthogonalize(
    x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.to(torch.bfloat16)
    x = x.T if tall else x
    x = x / norm(x).to(x.dtype).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def muon(
    lr: ScalarOrSchedule = 1e-3,
    weight_decay: ScalarOrSchedule = 0.1,
    momentum: ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    *,
    mask: Mask | None = None,
) -> Optimizer:
    """Step along orthogonalized momentum, for matrices only; equals `torch.optim.Muon`.

    w ← w − lr · (factor · orthogonalized + λw); see `scale_by_muon`. Use another optimizer for
    biases, embeddings and the like, with `multi_transform`. Source: Jordan et al., Muon: An
    optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon/

    Args:
        lr: the learning rate.
        weight_decay: λ, decoupled.
        momentum: decay rate of the mean of gradients.
        nesterov: use Nesterov momentum.
        ns_coefficients: coefficients of the Newton–Schulz iteration.
        eps: lower bound of the norm of a matrix.
        ns_steps: number of Newton–Schulz iterations.
        adjust_lr_fn: name of the function that scales a step by the shape of its matrix.
        mask: parameters that decay, as in `add_decayed_weights`; all if None.

    Raises:
        ValueError: an unknown `adjust_lr_fn`, or a number out of its range; (at init) a leaf does
            not have two axes (each path is listed).

    >>> opt, params = muon(lr=0.1, weight_decay=0.0), {"w": torch.ones(2, 2)}
    >>> opt.update({"w": torch.eye(2)}, opt.init(params), params)[0]["w"].diag()
    tensor([-0.1125, -0.1125])
    """
    direction = scale_by_muon(momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn)
    return descend("muon", [direction], lr, weight_decay, decoupled=True, mask=mask)
