"""Functions of torch whose kernels lack derivatives, written out in operations that have them all.

Torch's fused kernels have a first derivative in reverse mode. Of normalisation, what follows is
silently wrong (jvp of jvp, grad of jvp, all third derivatives); attention has no more at all. So a
kernel serves as long as one `grad` is active at most; from a `jvp` or a second `grad` on, the
function is written out. Attention and weight normalisation are written out under `vmap` as well,
where torch would run their kernels once for each example.
"""

from __future__ import annotations  # Dynamo would run those of nested functions

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fdl._dynamo import assume_constant_result
from fdl._numerics import at_least_32_bits, norm

__all__ = ["RULES", "attention", "beyond_first", "lacks_kernels", "under_vmap"]


@assume_constant_result  # Dynamo has the same transformations active while it traces
def beyond_first() -> bool:
    """Say whether derivatives beyond the first in reverse mode may be asked for."""
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return True
    return _active().count("Grad") > 1


@assume_constant_result
def under_vmap() -> bool:
    """Say whether a `vmap` is active."""
    return "Vmap" in _active()


def lacks_kernels() -> bool:
    """Say whether a fused kernel without a rule for `vmap` must not be used."""
    return beyond_first() or under_vmap()


def _active() -> list[str]:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [str(level.key()).rpartition(".")[2] for level in stack]


# ------------------------------------------------------------------------------- normalisation


