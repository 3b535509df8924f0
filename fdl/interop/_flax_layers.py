"""Layers of Flax as those of torch: which leaves a class has, and how each is laid out.

Flax stores kernels as `[*window, in, out]`, torch as `[out, in, *window]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fdl._checks import describe

Image = tuple[int, int, int]
Leaves = dict[str, Any]  # tensors by name; those of attention are dicts of four layers

TRANSPOSED = "ConvTranspose(transpose_kernel=True)"
PARTS = ("query", "key", "value", "out")
_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def _plain(where: str, kernel: Tensor, bias: Tensor | None, wanted: Tensor | None) -> Tensor:
    return kernel.movedim((-1, -2), (0, 1))


def _dense(where: str, kernel: Tensor, bias: Tensor | None, wanted: Tensor | None) -> Tensor:
    if kernel.ndim != 2:
        raise ValueError(f"{where}: a Dense has a kernel [in, out], got {list(kernel.shape)}")
    return kernel.mT


def _flipped(where: str, kernel: Tensor, bias: Tensor | None, wanted: Tensor | None) -> Tensor:
    """Flip the window: torch transposes a convolution, Flax slides the kernel itself."""
    return kernel.flip(*range(kernel.ndim - 2)).movedim((-2, -1), (0, 1))


def _general(where: str, kernel: Tensor, bias: Tensor | None, wanted: Tensor | None) -> Tensor:
    """Join the axes of the input, and those of the output, whose number the bias tells."""
    if bias is None:
        if wanted is None or not _splits_into(kernel, wanted):
            raise ValueError(
                f"{where}: a DenseGeneral without bias has an unknown number of output axes; pass "
                "like, or reshape its kernel to [in, out] and convert it as kind='Dense'"
            )
        return kernel.reshape(wanted.shape[1], wanted.shape[0]).mT
    if kernel.shape[kernel.ndim - bias.ndim :] != bias.shape or kernel.ndim == bias.ndim:
        raise ValueError(
            f"{where}: the last axes of a DenseGeneral's kernel are those of its bias, got kernel "
            f"{list(kernel.shape)} and bias {list(bias.shape)}; there is no rule for batch_dims"
        )
    return kernel.flatten(kernel.ndim - bias.ndim).flatten(0, -2).mT


def _splits_into(kernel: Tensor, wanted: Tensor) -> bool:
    """Return whether the first axes of the kernel are the inputs of a weight `[out, in]`."""
    first = [math.prod(kernel.shape[:axis]) for axis in range(1, kernel.ndim)]
    return wanted.ndim == 2 and wanted.numel() == kernel.numel() and wanted.shape[1] in first


_KERNELS: dict[str, Callable[[str, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "Dense": _dense,
    "Linear": _dense,
    "Conv": _plain,
    "ConvTranspose": _flipped,
    TRANSPOSED: _plain,
    "DenseGeneral": _general,
    "LinearGeneral": _general,
}
_WINDOWED = ("Conv", "ConvTranspose", TRANSPOSED)
_NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")
ATTENTION = ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention")
_ALLOWED = {
    **{kind: {"kernel", "bias"} for kind in _KERNELS},
    **{kind: {"scale", "bias", "mean", "var"} for kind in _NORMS},
    **{kind: set(PARTS) for kind in ATTENTION},
    "Embed": {"embedding"},
}


def guess(where: str, leaves: Leaves, wanted: Tensor | None) -> str:
    """Return the class of a layer from its leaves and the weight it shall become.

    Raises:
        ValueError: no layer here has such leaves, or several have.
    """
    names = leaves.keys()
    if names == set(PARTS):
        return ATTENTION[0]
    if names == {"embedding"}:
        return "Embed"
    if names and names <= _ALLOWED["BatchNorm"]:
        return "BatchNorm"
    if "kernel" not in names or not names <= {"kernel", "bias"}:
        raise ValueError(f"{where}: no rule for a layer with the leaves {sorted(names)}")
    kernel, bias = leaves["kernel"], leaves.get("bias")
    if kernel.ndim == 2:
        return "Dense"
    if bias is not None and bias.ndim > 1:
        return "DenseGeneral"
    if kernel.ndim < 2:
        raise ValueError(f"{where}: no rule for a kernel {list(kernel.shape)}")
    return _guess_by_shape(where, kernel, bias, wanted)


def _guess_by_shape(where: str, kernel: Tensor, bias: Tensor | None, wanted: Tensor | None) -> str:
    *window, inputs, outputs = kernel.shape
    plain = "Conv" if bias is None or bias.numel() == outputs else TRANSPOSED
    fits = []
    if wanted is not None:
        shapes = {plain: [outputs, inputs, *window], "ConvTranspose": [inputs, outputs, *window]}
        fits = [kind for kind, shape in shapes.items() if shape == [*wanted.shape]]
        fits += ["DenseGeneral"] if _splits_into(kernel, wanted) else []
    if len(fits) == 1:
        return fits[0]
    raise ValueError(
        f"{where}: a kernel {list(kernel.shape)} may be that of a Conv, a ConvTranspose or a "
        "DenseGeneral; say which by kind"
    )


def from_layer(
    where: str, kind: str, leaves: Leaves, image: Image | None, wanted: Tensor | None
) -> Leaves:
    """Convert a layer of the class `kind`; `wanted` has the shape that its weight shall have."""
    check_kind(where, kind)
    if not leaves.keys() <= _ALLOWED[kind]:
        unknown = sorted(leaves.keys() - _ALLOWED[kind])
        raise ValueError(f"{where}: no rule for {unknown} of a {kind}")
    if kind in ATTENTION:
        return _from_attention(where, leaves)
    if kind in _KERNELS:
        return _from_kernel(where, kind, leaves, image, wanted)
    if kind in _NORMS and (bad := [x for x in leaves.values() if x.ndim != 1]):
        raise ValueError(f"{where}: a {kind} over one axis only, got {describe(bad[0])}")
    if kind == "Embed" and (bad := [x for x in leaves.values() if x.ndim != 2]):
        raise ValueError(
            f"{where}: an Embed has an embedding [n, features], got {describe(bad[0])}"
        )
    if image is not None:
        raise ValueError(f"{where}: image is for a dense layer, got a {kind}")
    return {_NAMES.get(name, name): x for name, x in leaves.items()}


def _from_kernel(
    where: str, kind: str, leaves: Leaves, image: Image | None, wanted: Tensor | None
) -> Leaves:
    if "kernel" not in leaves:
        raise ValueError(f"{where}: a {kind} has a kernel, got {sorted(leaves)}")
    kernel, bias = leaves["kernel"], leaves.get("bias")
    if kind in _WINDOWED and kernel.ndim < 3:
        raise ValueError(
            f"{where}: a {kind} has a kernel with a window, [*window, in, out], got "
            f"{list(kernel.shape)}"
        )
    if image is not None:
        channels, height, width = check_image(where, image, kernel)
        kernel = kernel.unflatten(0, (height, width, channels)).movedim(2, 0).flatten(0, 2)
    weight = _KERNELS[kind](where, kernel, bias, wanted).contiguous()
    outputs = weight.shape[1 if kind in ("ConvTranspose", TRANSPOSED) else 0]
    if bias is not None and bias.numel() != outputs:
        hint = f"; if its kernel is [*window, out, in], pass kind={TRANSPOSED!r}"
        raise ValueError(
            f"{where}: the bias of a {kind} has a number for each output of its kernel, expected "
            f"{outputs} for a kernel {list(leaves['kernel'].shape)}, got {list(bias.shape)}"
            + (hint if kind in ("Conv", "ConvTranspose") else "")
        )
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias.flatten()}


def _from_attention(where: str, parts: Mapping[str, Leaves]) -> Leaves:
    """Join the projections, `[in, heads, features]`, as `torch.nn.MultiheadAttention` has them."""
    if parts.keys() != set(PARTS):
        raise ValueError(f"{where}: attention has the layers {list(PARTS)}, got {list(parts)}")
    biased = {"bias" in part for part in parts.values()}
    for name, part in parts.items():
        if not part.keys() <= {"kernel", "bias"} or "kernel" not in part or len(biased) > 1:
            raise ValueError(f"{where}: no rule for {name!r} with the leaves {sorted(part)}")
    *heads, out = (parts[name]["kernel"] for name in PARTS)
    features = out.shape[-1]
    shapes = [list(kernel.shape) for kernel in (*heads, out)]
    split = list(out.shape[:-1])
    if out.ndim != 3 or split[0] * split[1] != features or shapes[:3] != [[features, *split]] * 3:
        raise ValueError(
            f"{where}: query, keys, values and output must have one number of features, as in "
            f"nn.multihead_attention, got kernels {shapes}"
        )
    for name, part in parts.items() if biased == {True} else ():
        expected = [features] if name == "out" else split
        if (got := list(part["bias"].shape)) != expected:
            raise ValueError(f"{where}: the bias of {name!r} must be {expected}, got {got}")
    joined = {"in_proj_weight": torch.cat([kernel.flatten(1).mT for kernel in heads])}
    last = {"weight": out.flatten(0, 1).mT.contiguous()}
    if biased == {True}:
        joined["in_proj_bias"] = torch.cat([parts[name]["bias"].flatten() for name in PARTS[:3]])
        last["bias"] = parts["out"]["bias"]
    return {**joined, "out_proj": last}


def to_layer(where: str, kind: str | None, leaves: Leaves, image: Image | None) -> Leaves:
    """Convert a layer of torch to the class `kind` of Flax; None if the leaves tell it."""
    theirs = {"running_mean": "mean", "running_var": "var"}
    leaves = {name: x for name, x in leaves.items() if name != "num_batches_tracked"}
    if not leaves.keys() <= {"weight", "bias", *theirs}:
        raise ValueError(f"{where}: no rule for a layer with the leaves {sorted(leaves)}")
    weight = leaves.pop("weight", None)
    if kind is None and weight is not None and weight.ndim > 1:
        if weight.ndim > 2 or "bias" not in leaves:
            choices = "an Embed" if weight.ndim == 2 else "a ConvTranspose"
            sort = "a Dense" if weight.ndim == 2 else "a Conv"
            raise ValueError(
                f"{where}: a weight {list(weight.shape)} may be that of {sort} or {choices}; say "
                "which by kind"
            )
        kind = "Dense"
    if kind is not None:
        check_kind(where, kind)
    if weight is None or kind == "Embed" or (weight.ndim == 1 and kind not in _KERNELS):
        name = "embedding" if kind == "Embed" else "scale"
        converted = {} if weight is None else {name: weight}
        return {**converted, **{theirs.get(name, name): x for name, x in leaves.items()}}
    return {"kernel": _to_kernel(where, str(kind), weight, image).contiguous(), **leaves}


def _to_kernel(where: str, kind: str, weight: Tensor, image: Image | None) -> Tensor:
    if kind not in _KERNELS or _KERNELS[kind] is _general:
        raise ValueError(
            f"{where}: {kind} has no inverse; convert the layer as 'Dense' and reshape its kernel"
        )
    if weight.ndim < 2 or (weight.ndim > 2) != (kind in _WINDOWED):
        raise ValueError(f"{where}: a weight {list(weight.shape)} is not that of a {kind}")
    if kind == "ConvTranspose":
        kernel = weight.flip(*range(2, weight.ndim)).movedim((1, 0), (-1, -2))
    else:
        kernel = weight.movedim((0, 1), (-1, -2))
    if image is None:
        return kernel
    channels, height, width = check_image(where, image, kernel)
    return kernel.unflatten(0, (channels, height, width)).movedim(0, 2).flatten(0, 2)


def check_kind(where: str, kind: str) -> None:
    """Raise unless there is a rule for the class."""
    if kind not in _ALLOWED:
        raise ValueError(f"{where}: no rule for kind={kind!r}, only for {list(_ALLOWED)}")


def check_image(where: str, image: Image, kernel: Tensor) -> Image:
    """Raise unless the kernel has an input for each number of the images."""
    if len(image) != 3 or not all(isinstance(n, int) and n > 0 for n in image):
        raise ValueError(
            f"{where}: image must be (channels, height, width), three positive integers, got "
            f"{image!r}"
        )
    channels, height, width = image
    if kernel.ndim != 2 or channels * height * width != kernel.shape[0]:
        raise ValueError(
            f"{where}: image={image}, (channels, height, width), must have as many numbers as the "
            f"layer has inputs, expected {kernel.shape[0]}, got {channels * height * width}"
        )
    return image
