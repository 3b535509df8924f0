"""Convert parameters between the names and layouts of Flax and torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fdl._checks import describe
from fdl.interop._fill import fill, renamed
from fdl.interop._flax_layers import PARTS, Image, Leaves, from_layer, guess, to_layer
from fdl.tree import Tree, flatten_dict, unflatten_dict
from fdl.tree._paths import join

Images = Image | Mapping[str, Image] | None
Kinds = str | Mapping[str, str] | None


def from_flax(
    layer: Mapping[str, Any],
    image: Images = None,
    kind: Kinds = None,
    *,
    like: Tree = None,
    names: Mapping[str, str] | None = None,
) -> Tree:
    """Convert parameters of Flax to torch's names and layouts: a layer, or a tree of layers.

    - `kernel`, `[in, out]` or `[*window, in, out]`, becomes `weight`, `[out, in]` or
      `[out, in, *window]`; that of a `ConvTranspose` `[in, out, *window]`, its window flipped.
    - The `scale` of a normalisation and the `embedding` of an `Embed` become `weight`; `mean` and
      `var`, of `batch_stats` or beside the scale as in nnx, `running_mean` and `running_var`.
    - `DenseGeneral` becomes a linear layer of the flattened axes, attention the parameters of
      `nn.multihead_attention`.

    Arrays do not tell the class of their layer. It is read from the names that linen gives
    (`ConvTranspose_0`); under other names from the leaves if they leave one choice, then from the
    shape in `like`. What is still open, such as a kernel with a window, is an error: pass `kind`.
    First `from_jax`, then this:

    >>> import torch
    >>> flax = {"Dense_0": {"kernel": torch.zeros(4, 3), "bias": torch.zeros(3)}}
    >>> from_flax(flax, names={"Dense_0": "fc"})["fc"]["weight"].shape
    torch.Size([3, 4])

    Args:
        layer: the dict of one layer, nested dicts of layers, or variables: `params` and perhaps
            `batch_stats`.
        image: `(channels, height, width)` of the images flattened right before a dense layer: Flax
            flattens height first, torch channels first, so the order of the inputs changes. For a
            tree, a dict from paths of layers.
        kind: class of the layer in Flax. For a tree, a dict from paths of layers to classes. A
            `ConvTranspose` made with `transpose_kernel=True` has the kind
            `"ConvTranspose(transpose_kernel=True)"`, which nothing but `kind` tells.
        like: what `model.init` returned, params or `(params, buffers)`: the result has this
            structure, and each value its shape. `num_batches_tracked`, which Flax does not have,
            is that of `like`. Dtypes are those of `layer`.
        names: paths in `layer`, without `params` and `batch_stats`, to paths in the result, for
            layers and whatever is below them; others keep theirs.

    Raises:
        TypeError: a leaf is not a tensor (with its path), or an argument is of another type.
        ValueError: a layer has no rule, or several (with its path); a kernel has another number of
            inputs than `image`, or of outputs than its bias; a path of `image`, `kind` or `names`
            is not in `layer`; or the paths and shapes are not those of `like` (each is listed).
    """
    return convert("from_flax", _collections("from_flax", layer), image, kind, like, names)


def to_flax(layer: Mapping[str, Any], image: Images = None, kind: Kinds = None) -> Tree:
    """Convert parameters to Flax's names and layouts; the inverse of `from_flax`.

    `num_batches_tracked`, which Flax does not have, is left out.

    Args:
        layer: the `weight`, and `bias` if there is one, of a linear layer, a convolution or, if
            `weight` has one axis, a normalisation, with or without its buffers; or nested dicts of
            such layers.
        image: as for `from_flax`.
        kind: as for `from_flax`; required for convolutions and for a `weight` `[n, m]` without
            bias, `"Dense"` or `"Embed"`. `"DenseGeneral"` and attention have no inverse.

    Raises:
        TypeError: a leaf is not a tensor (with its path).
        ValueError: as for `from_flax`.

    >>> import torch
    >>> to_flax({"weight": torch.zeros(16, 6, 5, 5)}, kind="Conv")["kernel"].shape
    torch.Size([5, 5, 6, 16])
    """
    parts = _collections("to_flax", layer)
    image, kind = _by_path("to_flax", parts, image, kind)
    flat: dict[str, Tensor] = {}
    for collection, part in parts.items():
        for path, leaves in _layers("to_flax", part, collection):
            place = join(collection, path)
            sort = kind.get(path) or _named(path.rpartition(".")[2])
            found = to_layer(_where("to_flax", place), sort, leaves, image.get(path))
            flat |= {join(place, name): x for name, x in found.items()}
    return unflatten_dict(flat)


def _collections(caller: str, tree: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the trees of `params` and `batch_stats`, or the tree itself as ''."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"{caller}: expected a dict of layers, got {describe(tree)}")
    return tree if tree and tree.keys() <= {"params", "batch_stats"} else {"": tree}


def convert(
    caller: str,
    parts: Mapping[str, Mapping[str, Any]],
    image: Images,
    kind: Kinds,
    like: Tree,
    names: Mapping[str, str] | None,
) -> Tree:
    """Do what `from_flax` does with the trees of several collections."""
    image, kind = _by_path(caller, parts, image, kind)
    if not isinstance(names, Mapping | None):
        raise TypeError(
            f"{caller}: names must be a dict from paths to paths, got {describe(names)}"
        )
    wanted = {} if like is None else flatten_dict(like)
    if isinstance(like, tuple):  # (params, buffers)
        wanted = {path.partition(".")[2]: x for path, x in wanted.items()}
    for path, x in wanted.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{caller}: like must be what model.init returned, tensors, got {describe(x)} at "
                f"{path!r}"
            )
    flat: dict[str, dict[str, dict[str, Tensor]]] = {}
    for collection, part in parts.items():
        found = {}
        for path, leaves in _layers(caller, part, collection):
            where = _where(caller, join(collection, path))
            target = renamed(path, names or {})
            weight = wanted.get(join(target, "weight"))
            sort = kind.get(path) or _named(path.rpartition(".")[2])
            sort = sort or guess(where, leaves, weight)
            layer = from_layer(where, sort, leaves, image.get(path), weight)
            found[path] = flatten_dict(layer)
        flat[collection] = found
    return fill(caller, flat, like, names or {})


def _layers(
    caller: str, tree: Mapping[str, Any], collection: str = "", path: str = ""
) -> Iterator[tuple[str, Leaves]]:
    """Yield path and leaves of every layer; attention is one layer, with four dicts."""
    children = {name: x for name, x in tree.items() if isinstance(x, Mapping)}
    leaves = {name: x for name, x in tree.items() if name not in children}
    where = _where(caller, join(collection, path))
    for name, x in leaves.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{where}: {name!r} must be a tensor, got {describe(x)}; from_jax converts the "
                "arrays of JAX, from_numpy those of NumPy"
            )
    if _is_attention(tree):
        for name, part in children.items():
            list(_layers(caller, part, collection, join(path, name)))  # checked, not used
        yield path, dict(tree)
        return
    if leaves:
        yield path, leaves
    for name, child in children.items():
        yield from _layers(caller, child, collection, join(path, name))


def _is_attention(tree: Mapping[str, Any]) -> bool:
    """Return whether a dict has the four layers of attention, with heads as an axis."""
    parts = [tree.get(name) for name in PARTS]
    kernels = [part.get("kernel") for part in parts if isinstance(part, Mapping)]
    return len(kernels) == len(PARTS) and all(getattr(k, "ndim", 0) == 3 for k in kernels)


def _by_path(
    caller: str, parts: Mapping[str, Mapping[str, Any]], image: Images, kind: Kinds
) -> tuple[Mapping[str, Image], Mapping[str, str]]:
    """Return images and kinds as dicts from the paths of layers."""
    several = [path for part in parts.values() for path in _nodes(part)]
    single = any(_is_attention(part) for part in parts.values())
    found: list[Mapping[str, Any]] = []
    for name, given in (("image", image), ("kind", kind)):
        if isinstance(given, Mapping):
            if unknown := sorted(given.keys() - {"", *several}):
                raise ValueError(
                    f"{caller}: {name}={unknown} are not in the tree, which has {several}"
                )
        elif given is not None and not isinstance(given, str if name == "kind" else Sequence):
            expected = "the name of a class" if name == "kind" else "(channels, height, width)"
            raise TypeError(
                f"{caller}: {name} must be {expected}, or a dict of such from paths, got "
                f"{describe(given)}"
            )
        elif given is not None and several and not single:
            raise ValueError(
                f"{caller}: {name} {given!r} describes one layer, got several: {several}; pass a "
                "dict from their paths"
            )
        found.append(given if isinstance(given, Mapping) else {} if given is None else {"": given})
    return found[0], found[1]


def _nodes(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of all dicts below a dict."""
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield join(path, name)
            yield from _nodes(child, join(path, name))


def _named(name: str) -> str | None:
    """Read the class from a name that linen gives, such as `Dense_0`."""
    match = re.fullmatch(r"([A-Z]\w*?)_\d+", name)
    return match[1] if match else None


def _where(caller: str, path: str) -> str:
    return f"{caller}: at {path!r}" if path else caller