def _normalised(x: Tensor, dims: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean over `dims`, divide by the deviation; return both statistics as well."""
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
    """Have scale and shift in the running statistics' dtype, which a `Policy` leaves alone."""
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
    # An instance's statistics are averaged over the batch.
    now_mean, now_var = (s.reshape(s.shape[:2]).mean(0) for s in (now_mean, now_var))
    _move(mean, now_mean, momentum)
    _move(var, now_var * (n / max(n - 1, 1)), momentum)
    return _scaled(y, weight, bias, (1, -1, *[1] * (x.ndim - 2))).to(x.dtype)


def _own_gradient_layout(y: Tensor) -> Tensor:
    """Have the gradient in plain layout where torch's kernel misreads others: a batch of one."""
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
    if not beyond_first():
        y = F.batch_norm(*values, training, momentum, eps)
        return _own_gradient_layout(y) if input.shape[0] == 1 else y
    if not training:
        return _with_running(*values, eps)  # type: ignore[arg-type]
    if input.numel() == input.shape[1]:
        raise ValueError(f"batch_norm: one value per channel has no variance: {list(input.shape)}")
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
    if not lacks_kernels():
        return _own_gradient_layout(F.instance_norm(*values, use_input_stats, momentum, eps))
    if not use_input_stats:
        return _with_running(*values, eps)  # type: ignore[arg-type]
    if input.numel() == input.shape[0] * input.shape[1]:
        raise ValueError(f"instance_norm: one value per channel has no variance: {input.shape}")
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
    if not beyond_first():
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
    if not beyond_first():
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
    if not beyond_first():
        return F.rms_norm(input, normalized_shape, weight, eps)
    wide = input.to(at_least_32_bits(input))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    square = (wide * wide).mean([*range(-len(normalized_shape), 0)], keepdim=True)
    return _scaled(wide * (square + eps).rsqrt(), weight, None, normalized_shape).to(input.dtype)


def _weight_norm(mode: Any, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Salimans and Kingma, 2016."""
    if not lacks_kernels():
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
    """Copy to `out`, as `spectral_norm` does to its vectors: constants to every derivative."""
    y = F.normalize(input, p, dim, eps)
    return y if out is None else out.copy_(y.detach())


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
    """Return softmax(Q Kᵀ · scale + mask) V; a query that may look at nothing gets 0."""
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
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
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.where(blind, 0, torch.where(blind, 0, scores).softmax(-1))
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
    """Look rows up; gradients are dense, and that of the padding row is 0 in every mode."""
    _check_embedding("embedding", max_norm, scale_grad_by_freq)
    y = F.embedding(input, weight, padding_idx)
    if padding_idx is None or not beyond_first():
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
    if beyond_first():
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
            f"{name}: what scale_grad_by_freq=True makes is no derivative; weight the loss instead"
        )


# ------------------------------------------------------------------------- activations, losses


def _glu(mode: Any, input: Tensor, dim: int = -1) -> Tensor:
    if not beyond_first():
        return F.glu(input, dim)
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def _hardsigmoid(mode: Any, input: Tensor, inplace: bool = False) -> Tensor:
    if not beyond_first():
        return F.hardsigmoid(input, inplace)
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


def _loss(
    kernel: Callable[..., Tensor], formula: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Make the rule of a loss of `input` and `target` that is a mean of `formula`."""

    def rule(mode: Any, input: Tensor, target: Tensor, *args: Any, **options: Any) -> Tensor:
        reduction = options.get("reduction", "mean")
        plain = not args and not (options.keys() - {"reduction", "delta"})
        if not beyond_first():
            return kernel(input, target, *args, **options)
        if not plain and any(x is not None for x in (*args, *_rest(options))):
            _refuse(kernel.__name__, "call it with reduction= alone")
        each = formula(input, target, **{k: v for k, v in options.items() if k == "delta"})
        return {"none": lambda x: x, "mean": Tensor.mean, "sum": Tensor.sum}[reduction](each)

    return rule


def _rest(options: dict[str, Any]) -> list[Any]:
    return [x for name, x in options.items() if name not in ("reduction", "delta")]


def _huber(input: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    error = (input - target).abs()
    return torch.where(error <= delta, error * error / 2, delta * (error - delta / 2))


def _first_only(kernel: Callable[..., Tensor], instead: str) -> Callable[..., Tensor]:
    """Make the rule of a function that has a first derivative and no other."""

    def rule(mode: Any, *args: Any, **kwargs: Any) -> Tensor:
        if beyond_first():
            _refuse(kernel.__name__, instead)
        return kernel(*args, **kwargs)

    return rule


def _refuse(name: str, instead: str) -> None:
    raise NotImplementedError(
        f"{name} has no derivatives but the first, in reverse mode (grad, vjp); {instead}"
    )


RULES: dict[str, Callable[..., Any]] = {
    "F.batch_norm": _batch_norm,
    "F.instance_norm": _instance_norm,
    "F.layer_norm": _layer_norm,
    "F.group_norm": _group_norm,
    "F.rms_norm": _rms_norm,
    "F.normalize": _normalize,
    "F.embedding": _embedding,
    "F.embedding_bag": _embedding_bag,
    "F.glu": _glu,
    "F.hardsigmoid": _hardsigmoid,
    "F.mse_loss": _loss(F.mse_loss, lambda input, target: (input - target) ** 2),
    "F.huber_loss": _loss(F.huber_loss, _huber),
    "F.soft_margin_loss": _loss(F.soft_margin_loss, lambda x, target: F.softplus(-target * x)),
    "F.ctc_loss": _first_only(F.ctc_loss, "torch has no others"),
    "F.multi_margin_loss": _first_only(F.multi_margin_loss, "write it out"),
    "F.multilabel_margin_loss": _first_only(F.multilabel_margin_loss, "write it out"),
    "torch.layer_norm": _layer_norm,
    "torch.group_norm": _group_norm,
    "torch.rms_norm": _rms_norm,
    "torch._weight_norm": _weight_norm,
    "torch.batch_norm": (
        lambda mode, input, weight, bias, running_mean, running_var, training, momentum, eps,
        cudnn_enabled: _batch_norm(
            mode, input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    ),
    "torch.instance_norm": (
        lambda mode, input, weight, bias, running_mean, running_var, use_input_stats, momentum,
        eps, cudnn_enabled: _instance_norm(
            mode, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    ),
    "torch.embedding": (
        lambda mode, weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False:
        _embedding(
            mode, indices, weight, padding_idx if padding_idx >= 0 else None,
            scale_grad_by_freq=scale_grad_by_freq,
        )
    ),
}  # fmt: skip
