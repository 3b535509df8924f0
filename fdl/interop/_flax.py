"""Flax's names and layouts of parameters, and torch's; `fdl.interop` is where to import them from.

Torch keeps `[out, in, *window]`, Flax `[*window, in, out]`.
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
    - Anything else stays as it is, under its name.

    First `from_jax`, then this:

    >>> import torch
    >>> flax = {"Dense_0": {"kernel": torch.zeros(4, 3), "bias": torch.zeros(3)}}
    >>> params = {"fc": from_flax(flax["Dense_0"])}
    >>> params["fc"]["weight"].shape
    torch.Size([3, 4])

    Args:
        layer: the dict of one layer, or nested dicts of layers.
        image: `(channels, height, width)` of what is flattened right before a dense layer: Flax
            flattens height first, torch channels first, so the inputs change their order.
        kind: the layer's class in Flax, such as `"ConvTranspose"` or `"DenseGeneral"`, whose
            kernels have the shape of a convolution's. Flax's own names (`"ConvTranspose_0"`) and
            those of its attention say it in a tree; of other names a kernel with more than two
            axes is taken for that of `Conv`.

    Raises:
        TypeError: a leaf that is no tensor (with its path).
        ValueError: a kernel whose inputs are not as many as `image` says, `image` or `kind` with a
            tree of several layers, a kind without a rule, or a `DenseGeneral` without bias, of
            which nothing says how many axes its output has (with its path).
    """
    return _each("from_flax", layer, image, kind, _layer_from_flax)


def to_flax(layer: Mapping[str, Any], image: Image | None = None, kind: str | None = None) -> Tree:
    """Convert parameters to Flax's names and layouts; the inverse of `from_flax`.

    Args:
        layer: `weight` and perhaps `bias`, of a linear layer, a convolution or, where `weight`
            has one axis, a normalisation; or nested dicts of such layers.
        image: as for `from_flax`.
        kind: as for `from_flax`; `"Embed"` has to be said, `"DenseGeneral"` has no inverse.

    Raises:
        TypeError: a leaf that is no tensor (with its path).
        ValueError: a weight whose inputs are not as many as `image` says, `image` or `kind` with a
            tree of several layers, or a kind without a rule (with its path).

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
    """Convert the leaves of a dict together, as one layer, and its dicts each for itself."""
    where = f"{caller}: at {path!r}" if path else caller
    children = {name: x for name, x in layer.items() if isinstance(x, Mapping)}
    leaves = {name: x for name, x in layer.items() if name not in children}
    for name, x in leaves.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}: {name!r} must be a tensor, got {type(x).__name__} {x!r}")
    if children and (image is not None or kind is not None):
        raise ValueError(
            f"{where}: image and kind describe one layer, and {list(children)} are several; "
            "convert that layer by itself"
        )
    found = convert(where, leaves, image, kind) if leaves else {}
    attends = children.keys() >= _ATTENTION
    for name, child in children.items():
        own = "DenseGeneral" if attends and name in _ATTENTION else _kind(name)
        is_layer = not any(isinstance(x, Mapping) for x in child.values())
        inner = join(path, name)
        found[name] = _each(caller, child, None, own if is_layer else None, convert, inner)
    return found


def _kind(name: str) -> str | None:
    """Read the class out of a name that Flax gives, such as `Dense_0`."""
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
        raise ValueError(f"{where}: DenseGeneral has axes of which torch knows nothing; reshape")
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
    """Torch's is the transpose of a convolution; Flax's slides the kernel itself."""
    return kernel.flip(*range(kernel.ndim - 2)).movedim((-2, -1), (0, 1))


def _general(where: str, kernel: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError(
            f"{where}: a DenseGeneral without bias does not say how many axes its output has; "
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
            f"{where}: image={image}, (channels, height, width), has "
            f"{channels * height * width} numbers, but the layer takes {kernel.shape[0]}"
        )
    return image
