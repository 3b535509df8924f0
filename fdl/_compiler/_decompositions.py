"""Decompositions into primitives: Inductor's, except for some that lose a NaN or a sign.

In some of Inductor's a NaN takes the branch of ordinary numbers, so that the derivative of a loss
that is NaN may be 0 or 1; its `x % y` and `clamp` change the sign of a zero; its `x // y` rounds
x / y before it takes the floor. The decompositions in this file equal torch's own kernels. Some are
of views that copy, which Inductor lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.node import has_side_effect

from fdl._compiler._fixed_shapes import FIXED_SHAPES
from fdl._compiler._narrow_integers import NARROW_INTEGERS
from fdl._threefry import encrypted_words

aten = torch.ops.aten
MEAN = 1  # the reduction; 0 is none, 2 the sum


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the decomposition of each operation that Inductor does not lower directly."""
    # Imported here because it takes a second; decompositions depend on lowering.
    import torch._inductor.lowering  # noqa: F401
    from torch._inductor.decomposition import select_decomp_table

    return {**select_decomp_table(), **OWN, **UNKNOWN, **FIXED_SHAPES, **NARROW_INTEGERS}


@cache
def early_decompositions() -> dict[Any, Callable[..., Any]]:
    """Return those that are needed while a function is traced, rather than afterwards.

    `native_batch_norm` writes running statistics, which its schema does not say, and copies to
    another device are to be seen. `_foreach_add` asks for the value of a tensor that it adds.
    """
    packets = [aten.native_batch_norm, aten.cudnn_batch_norm, aten._to_copy]
    own = {aten._foreach_add.Tensor: foreach_add}
    return {**get_decompositions(packets), **FIXED_SHAPES, **own}


def foreach_add(tensors: list[Tensor], other: Tensor, *, alpha: float = 1) -> list[Tensor]:
    """Add one 0-d tensor to each of a list."""
    return [torch.add(x, other, alpha=alpha) for x in tensors]


def elu_backward(
    grad: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor
) -> Tensor:
    """Also for `selu` and `celu`; `x` is the input, or the output if `is_result`."""
    negative = x + alpha * scale if is_result else alpha * scale * torch.exp(x * input_scale)
    return torch.where(x > 0, grad * scale, grad * input_scale * negative)


def hardswish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """1 for x ≥ 3, 0 for x ≤ −3, x/3 + ½ in between."""
    return torch.where(x >= 3, grad, torch.where(x <= -3, 0.0, grad * (x / 3 + 0.5)))


def smooth_l1_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, reduction: int, beta: float
) -> Tensor:
    """±1 if |x − y| ≥ β, (x − y)/β otherwise."""
    difference = x - target
    grad = grad / x.numel() if reduction == MEAN else grad
    far = difference.abs() >= beta
    return torch.where(far, grad * difference.sign(), grad * difference / beta)


