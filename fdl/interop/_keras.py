"""Read the layers of a file of Keras, as those of Flax, whose layouts they share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fdl.interop._flax import convert
from fdl.interop._flax_layers import TRANSPOSED, Image
from fdl.interop._keras_files import KerasFile, read
from fdl.tree import Tree, unflatten_dict
from fdl.tree._paths import join


class Rule(NamedTuple):
    """Kind of a class in Flax, and its variables: Keras' name, Flax' name, option of the class."""

    kind: str
    variables: tuple[tuple[str, str, str | None], ...]


_KERNEL = (("kernel", "kernel", None), ("bias", "bias", "use_bias"))
_AFFINE = (("gamma", "scale", "scale"), ("beta", "bias", "center"))
_MOVING = (("moving_mean", "mean", None), ("moving_variance", "var", None))
_AXES = ("1D", "2D", "3D")
RULES = {
    "Dense": Rule("Dense", _KERNEL),
    **{f"Conv{axes}": Rule("Conv", _KERNEL) for axes in _AXES},
    **{f"Conv{axes}Transpose": Rule(TRANSPOSED, _KERNEL) for axes in _AXES},
    **{f"DepthwiseConv{axes}": Rule("Conv", _KERNEL) for axes in _AXES[:2]},
    "Embedding": Rule("Embed", (("embeddings", "embedding", None),)),
    "BatchNormalization": Rule("BatchNorm", (*_AFFINE, *_MOVING)),
    "LayerNormalization": Rule("LayerNorm", _AFFINE),
    "GroupNormalization": Rule("GroupNorm", _AFFINE),
    "RMSNormalization": Rule("RMSNorm", (("scale", "scale", None),)),
    "MultiHeadAttention": Rule("MultiHeadDotProductAttention", _KERNEL),  # of each of its layers
}
# The layers of attention: Flax' name, the attribute of Keras' layer, its own name.
_PARTS = (
    ("query", "query_dense", "query"),
    ("key", "key_dense", "key"),
    ("value", "value_dense", "value"),
    ("out", "output_dense", "attention_output"),
)


def from_keras(
    path: str | os.PathLike[str],
    image: Mapping[str, Image] | None = None,
    *,
    like: Tree = None,
    names: Mapping[str, str] | None = None,
) -> Tree:
    """Read the parameters of a model that Keras 3 saved, in torch's names and layouts.

    The layers of `Sequential` and functional models, nested ones too: `Dense`, `Conv1D` to `3D`,
    transposed and depthwise ones, `Embedding`, `BatchNormalization`, `LayerNormalization`,
    `GroupNormalization`, `RMSNormalization` and `MultiHeadAttention`. Their classes are those of
    the file. Nothing in it is run: no Lambda, no pickle. Activations, strides, padding and ε are
    not parameters: write them into the model.

    Args:
        path: a `.keras` file, or the `.h5` file of a whole model.
        image: `(channels, height, width)` of flattened images, by the path of the dense layer that
            reads them: Keras flattens height first, torch channels first. Required if a layer of
            the file flattens images; `{}` if the model here flattens them as Keras does.
        like: as for `from_flax`; without it the result has the names of the layers in the file.
        names: as for `from_flax`, from the names of layers; those in an inner model are below its.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no model of Keras 3, has a link or compressed arrays, a
            layer has weights and no rule (with its name and class), images are flattened and
            `image` is None, or as for `from_flax`.

    Example::

        model = nn.sequential(nn.conv2d(3, 8, 3), nn.batch_norm(8), nn.relu)
        params, buffers = from_keras(
            "model.keras", like=model.init(random.key(0)), names={"conv2d": "0", "batch_norm": "1"}
        )
    """
    file = read(path, "from_keras")
    try:
        layers = list(_layers(file, file.config))
        variables, left = _variables(file, layers)
        flattened = [layer.path for layer in layers if _flattens_images(layer)]
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"from_keras: {os.fspath(path)} is not what Keras 3 saves of a Sequential or "
            f"functional model: {type(error).__name__}: {error}"
        ) from error
    if left:
        raise ValueError(f"from_keras: no rule for the weights of {left}")
    if flattened and image is None:
        raise ValueError(
            f"from_keras: {flattened} flatten images, height first; pass image, a dict from the "
            "dense layers that read them to (channels, height, width), or {}"
        )
    kinds = {layer.path: layer.rule.kind for layer in layers if layer.rule is not None}
    tree = {"": unflatten_dict(variables)}
    return convert("from_keras", tree, image, kinds, like, names)


class _Layer(NamedTuple):
    path: str  # its name, below those of the models around it
    sort: str  # its class
    rule: Rule | None
    config: Mapping[str, Any]
    group: str  # where its variables are in the file
    shape: list[int | None] | None  # of its input


def _layers(file: KerasFile, model: Any, group: str = "", path: str = "") -> Iterator[_Layer]:
    """Yield the layers of a model; Keras numbers those of one class in the order of the list."""
    if model["class_name"] not in ("Sequential", "Functional"):
        raise TypeError(f"it is a {model['class_name']}")
    used: dict[str, int] = {}
    for entry in model["config"]["layers"]:
        sort, config = entry["class_name"], entry["config"]
        kind, inner = _snake(sort), join(path, config["name"])
        used[kind] = used.get(kind, -1) + 1
        place = f"{group}layers/{kind}" + (f"_{used[kind]}" if used[kind] else "")
        if file.legacy:
            place = f"model_weights/{inner.partition('.')[0]}"
        elif file.names.get(f"{place}/vars", config["name"]) != config["name"]:
            raise TypeError(f"{place} has the weights of {file.names[f'{place}/vars']!r}")
        standard = str(entry.get("module", "keras")).startswith("keras")  # .h5 files have none
        if standard and sort in ("Sequential", "Functional"):
            yield from _layers(file, entry, f"{place}/", inner)
        else:
            rule = RULES.get(sort) if standard else None
            shape = entry.get("build_config", {}).get("input_shape")
            yield _Layer(inner, sort, rule, config, place, shape)


def _snake(name: str) -> str:
    """Write the name of a class as Keras does in files: `Conv2DTranspose`, `conv2d_transpose`."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _variables(file: KerasFile, layers: Sequence[_Layer]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the variables by their paths in Flax, and the layers of what is left in the file."""
    found, left = {}, dict(file.arrays)
    for layer in layers:
        for name, place in _places(layer, file) if layer.rule else ():
            if place not in left:
                raise ValueError(
                    f"from_keras: the file has no weights of {layer.path!r} ({layer.sort}) at "
                    f"{place!r}: it was saved before it was built, or it is shared by several "
                    "models in this one, and a .keras file has shared weights once; an .h5 file "
                    "has them in each: model.save('model.h5')"
                )
            x = left.pop(place)
            if layer.sort.startswith("Depthwise"):  # [*window, in, n]: in groups of one channel
                x = x.flatten(-2).unsqueeze(-2) if x.ndim > 1 else x
            found[join(layer.path, name)] = x
    unread = [place for place in left if "/seed_generator/" not in place]
    owners = {
        next(
            (f"{x.path!r} ({x.sort})" for x in layers if place.startswith(x.group + "/")), place
        ): None
        for place in unread
    }
    return found, list(owners)


