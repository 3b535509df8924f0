"""Normalisation written out: torch's fused kernels have correct first derivatives only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import _modes
from fdl._numerics import at_least_32_bits, norm


def _normalised(x: Tensor, dims: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over `dims`; return the result, the mean and the variance."""
    wide = x.to(at_least_32_bits(x))
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    var = (centred * centred).mean(dims, keepdim=True)
    return centred * (var + eps).rsqrt(), mean, var


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any) -> Tensor:
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _move(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        running.copy_((1 - momentum) * running + momentum * value.detach())


def _in_stats_dtype(mean: Tensor | None, *values: Tensor | None) -> list[Tensor | None]:
    """Cast scale and shift to the dtype of the running statistics, which a `Policy` keeps."""
    return [x if x is None or mean is None else x.to(mean.dtype) for x in values]


def _with_running(
    x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float
) -> Tensor:
    columns = (1, -1, *[1] * (x.ndim - 2))
    y = (x.to(at_least_32_bits(x)) - mean.view(columns)) * (var + eps).rsqrt().view(columns)
    return _scaled(y, weight, bias, columns).to(x.dtype)


def _with_batch_statistics(
    x: Tensor, dims: Any, mean: Any, var: Any, weight: Any, bias: Any, momentum: float, eps: float
) -> Tensor:
    y, now_mean, now_var = _normalised(x, dims, eps)
    n = x.numel() // now_mean.numel()
    # Statistics of instances are averaged over the batch.
    now_mean, now_var = (s.reshape(s.shape[:2]).mean(0) for s in (now_mean, now_var))
    _move(mean, now_mean, momentum)
    _move(var, now_var * (n / max(n - 1, 1)), momentum)
    return _scaled(y, weight, bias, (1, -1, *[1] * (x.ndim - 2))).to(x.dtype)


def _own_gradient_layout(y: Tensor) -> Tensor:
    """Give the gradient a contiguous layout: torch's kernel misreads others for a batch of one."""
    return y.reshape(-1).view(y.shape)


def _batch_norm(
    mode: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ioffe and Szegedy, 2015."""
    weight, bias = _in_stats_dtype(running_mean, weight, bias)
    values = (input, running_mean, running_var, weight, bias)
    if not _modes.beyond_first():
        y = F.batch_norm(*values, training, momentum, eps)
        return _own_gradient_layout(y) if input.shape[0] == 1 else y
    if not training:
        return _with_running(*values, eps)  # type: ignore[arg-type]
    if input.numel() == input.shape[1]:
        raise ValueError(
            f"batch_norm: expected several values per channel, got {list(input.shape)}"
        )
    dims = [0, *range(2, input.ndim)]
    return _with_batch_statistics(input, dims, *values[1:], momentum, eps)


def _instance_norm(
    mode: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ulyanov et al., 2016."""
    weight, bias = _in_stats_dtype(running_mean, weight, bias)
    values = (input, running_mean, running_var, weight, bias)
    if not _modes.avoid_fused_kernels():
        return _own_gradient_layout(F.instance_norm(*values, use_input_stats, momentum, eps))
    if not use_input_stats:
        return _with_running(*values, eps)  # type: ignore[arg-type]
    if input.numel() == input.shape[0] * input.shape[1]:
        raise ValueError(
            f"instance_norm: expected several values per channel, got {[*input.shape]}"
        )
    return _with_batch_statistics(input, [*range(2, input.ndim)], *values[1:], momentum, eps)


def _layer_norm(
    mode: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Ba et al., 2016."""
    if not _modes.beyond_first():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    y, _, _ = _normalised(input, [*range(-len(normalized_shape), 0)], eps)
    return _scaled(y, weight, bias, normalized_shape).to(input.dtype)


def _group_norm(
    mode: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Wu and He, 2018."""
    if not _modes.beyond_first():
        return F.group_norm(input, num_groups, weight, bias, eps)
    grouped = input.reshape(input.shape[0], num_groups, -1)
    y = _normalised(grouped, [2], eps)[0].view(input.shape)
    return _scaled(y, weight, bias, (1, -1, *[1] * (input.ndim - 2))).to(input.dtype)


def _rms_norm(
    mode: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Zhang and Sennrich, 2019."""
    if not _modes.beyond_first():
        return F.rms_norm(input, normalized_shape, weight, eps)
    wide = input.to(at_least_32_bits(input))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    square = (wide * wide).mean([*range(-len(normalized_shape), 0)], keepdim=True)
    return _scaled(wide * (square + eps).rsqrt(), weight, None, normalized_shape).to(input.dtype)


def _weight_norm(mode: Any, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Salimans and Kingma, 2016."""
    if not _modes.avoid_fused_kernels():
        return torch._weight_norm(v, g, dim)
    others = [i for i in range(v.ndim) if i != dim % v.ndim] if dim != -1 else [*range(v.ndim)]
    return v * (g / norm(v, tuple(others), keepdim=True).to(v.dtype))


def _normalize(
    mode: Any,
    input: Tensor,
    p: float = 2.0,
    dim: Any = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    """Copy a result for `out` without derivatives, as `spectral_norm` needs for its vectors."""
    y = F.normalize(input, p, dim, eps)
    return y if out is None else out.copy_(y.detach())


def _in_torchs_order(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the rule of `torch.batch_norm`, which takes scale and shift before the statistics."""

    def ordered(
        mode: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *options: Any,
        cudnn_enabled: bool = True,
        **named: Any,
    ) -> Tensor:
        return rule(mode, input, running_mean, running_var, weight, bias, *options[:3], **named)

    return ordered


RULES: dict[str, Callable[..., Any]] = {
    "F.batch_norm": _batch_norm,
    "F.instance_norm": _instance_norm,
    "F.layer_norm": _layer_norm,
    "F.group_norm": _group_norm,
    "F.rms_norm": _rms_norm,
    "F.normalize": _normalize,
    "torch.layer_norm": _layer_norm,
    "torch.group_norm": _group_norm,
    "torch.rms_norm": _rms_norm,
    "torch._weight_norm": _weight_norm,
    "torch.batch_norm": _in_torchs_order(_batch_norm),
    "torch.instance_norm": _in_torchs_order(_instance_norm),
}
