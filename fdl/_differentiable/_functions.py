"""Functions of torch whose kernels lack derivatives, written out in differentiable operations.

Torch's fused kernels have a first derivative in reverse mode. Those of normalisation return wrong
values beyond it without an error (jvp of jvp, grad of jvp, all third derivatives); attention has no
further derivatives. So kernels are used while at most one `grad` is active; under a `jvp` or a
second `grad` the function is written out. Attention and weight normalisation are written out under
`vmap` as well, where torch would run their kernels once per example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import _modes
from fdl._differentiable import _norms

# ----------------------------------------------------------------------------------- attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return softmax(Q Kᵀ · scale + mask) V; queries whose keys are all masked get 0."""
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: pass attn_mask or is_causal, not both")
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return drop(scores.softmax(-1)) @ value
    if attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, -math.inf)
    else:
        scores = scores + attn_mask
    masked = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.where(masked, 0, torch.where(masked, 0, scores).softmax(-1))
    return drop(weights) @ value


# ---------------------------------------------------------------------------------- embeddings


def _embedding(
    mode: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows; gradients are dense, and the gradient of the padding row is always 0."""
    _check_embedding("embedding", max_norm, scale_grad_by_freq)
    y = F.embedding(input, weight, padding_idx)
    if padding_idx is None or not _modes.beyond_first():
        return y
    padding = input == padding_idx % weight.shape[0]
    return torch.where(padding.unsqueeze(-1), y.detach(), y)


def _embedding_bag(
    keyed: Any,
    /,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    _check_embedding("embedding_bag", max_norm, scale_grad_by_freq)
    if _modes.beyond_first():
        _refuse("embedding_bag", "use embedding and a sum")
    return F.embedding_bag(
        input, weight, offsets, None, 2.0, False, mode, False, per_sample_weights,
        include_last_offset, padding_idx,
    )  # fmt: skip


def _check_embedding(name: str, max_norm: float | None, by_frequency: bool) -> None:
    if max_norm is not None:
        raise ValueError(
            f"{name}: max_norm would write to the weight, which belongs to the caller; scale the "
            "rows in the forward, or the parameters after each step"
        )
    if by_frequency:
        raise NotImplementedError(
            f"{name}: scale_grad_by_freq=True does not give a derivative; weight the loss instead"
        )


# ------------------------------------------------------------------------- activations, losses


def _glu(mode: Any, input: Tensor, dim: int = -1) -> Tensor:
    if not _modes.beyond_first():
        return F.glu(input, dim)
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def _hardsigmoid(mode: Any, input: Tensor, inplace: bool = False) -> Tensor:
    if not _modes.beyond_first():
        return F.hardsigmoid(input, inplace)
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


def _mse_loss(
    mode: Any,
    input: Tensor,
    target: Tensor,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    **weight: Any,
) -> Tensor:
    if not _modes.beyond_first():
        return F.mse_loss(input, target, size_average, reduce, reduction, **weight)
    _check_plain("mse_loss", size_average, reduce, *weight.values())
    return _reduced((input - target) ** 2, reduction)


def _huber_loss(
    mode: Any,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    **weight: Any,
) -> Tensor:
    """Huber, 1964."""
    if not _modes.beyond_first():
        return F.huber_loss(input, target, reduction, delta, **weight)
    _check_plain("huber_loss", *weight.values())
    error = (input - target).abs()
    each = torch.where(error <= delta, error * error / 2, delta * (error - delta / 2))
    return _reduced(each, reduction)


def _soft_margin_loss(
    mode: Any,
    input: Tensor,
    target: Tensor,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
) -> Tensor:
    if not _modes.beyond_first():
        return F.soft_margin_loss(input, target, size_average, reduce, reduction)
    _check_plain("soft_margin_loss", size_average, reduce)
    return _reduced(F.softplus(-target * input), reduction)


def _check_plain(name: str, *options: Any) -> None:
    if any(option is not None for option in options):
        _refuse(name, "call it without weight, size_average and reduce")


def _reduced(each: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()


def _first_only(kernel: Callable[..., Tensor], instead: str) -> Callable[..., Tensor]:
    """Make the rule of a function that has only a first derivative."""

    def rule(mode: Any, *args: Any, **kwargs: Any) -> Tensor:
        if _modes.beyond_first():
            _refuse(kernel.__name__, instead)
        return kernel(*args, **kwargs)

    return rule


def _refuse(name: str, instead: str) -> None:
    raise NotImplementedError(
        f"{name} has no derivatives but the first, in reverse mode (grad, vjp); {instead}"
    )


RULES: dict[str, Callable[..., Any]] = {
    **_norms.RULES,
    "F.embedding": _embedding,
    "F.embedding_bag": _embedding_bag,
    "F.glu": _glu,
    "F.hardsigmoid": _hardsigmoid,
    "F.mse_loss": _mse_loss,
    "F.huber_loss": _huber_loss,
    "F.soft_margin_loss": _soft_margin_loss,
    "F.ctc_loss": _first_only(F.ctc_loss, "use another loss"),
    "F.multi_margin_loss": _first_only(F.multi_margin_loss, "write it out"),
    "F.multilabel_margin_loss": _first_only(F.multilabel_margin_loss, "write it out"),
    "torch.embedding": (
        lambda mode, weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False:
        _embedding(
            mode, indices, weight, padding_idx if padding_idx >= 0 else None,
            scale_grad_by_freq=scale_grad_by_freq,
        )
    ),
}  # fmt: skip
