"""Give a model to code that looks for torch's own layers inside a module.

A layer of `fdl.nn` is a function that closes over its sizes. Its twin is found by the name of that
function, and made from what it closes over.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from typing import Any

import einops.layers.torch
import torch
import torch.nn.functional as F
from torch import nn

from fdl._checks import describe, module_of
from fdl.interop._as_module import check_buffers
from fdl.interop._module import with_values
from fdl.nn import Model, StatefulModel, gelu
from fdl.nn._model import check_model, is_model
from fdl.tree import Tree

Closed = dict[str, Any]  # what a function closes over, by name


def to_sequential(
    model: Model | StatefulModel, params: Tree, buffers: Tree | None = None
) -> nn.Sequential:
    """Build an `nn.Sequential` of torch's own layers that equals a model made by `nn.sequential`.

    It is for code that looks for `nn.Linear` and the like inside a module, such as KFAC, Laplace's
    approximation of the last layer, or pruning; for everything else there is `as_module`, which
    takes any model. Names and paths are those of the model, so that `state_dict()` holds the leaves
    of `params` and `buffers`. The module is in training mode, and owns its memory: the values are
    copies. Dropout draws from torch's generator. Instance normalisation becomes an `nn.GroupNorm`,
    which does not need to know the number of axes.

    Args:
        model: an `nn.sequential` of layers that torch has, of their functions (`torch.tanh`, or a
            `functools.partial` of `F.gelu`), of pools, einops patterns, and of such models.
        params: its parameters.
        buffers: its buffers; required for a `StatefulModel`.

    Raises:
        TypeError: `model` is not a model, or a layer has no twin in torch (it is named).
        ValueError: buffers are missing, or there are some but the model has none; paths or shapes
            differ from those of the model (each is listed).

    >>> from fdl import nn, random
    >>> net = nn.sequential(nn.linear(3, 4), nn.relu, nn.linear(4, 2))
    >>> to_sequential(net, net.init(random.key(0)))
    Sequential(
      (0): Linear(in_features=3, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    check_model("to_sequential", model)
    check_buffers("to_sequential", model, buffers)
    children = _children(model)
    if children is None:
        raise TypeError(
            "to_sequential: model must be made by nn.sequential, got another "
            f"{type(model).__name__}; use nn.sequential(model), with the parameters {{'0': params}}"
        )
    with torch.device("meta"):  # draws nothing
        empty = _sequential(children, "", _axes(children))
    filled: Any = with_values("to_sequential", params, empty, buffers)
    return filled


def _sequential(children: dict[str, Any], path: str, axes: Iterator[int]) -> nn.Sequential:
    twins = ((name, _twin(layer, f"{path}{name}", axes)) for name, layer in children.items())
    return nn.Sequential(OrderedDict(twins))


def _twin(layer: Any, path: str, axes: Iterator[int]) -> nn.Module:
    """Return the torch module of a layer, without its values."""
    children = _children(layer)
    if children is not None:
        return _sequential(children, f"{path}.", axes)
    if not is_model(layer):
        options = layer.keywords if isinstance(layer, functools.partial) else {}
        fn = layer.func if isinstance(layer, functools.partial) and not layer.args else layer
        if isinstance(fn, Hashable) and fn in FUNCTIONS:
            with suppress(TypeError):  # an option that the module does not have
                return FUNCTIONS[fn](**options)
    name, closed = _name_and_closed(layer.apply if is_model(layer) else layer)
    if name == "batch_norm.apply":
        batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[next(axes) - 1]
        return batch_norm(closed["features"], eps=closed["eps"], momentum=closed["momentum"])
    if name in LAYERS:
        return LAYERS[name](closed)
    raise TypeError(
        f"to_sequential: layer {path!r} has no twin in torch.nn, got {_shown(layer, name)}; "
        "interop.as_module makes a module of any model"
    )


def _shown(layer: Any, name: str) -> str:
    made_by = name.partition(".")[0]
    is_public = is_model(layer) and made_by.isidentifier() and not made_by.startswith("_")
    return f"a model of nn.{made_by}" if is_public else describe(layer)


def _children(layer: Any) -> dict[str, Any] | None:
    """Return the layers of an `nn.sequential` by name, None for anything else."""
    if not is_model(layer):
        return None
    name, closed = _name_and_closed(layer.apply)
    inner = _closed_over(closed["run"]) if name.startswith("_composed.apply") else {}
    return inner["children"] if inner.get("caller") == "sequential" else None


def _axes(children: dict[str, Any]) -> Iterator[int]:
    """Yield how many axes each `nn.batch_norm` has behind the channels, by the layers around it.

    Those of the last layer before it that tells, else of the first after it, else one. What is
    flattened is taken for an image.
    """
    layers = list(_flat(children))
    for i, layer in enumerate(layers):
        if _is_batch_norm(layer):
            before = [_axes_of(other) for other in reversed(layers[:i])]
            after = [2 if _is_flatten(other) else _axes_of(other) for other in layers[i:]]
            yield next((n for n in (*before, *after) if n), 1)


def _flat(children: dict[str, Any]) -> Iterator[Any]:
    for layer in children.values():
        inner = _children(layer)
        yield from [layer] if inner is None else _flat(inner)


def _is_batch_norm(layer: Any) -> bool:
    return is_model(layer) and _name_and_closed(layer.apply)[0] == "batch_norm.apply"


def _is_flatten(layer: Any) -> bool:
    return not is_model(layer) and _name_and_closed(layer)[0] == "flatten.<lambda>"


def _axes_of(layer: Any) -> int | None:
    """Return the number of axes that a layer expects behind the channels, None if any."""
    name, closed = _name_and_closed(layer.apply if is_model(layer) else layer)
    if name == "affine.apply":
        f, inner = _name_and_closed(closed["f"])
        return 1 if f == "linear.product" else inner["axes"]
    return 1 if _is_flatten(layer) else closed.get("axes")


def _name_and_closed(fn: Any) -> tuple[str, Closed]:
    """Return the name of a local function of `fdl.nn`, such as "flatten.<lambda>"; else ""."""
    if not module_of(fn).startswith("fdl.nn."):
        return "", {}
    return fn.__qualname__.replace("<locals>.", ""), _closed_over(fn)


def _closed_over(fn: Any) -> Closed:
    cells = getattr(fn, "__closure__", None) or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(fn.__code__.co_freevars if cells else (), cells, strict=True)
    }


def _affine(closed: Closed) -> nn.Module:
    name, inner = _name_and_closed(closed["f"])
    bias = closed["bias"]
    if name == "linear.product":
        outputs, inputs = closed["shape"]
        return nn.Linear(inputs, outputs, bias)
    window = inner["window"]
    sizes = (window.inputs, window.outputs, window.kernel)
    options = {"stride": window.stride, "padding": inner["pads"], "dilation": window.dilation}
    options |= {"groups": window.groups, "bias": bias}
    if name == "_conv.convolve":
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[window.axes - 1](*sizes, **options)
    options["output_padding"] = inner["extra"]
    return (nn.ConvTranspose1d, nn.ConvTranspose2d)[window.axes - 1](*sizes, **options)


def _pool(closed: Closed) -> nn.Module:
    pools = {
        "max_pool1d": nn.MaxPool1d,
        "max_pool2d": nn.MaxPool2d,
        "avg_pool1d": nn.AvgPool1d,
        "avg_pool2d": nn.AvgPool2d,
    }
    return pools[closed["name"]](closed["window"], closed["steps"], closed["pads"])


def _adaptive_pool(closed: Closed) -> nn.Module:
    pools = {
        "adaptive_avg_pool1d": nn.AdaptiveAvgPool1d,
        "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
        "adaptive_max_pool2d": nn.AdaptiveMaxPool2d,
    }
    return pools[closed["name"]](closed["size"])


def _dropout(closed: Closed) -> nn.Module:
    of_channels = closed["name"].startswith("dropout2d")
    return (nn.Dropout2d if of_channels else nn.Dropout)(closed["rate"])


LAYERS: dict[str, Callable[[Closed], nn.Module]] = {
    "affine.apply": _affine,
    "layer_norm.apply": lambda c: nn.LayerNorm(c["sizes"], eps=c["eps"]),
    "rms_norm.apply": lambda c: nn.RMSNorm(c["sizes"], eps=c["eps"]),
    "_by_groups.apply": lambda c: nn.GroupNorm(c["groups"], c["channels"], c["eps"], c["affine"]),
    "embedding.apply": lambda c: nn.Embedding(c["shape"][0], c["shape"][1], c["padding"]),
    "_dropout.apply": _dropout,
    "_pool.pool": _pool,
    "_adaptive_pool.pool": _adaptive_pool,
    "flatten.<lambda>": lambda c: nn.Flatten(c["start"], c["end"]),
    "rearrange.<lambda>": lambda c: einops.layers.torch.Rearrange(c["pattern"], **c["sizes"]),
    "reduce.<lambda>": lambda c: einops.layers.torch.Reduce(
        c["pattern"], c["reduction"], **c["sizes"]
    ),
}

FUNCTIONS: dict[Callable[..., Any], Callable[..., nn.Module]] = {
    F.elu: nn.ELU,
    F.gelu: nn.GELU,
    gelu: nn.GELU,
    F.leaky_relu: nn.LeakyReLU,
    F.log_softmax: nn.LogSoftmax,
    F.relu: nn.ReLU,
    F.sigmoid: nn.Sigmoid,
    F.silu: nn.SiLU,
    F.softmax: nn.Softmax,
    F.softplus: nn.Softplus,
    F.tanh: nn.Tanh,
    torch.relu: nn.ReLU,
    torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh,
}