def multilabel_margin_loss(x: Tensor, labels: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Σ max(0, 1 − x_j + x_i)/C of labels j before the first −1 and classes i that are no label.

    That of torch 2.11 counts labels after the first −1.
    """
    rows, sets = torch.atleast_2d(x), torch.atleast_2d(labels)
    classes = torch.arange(rows.shape[1], device=x.device)
    counted = (sets == -1).cumsum(1) == 0
    index = torch.where(counted, sets, 0)
    is_label = ((index[:, :, None] == classes) & counted[:, :, None]).any(1)
    margin = 1 - rows.gather(1, index)[:, :, None] + rows[:, None, :]
    adds = (margin > 0) & counted[:, :, None] & ~is_label[:, None, :]
    losses = torch.where(adds, margin, 0).sum((1, 2)) / rows.shape[1]
    loss = losses.mean() if reduction == MEAN else losses.sum() if reduction else losses
    shape = x.shape[:-1] if reduction == 0 else ()
    return loss.reshape(shape), is_label.to(x.dtype).reshape(labels.shape)


def remainder(x: Tensor, y: Tensor | float) -> Tensor:
    """Use `fmod`, which is exact and keeps the sign of a zero; x − y ⌊x/y⌋ would be rounded."""
    dtype = torch.result_type(x, y)
    if not dtype.is_floating_point:
        return NotImplemented
    x = x.to(dtype)
    y = y.to(dtype) if isinstance(y, Tensor) else _scalar(y, x)
    rest = torch.fmod(x, y)
    return torch.where(_is_opposite(rest, y), rest + y, rest)


def _is_opposite(rest: Tensor, y: Tensor) -> Tensor:
    """Compare the sign of a rest that is not 0 with that of its divisor."""
    return torch.logical_and(rest != 0, (rest < 0) != (y < 0))


def fmod(x: Tensor, y: float) -> Tensor:
    """Round the number to the dtype of x, as torch does."""
    return torch.fmod(x, _scalar(y, x)) if x.is_floating_point() else NotImplemented


def rounded_quotient(x: Tensor | float, y: Tensor | float, *, rounding_mode: str | None) -> Tensor:
    """Take what `fmod` leaves off x before a floor, so that the quotient is not rounded up.

    0.3 // 0.1 is 2 and 0.6 // 0.1 is 5: the doubles next to 0.3 and 0.6 are below the multiples of
    that next to 0.1, though the quotients are rounded to 3 and 6.
    """
    dtype = torch.result_type(x, y)
    if rounding_mode is None or not dtype.is_floating_point:
        return NotImplemented
    device = (x if isinstance(x, Tensor) else cast(Tensor, y)).device
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    one_divisor = not isinstance(y, Tensor) or y.numel() == 1
    if not isinstance(x, Tensor):
        x = torch.full((), x, dtype=dtype, device=device)
    if not isinstance(y, Tensor):
        y = torch.full((), y, dtype=wide, device=device)
    x, y = x.to(dtype).to(wide), y.to(wide)

    def rounded(z: Tensor) -> Tensor:  # torch rounds each step to 16 bits, but not for one divisor
        return z if one_divisor else z.to(dtype).to(wide)

    quotient = rounded(x / y)
    if rounding_mode == "trunc":
        return torch.trunc(quotient).to(dtype)
    rest = torch.fmod(x, y)
    whole = rounded(rounded(x - rest) / y)
    whole = torch.where(_is_opposite(rest, y), rounded(whole - 1), whole)
    nearest = torch.floor(whole)
    nearest = torch.where(whole - nearest > 0.5, nearest + 1, nearest)
    nearest = torch.where(whole == 0, torch.copysign(torch.zeros_like(x), quotient), nearest)
    return torch.where(y == 0, quotient, nearest).to(dtype)


def assert_async(condition: Tensor) -> None:
    """Raise with the message of torch; without a message, Inductor would drop it."""
    aten._assert_async.msg(condition, "Expected Tensor with single nonzero value, but got zero")


def clamp_min(x: Tensor, low: float) -> Tensor:
    """Rely on `maximum` returning the second of two zeros."""
    return torch.maximum(_scalar(low, x), x) if x.is_floating_point() else NotImplemented


def clamp_max(x: Tensor, high: float) -> Tensor:
    """Rely on `minimum` returning the second of two zeros."""
    return torch.minimum(_scalar(high, x), x) if x.is_floating_point() else NotImplemented


def power(x: Tensor, exponent: float) -> Tensor:
    """Use 1/√x where torch does: it is −∞ at −0 and NaN at −∞; and write out squares."""
    if not x.is_floating_point():
        return NotImplemented
    if exponent == -0.5:
        return torch.rsqrt(x)
    return x * x if exponent == 2 else x.clone() if exponent == 1 else NotImplemented


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)


OWN: dict[Any, Callable[..., Any]] = {
    aten.elu_backward.default: elu_backward,
    aten.hardswish_backward.default: hardswish_backward,
    aten.smooth_l1_loss_backward.default: smooth_l1_loss_backward,
    aten.multilabel_margin_loss_forward.default: multilabel_margin_loss,
    aten.remainder.Tensor: remainder,
    aten.remainder.Scalar: remainder,
    aten.fmod.Scalar: fmod,
    aten.div.Tensor_mode: rounded_quotient,
    aten.div.Scalar_mode: rounded_quotient,
    aten.clamp_min.default: clamp_min,
    aten.clamp_max.default: clamp_max,
    aten.pow.Tensor_Scalar: power,
    has_side_effect(aten._assert_async.default): assert_async,
}


def random_words(key: Tensor, shape: list[int], width: int, shift: int) -> Tensor:
    """Leave words on the CPU to the kernel of `_draws.py`."""
    return NotImplemented if key.device.type == "cpu" else encrypted_words(key, shape, width, shift)


def copying(view: Any) -> Callable[..., Any]:
    """Return the variant of a view that copies, such as `split_copy`, which `vmap` may leave."""

    def copy(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(torch.clone, view(*args, **kwargs))

    return copy


# Operations that Inductor has no rule for.
UNKNOWN: dict[Any, Callable[..., Any]] = {
    torch.ops.fdl.random_words.default: random_words,
    aten.split_copy.Tensor: copying(aten.split.Tensor),
    aten.select_copy.int: copying(aten.select.int),
    aten.slice_copy.Tensor: copying(aten.slice.Tensor),
    aten.detach_copy.default: copying(aten.detach.default),
    aten.view_as_real_copy.default: copying(aten.view_as_real.default),
    aten.view_as_complex_copy.default: copying(aten.view_as_complex.default),
    aten._conj_copy.default: copying(aten._conj.default),
    aten._neg_view_copy.default: copying(aten._neg_view.default),
}
