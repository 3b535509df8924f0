"""Correct higher derivatives of functions for which torch's are wrong or missing.

While a function runs whose curvature is wanted, a mode intercepts its calls of torch. If torch has
a fused kernel without all derivatives, a rule replaces it by operations that have them, or raises
an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fdl import _modes
from fdl._differentiable import _functions
from fdl._numerics import at_least_32_bits, root


def written_out(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make `f` run with functions decomposed for which torch lacks higher derivatives.

    >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> far = written_out(lambda x: torch.cdist(x, x).sum())
    >>> torch.func.hessian(far)(x)[0, :, 1]          # torch.cdist raises
    tensor([[-0.2560,  0.1920],
            [ 0.1920, -0.1440]])
    """

    def call(*args: Any) -> Any:
        with _WrittenOut():
            return f(*args)

    return call


class _WrittenOut(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = _RULES.get(func)
        return func(*args, **kwargs or {}) if rule is None else rule(self, *args, **kwargs or {})


# ----------------------------------------------------------------------------------- distances


def _cdist(
    mode: Any,
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """Compute the distance of each row of `x1` from each row of `x2`: `[..., n, m]`.

    The kernel's derivative is wrong under `vmap` if only its cotangent is batched, as for the rows
    of a Jacobian, and missing in forward mode.
    """
    if not _modes.avoid_fused_kernels():
        return torch.cdist(x1, x2, p, compute_mode)
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(mode: Any, input: Tensor, p: float = 2.0) -> Tensor:
    if not _modes.avoid_fused_kernels():
        return torch.pdist(input, p)
    one, other = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[one] - input[other], p)


def _length(x: Tensor, p: float) -> Tensor:
    """Compute the p-norm of rows; its derivatives at 0 are 0, like those of the kernels."""
    wide = x.to(at_least_32_bits(x)).abs()
    if p == 2:
        length = root((wide * wide).sum(-1))
    elif p == math.inf:
        length = wide.amax(-1)
    elif p == 0:
        length = (wide != 0).sum(-1)
    elif p == 1:
        length = wide.sum(-1)
    else:
        powers = (wide**p).sum(-1)
        is_zero = powers == 0
        length = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, powers) ** (1 / p))
    return length.to(x.dtype)


# ----------------------------------------------------------------------------------- attention


def _attention(
    mode: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not _modes.avoid_fused_kernels():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _functions.attention(
        query, key, value, attn_mask, is_causal, scale, enable_gqa,
        lambda weights: F.dropout(weights, dropout_p),
    )  # fmt: skip


def _multi_head_attention(mode: Any, *args: Any, **kwargs: Any) -> Any:
    """Ask for the weights: torch then decomposes attention itself."""
    position, wanted = 15, kwargs.pop("need_weights", True)
    if len(args) > position:
        wanted, args = args[position], (*args[:position], True, *args[position + 1 :])
    else:
        kwargs["need_weights"] = True
    result, weights = F.multi_head_attention_forward(*args, **kwargs)
    return result, weights if wanted else None


# ------------------------------------------------------------------------------------ products


def _scatter_reduce(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Raise for products in forward mode, which torch differentiates wrongly."""

    def rule(mode: Any, *args: Any, **kwargs: Any) -> Tensor:
        forwards = torch.autograd.forward_ad._current_level >= 0  # type: ignore[attr-defined]
        if forwards and "prod" in (*args[3:], *kwargs.values()):
            raise NotImplementedError(
                "scatter_reduce: torch's derivative of reduce='prod' is wrong in forward mode, as "
                "in jvp and gnvp; sum logarithms with reduce='sum' instead"
            )
        return kernel(*args, **kwargs)

    return rule


def _kernel(path: str) -> Any:
    module, name = path.split(".")
    return getattr({"F": F, "torch": torch}[module], name)


_RULES: dict[Any, Callable[..., Any]] = {
    **{_kernel(path): rule for path, rule in _functions.RULES.items()},
    F.multi_head_attention_forward: _multi_head_attention,
    F.scaled_dot_product_attention: _attention,
    torch.pdist: _pdist,
    torch.cdist: _cdist,
    torch.scatter_reduce: _scatter_reduce(torch.scatter_reduce),
    Tensor.scatter_reduce: _scatter_reduce(Tensor.scatter_reduce),
    Tensor.scatter_reduce_: _scatter_reduce(Tensor.scatter_reduce_),
}
