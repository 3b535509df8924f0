"""Normalization over features, over groups of channels and over the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fdl._numerics import at_least_32_bits, keep
from fdl.nn._helpers import check_input, check_sizes, get_param
from fdl.nn._model import Model, StatefulModel
from fdl.nn.init import ones, zeros
from fdl.tree import Tree


def layer_norm(shape: int | Sequence[int], *, eps: float = 1e-5) -> Model:
    """Normalise over the last axes, of sizes `shape`, then scale and shift; `torch.nn.LayerNorm`.

    y = (x − mean) / √(variance + eps) · weight + bias, with derivatives of every order, forward and
    reverse.

    Args:
        shape: sizes of the axes to normalise over, or one int for the last axis alone.
        eps: added to the variance.

    Raises:
        ValueError: a size below 1; at apply, an x whose last axes have other sizes.

    Source: Ba et al., Layer Normalization, 2016, https://arxiv.org/abs/1607.06450

    >>> from fdl import random
    >>> layer = layer_norm(3)
    >>> layer.apply(layer.init(random.key(0)), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[-1.2247,  0.0000,  1.2247]])
    """
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    name = f"layer_norm({shape})"
    check_sizes(name, *sizes)

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        weight, bias = (get_param(params, p, sizes, name) for p in ("weight", "bias"))
        _check_last_axes(name, x, sizes)
        return (_standardised(x, len(sizes), eps) * weight + bias).to(x.dtype)

    return Model(lambda key: _scale_and_shift(key, sizes), apply, uses_key=False)


def rms_norm(shape: int | Sequence[int], *, eps: float | None = None) -> Model:
    """Divide by the root mean square over the last axes, then scale; equals `torch.nn.RMSNorm`.

    y = x / √(mean(x²) + eps) · weight.

    Args:
        shape: sizes of the axes to normalise over, or one int for the last axis alone.
        eps: added to the mean square; if None, `torch.finfo(dtype).eps` of the dtype in which it is
            computed, that of x but at least float32.

    Raises:
        ValueError: a size below 1; at apply, an x whose last axes have other sizes.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019,
    https://arxiv.org/abs/1910.07467

    >>> from fdl import random
    >>> layer = rms_norm(2)
    >>> layer.apply(layer.init(random.key(0)), torch.tensor([[1.0, 7.0]]))
    tensor([[0.2000, 1.4000]])
    """
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    name = f"rms_norm({shape})"
    check_sizes(name, *sizes)

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        weight = get_param(params, "weight", sizes, name)
        _check_last_axes(name, x, sizes)
        wide = x.to(at_least_32_bits(x))
        least = torch.finfo(wide.dtype).eps if eps is None else eps
        square = (wide * wide).mean(list(range(-len(sizes), 0)), keepdim=True)
        return (wide * (square + least).rsqrt() * weight).to(x.dtype)

    return Model(lambda key: {"weight": ones(key, sizes)}, apply, uses_key=False)


def group_norm(num_groups: int, num_channels: int, *, eps: float = 1e-5) -> Model:
    """Normalise each group of channels of each example, then scale and shift each channel.

    Equals `torch.nn.GroupNorm` for x `[batch, num_channels, ...]`. Examples do not affect each
    other, so training and evaluation are the same.

    Args:
        num_groups: number of groups; divides `num_channels`.
        num_channels: size of the second axis.
        eps: added to the variance.

    Raises:
        ValueError: a size below 1, or `num_groups` does not divide `num_channels`; at apply, x has
            another number of channels, or one value per group.

    Source: Wu and He, Group Normalization, 2018, https://arxiv.org/abs/1803.08494

    >>> from fdl import random
    >>> layer = group_norm(2, 4, eps=0.0)
    >>> layer.apply(layer.init(random.key(0)), torch.tensor([[1.0, 2.0, 10.0, 30.0]]))
    tensor([[-1.,  1., -1.,  1.]])
    """
    name = f"group_norm({num_groups}, {num_channels})"
    check_sizes(name, num_groups, num_channels)
    if num_channels % num_groups:
        raise ValueError(f"{name}: num_groups must divide num_channels")
    return _by_groups(name, num_groups, num_channels, eps, affine=True)


def instance_norm(num_features: int, *, eps: float = 1e-5, affine: bool = False) -> Model:
    """Normalise each channel of each example over its positions.

    Equals `torch.nn.InstanceNorm1d`, `2d` and `3d` for x `[batch, num_features, ...]`, without
    running statistics: training and evaluation are the same.

    Args:
        num_features: size of the second axis.
        eps: added to the variance.
        affine: if True, scale and shift each channel afterwards; as in torch, the default is to
            have no parameters.

    Raises:
        ValueError: a size below 1; at apply, x has another number of channels, or one value per
            channel.

    Source: Ulyanov et al., Instance Normalization: The Missing Ingredient for Fast Stylization,
    2016, https://arxiv.org/abs/1607.08022

    >>> layer = instance_norm(1, eps=0.0)
    >>> layer.apply({}, torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]])).flatten()
    tensor([-1.,  1., -1.,  1.])
    """
    name = f"instance_norm({num_features})"
    check_sizes(name, num_features)
    return _by_groups(name, num_features, num_features, eps, affine)


def _by_groups(name: str, groups: int, channels: int, eps: float, affine: bool) -> Model:
    """Return the layer that normalises each group of channels of each example."""
    shape = (channels,)

    def init(key: Tensor) -> Tree:
        return _scale_and_shift(key, shape) if affine else {}

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        scales = [get_param(params, p, shape, name) for p in ("weight", "bias") if affine]
        check_input(name, x)
        if x.ndim < 2 or x.shape[1] != channels:
            raise ValueError(f"{name}: expected x [batch, {channels}, ...], got {list(x.shape)}")
        grouped = x.reshape(x.shape[0], groups, channels // groups, *x.shape[2:])
        if math.prod(grouped.shape[2:]) == 1:
            raise ValueError(f"{name}: needs several values per group, got x {list(x.shape)}")
        y = _standardised(grouped, x.ndim - 1, eps).reshape(x.shape)
        if affine:
            weight, bias = (p.view(1, -1, *[1] * (x.ndim - 2)) for p in scales)
            y = y * weight + bias
        return y.to(x.dtype)

    return Model(init, apply, uses_key=False)


def _scale_and_shift(key: Tensor, shape: tuple[int, ...]) -> Tree:
    return {"weight": ones(key, shape), "bias": zeros(key, shape)}


def _check_last_axes(name: str, x: Tensor, sizes: tuple[int, ...]) -> None:
    check_input(name, x)
    if x.shape[-len(sizes) :] != sizes:
        raise ValueError(f"{name}: expected x [..., {str(sizes)[1:-1]}], got {list(x.shape)}")


def _standardised(x: Tensor, axes: int, eps: float) -> Tensor:
    """Return (x − mean) / √(variance + eps) over the last `axes` axes, in at least 32 bits.

    Written out, because torch differentiates F.layer_norm and F.group_norm wrongly at third order
    and forward over reverse. Compiled, the program is the same.
    """
    wide = x.to(at_least_32_bits(x))
    if not x.numel():  # of which torch computes the variance with a warning
        return wide
    var, mean = torch.var_mean(wide, list(range(-axes, 0)), correction=0, keepdim=True)
    return (wide - mean) * (var + eps).rsqrt()


def batch_norm(features: int, *, eps: float = 1e-5, momentum: float | None = 0.1) -> StatefulModel:
    """Normalise each feature over the batch, then scale and shift.

    Equals `torch.nn.BatchNorm1d`, `2d` and `3d`: y = (x − mean) / √(variance + eps) · weight + bias
    for x `[batch, features, ...]`. In training, mean and variance are those of the batch, over all
    axes but the second, and the running statistics move towards them; in evaluation, the running
    statistics are used. As in torch, the running variance is the unbiased one, n / (n − 1) times
    the variance that normalises.

    Buffers: `running_mean` and `running_var` `[features]`, `num_batches_tracked` int64 `[]`.

    `apply` also takes `mask`, bool `[batch]`: rows where it is False do not count, whatever their
    values, so a padded batch has the statistics of its examples. A single value has no unbiased
    variance: if fewer than two values per feature count, all buffers stay as they are (and the
    value is normalised with variance 0).

    Args:
        features: size of the second axis.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; if None, they are the mean over
            all batches so far.

    Raises:
        ValueError: `features` is below 1; at apply, x has another number of features or fewer than
            2 axes, or has only one value per feature in training.

    Source: Ioffe and Szegedy, Batch Normalization, 2015, https://arxiv.org/abs/1502.03167

    >>> layer = batch_norm(1, eps=0.0)
    >>> params, buffers = layer.init(torch.tensor([0, 0]))
    >>> y, buffers = layer.apply(params, buffers, torch.tensor([[1.0], [3.0]]), train=True)
    >>> y.flatten(), buffers["running_mean"]
    (tensor([-1.,  1.]), tensor([0.2000]))
    """
    name = f"batch_norm({features})"
    check_sizes(name, features)
    shape = (features,)

    def init(key: Tensor) -> tuple[Tree, Tree]:
        params = _scale_and_shift(key, shape)
        buffers = {
            "running_mean": zeros(key, shape),
            "running_var": ones(key, shape),
            "num_batches_tracked": torch.zeros((), dtype=torch.int64, device=key.device),
        }
        return params, buffers

    def apply(
        params: Tree,
        buffers: Tree,
        x: Tensor,
        *,
        train: bool = False,
        key: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tree]:
        weight, bias = (get_param(params, p, shape, name) for p in ("weight", "bias"))
        old_mean, old_var = (
            get_param(buffers, b, shape, name) for b in ("running_mean", "running_var")
        )
        check_input(name, x)
        if x.ndim < 2 or x.shape[1] != features:
            raise ValueError(f"{name}: expected x [batch, {features}, ...], got {list(x.shape)}")
        if train and x.numel() == features:
            raise ValueError(
                f"{name}: training needs more than one value per feature, got x {list(x.shape)}"
            )
        wide = x.to(at_least_32_bits(x))  # sums of bfloat16 lose too much
        if not train:
            return _normalise(wide, old_mean, old_var + eps, weight, bias).to(x.dtype), buffers
        if not x.shape[0]:
            mask = torch.ones(0, dtype=torch.bool, device=x.device)  # no rows, no statistics
        mean, var, n = _mean_and_var(wide, mask)
        y = _normalise(wide, mean, var + eps, weight, bias, mask).to(x.dtype)

        count = buffers["num_batches_tracked"] + 1
        rate = 1 / count.double() if momentum is None else momentum
        unbiased = var * (n / (n - 1 if isinstance(n, int) else (n - 1).clamp(min=1)))
        new = {"running_mean": (old_mean, mean), "running_var": (old_var, unbiased)}
        moved = {
            path: (old + rate * (batch.detach() - old)).to(old.dtype)
            for path, (old, batch) in new.items()
        }
        moved["num_batches_tracked"] = count
        if mask is not None:
            enough = torch.as_tensor(n > 1)
            moved = {path: torch.where(enough, x, buffers[path]) for path, x in moved.items()}
        return y, moved

    return StatefulModel(init, apply, takes_mask=True)


def _normalise(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    columns = (1, -1, *[1] * (x.ndim - 2))
    centred = x - mean.view(columns)
    if mask is not None:
        # Masked rows are set one standard deviation from the mean, as a row of data may be. If they
        # were 0, later layers might take a logarithm of 0 or divide by a norm of 0.
        centred = keep(mask, centred, var.sqrt().view(columns))
    return centred * (weight * var.rsqrt()).view(columns) + bias.view(columns)


def _mean_and_var(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Return the mean and biased variance of each feature, and the number of values per feature."""
    axes = [0, *range(2, x.ndim)]
    if mask is None:
        var, mean = torch.var_mean(x, axes, correction=0)
        return mean, var, x.numel() // x.shape[1]
    counts = (mask != 0).view(-1, *[1] * (x.ndim - 1))
    n = counts.sum(dtype=x.dtype) * math.prod(x.shape[2:])
    at_least_1 = n.clamp(min=1)  # a batch of padding only has finite statistics
    mean = torch.where(counts, x, 0).sum(axes) / at_least_1
    centred = torch.where(counts, x - mean.view(1, -1, *[1] * (x.ndim - 2)), 0)
    return mean, (centred * centred).sum(axes) / at_least_1, n