def _places(layer: _Layer, file: KerasFile) -> Iterator[tuple[str, str]]:
    """Yield for each variable of a layer its name in Flax and its place in the file."""
    assert layer.rule is not None
    present = [v for v in layer.rule.variables if v[2] is None or layer.config.get(v[2], True)]
    attention = layer.sort == "MultiHeadAttention"
    for part, attribute, name in _PARTS if attention else (("", "", ""),):
        for i, (theirs, flax, _) in enumerate(present):
            if file.legacy:
                end = "/".join(filter(None, (layer.path.rpartition(".")[2], name, theirs)))
                yield join(part, flax), _ending(file, layer.group, end)
            else:
                place = filter(None, (layer.group, attribute, "vars", str(i)))
                yield join(part, flax), "/".join(place)


def _ending(file: KerasFile, group: str, end: str) -> str:
    """Find an array of a group; between them `.h5` files may have names of models, or none."""
    group, end = f"{group}/", f"/{end}"
    found = [place for place in file.arrays if place.startswith(group) and place.endswith(end)]
    if len(found) != 1:
        raise KeyError(f"{len(found)} arrays {group}…{end}, expected 1")
    return found[0]


def _flattens_images(layer: _Layer) -> bool:
    """Return whether a layer flattens several channels of several positions."""
    if layer.sort != "Flatten" and not (
        layer.sort == "Reshape" and len(layer.config["target_shape"]) == 1
    ):
        return False
    if layer.shape is None or len(layer.shape) < 2:
        return layer.shape is None
    positions = list(layer.shape[1:])
    channels = positions.pop(0 if layer.config.get("data_format") == "channels_first" else -1)
    return channels != 1 and any(n != 1 for n in positions)
