"""Convert parameters between the names and layouts of Flax and torch.

The weights of torch are `[out, in, *window]`, those of Flax `[*window, in, out]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fdl.tree import Tree
from fdl.tree._paths import join

Image = tuple[int, int, int]

_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_STATISTICS = {"mean": "running_mean", "var": "running_var"}
_NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")
_ATTENTION = {"query", "key", "value", "out"}


def from_flax(
    layer: Mapping[str, Any], image: Image | None = None, kind: str | None = None
) -> Tree:
    """Convert parameters of Flax to torch's names and layouts: a layer, or a tree of layers.

    - `kernel`, `[in, out]` or `[*window, in, out]` (HWIO), becomes `weight`, `[out, in]` or
      `[out, in, *window]` (OIHW).
    - The `scale` of a normalisation and the `embedding` of an `Embed` become `weight`; the `mean`
      and `var` of `batch_stats` become `running_mean` and `running_var`.
    - Other leaves stay unchanged, under their names.

    First `from_jax`, then this:

    >>> import torch
    >>> flax = {"Dense_0": {"kernel": torch.zeros(4, 3), "bias": torch.zeros(3)}}
    >>> params = {"fc": from_flax(flax["Dense_0"])}
    >>> params["fc"]["weight"].shape
    torch.Size([3, 4])

    Args:
        layer: the dict of one layer, or nested dicts of layers.
        image: `(channels, height, width)` of the images flattened right before a dense layer: Flax
            flattens height first, torch channels first, so the order of the inputs changes.
        kind: class of the layer in Flax, such as `"ConvTranspose"` or `"DenseGeneral"`, whose
            kernels have the shape of a convolution's. In a tree the class is read from Flax's own
            names (`"ConvTranspose_0"`) and those of its attention; under another name a kernel with
            more than two axes is converted as that of `Conv`.

    Raises:
        TypeError: a leaf is not a tensor (with its path).
        ValueError: a kernel has another number of inputs than `image`, `image` or `kind` is given
            for several layers, there is no rule for the kind, or a `DenseGeneral` has no bias, so
            the number of axes of its output is unknown (with its path).
    """
    return _each("from_flax", layer, image, kind, _layer_from_flax)


def to_flax(layer: Mapping[str, Any], image: Image | None = None, kind: str | None = None) -> Tree:
    """Convert parameters to Flax's names and layouts; the inverse of `from_flax`.

    Args:
        layer: the `weight`, and `bias` if there is one, of a linear layer, a convolution or, if
            `weight` has one axis, a normalisation; or nested dicts of such layers.
        image: as for `from_flax`.
        kind: as for `from_flax`; required for `"Embed"`, and `"DenseGeneral"` has no inverse.

    Raises:
        TypeError: a leaf is not a tensor (with its path).
        ValueError: a weight has another number of inputs than `image`, `image` or `kind` is given
            for several layers, or there is no rule for the kind (with its path).

    >>> import torch
    >>> to_flax({"weight": torch.zeros(16, 6, 5, 5)})["kernel"].shape
    torch.Size([5, 5, 6, 16])
    """
    return _each("to_flax", layer, image, kind, _layer_to_flax)


def _each(
    caller: str,
    layer: Mapping[str, Any],
    image: Image | None,
    kind: str | None,
    convert: Callable[..., Tree],
    path: str = "",
) -> Tree:
    """Convert the leaves of a dict as one layer, and its dicts one by one."""
    where = f"{caller}: at {path!r}" if path else caller
    children = {name: x for name, x in layer.items() if isinstance(x, Mapping)}
    leaves = {name: x for name, x in layer.items() if name not in children}
    for name, x in leaves.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}: {name!r} must be a tensor, got {type(x).__name__} {x!r}")
    if children and (image is not None or kind is not None):
        raise ValueError(
            f"{where}: image and kind describe one layer, got several: {list(children)}; "
            "convert that layer separately"
        )
    converted = convert(where, leaves, image, kind) if leaves else {}
    is_attention = children.keys() >= _ATTENTION
    for name, child in children.items():
        child_kind = "DenseGeneral" if is_attention and name in _ATTENTION else _kind(name)
        is_layer = not any(isinstance(x, Mapping) for x in child.values())
        inner = join(path, name)
        child_kind = child_kind if is_layer else None
        converted[name] = _each(caller, child, None, child_kind, convert, inner)
    return converted


def _kind(name: str) -> str | None:
    """Read the class from a name of Flax, such as `Dense_0`."""
    match = re.fullmatch(r"([A-Z]\w*)_\d+", name)
    return match[1] if match and match[1] in {*_FROM, *_NORMS} else None


def _layer_from_flax(
    where: str, found: dict[str, Tensor], image: Image | None, kind: str | None
) -> Tree:
    _check_kind(where, kind)
    if found.keys() == _STATISTICS.keys():
        return {_STATISTICS[name]: x for name, x in found.items()}
    if "kernel" in found:
        kernel, bias = found["kernel"], found.get("bias")
        if kind is None:
            general = bias is not None and bias.ndim > 1
            kind = "DenseGeneral" if general else "Dense" if kernel.ndim == 2 else "Conv"
        if image is not None:
            channels, height, width = _check_image(where, image, kernel)
            rows = kernel.unflatten(0, (height, width, channels))
            kernel = rows.movedim(2, 0).flatten(0, 2)
        found["kernel"] = _FROM[kind](where, kernel, bias).contiguous()
        if kind == "DenseGeneral" and bias is not None:
            found["bias"] = bias.flatten()
    return {_NAMES.get(name, name): x for name, x in found.items()}


def _layer_to_flax(
    where: str, found: dict[str, Tensor], image: Image | None, kind: str | None
) -> Tree:
    _check_kind(where, kind)
    theirs = {ours: name for name, ours in _STATISTICS.items()}
    if "weight" not in found:
        return {theirs.get(name, name): x for name, x in found.items()}
    weight = found.pop("weight")
    if kind == "Embed":
        return {"embedding": weight, **found}
    if weight.ndim == 1:
        return {"scale": weight, **found}
    if kind == "DenseGeneral":
        raise ValueError(
            f"{where}: kind='DenseGeneral' has no inverse; convert the layer as 'Dense' and "
            "reshape its kernel"
        )
    if kind == "ConvTranspose":
        kernel = weight.flip(*range(2, weight.ndim)).movedim((1, 0), (-1, -2))
    else:
        kernel = weight.movedim((0, 1), (-1, -2))
    if image is not None:
        channels, height, width = _check_image(where, image, kernel)
        rows = kernel.unflatten(0, (channels, height, width))
        kernel = rows.movedim(0, 2).flatten(0, 2)
    return {"kernel": kernel.contiguous(), **found}


def _plain(where: str, kernel: Tensor, bias: Tensor | None) -> Tensor:
    return kernel.movedim((-1, -2), (0, 1))


def _transposed(where: str, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Flip the window: torch transposes a convolution, Flax slides the kernel itself."""
    return kernel.flip(*range(kernel.ndim - 2)).movedim((-2, -1), (0, 1))


def _general(where: str, kernel: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError(
            f"{where}: a DenseGeneral without bias has an unknown number of output axes; "
            "reshape its kernel to [in, out] and convert it as kind='Dense'"
        )
    return kernel.flatten(kernel.ndim - bias.ndim).flatten(0, -2).mT


_FROM: dict[str, Callable[..., Tensor]] = {
    "Dense": _plain,
    "Conv": _plain,
    "ConvTranspose": _transposed,
    "DenseGeneral": _general,
    "Embed": _plain,  # has no kernel
}


def _check_kind(where: str, kind: str | None) -> None:
    known = [*_FROM, *_NORMS]
    if kind is not None and kind not in known:
        raise ValueError(f"{where}: no rule for kind={kind!r}, only for {known}")


def _check_image(where: str, image: Image, kernel: Tensor) -> Image:
    channels, height, width = image
    if kernel.ndim != 2 or channels * height * width != kernel.shape[0]:
        raise ValueError(
            f"{where}: image={image}, (channels, height, width), must have as many numbers as the "
            f"layer has inputs, expected {kernel.shape[0]}, got {channels * height * width}"
        )
    return image
