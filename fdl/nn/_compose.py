"""Build models from layers: `sequential` and `tied`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from fdl import random
from fdl._checks import describe
from fdl.nn._model import (
    Layer,
    Model,
    StatefulModel,
    check_model,
    check_not_factory,
    check_takes_mask,
    check_takes_one,
    first_is_model,
    is_model,
)
from fdl.random._checks import check_key
from fdl.tree import Tree


@overload
def sequential(*layers: Layer, **named: Layer) -> Model: ...  # type: ignore[overload-overlap]
@overload
def sequential(*layers: Layer | StatefulModel, **named: Layer | StatefulModel) -> StatefulModel: ...
def sequential(*layers: Any, **named: Any) -> Any:
    """Compose layers, each a `Model` or any function `x -> y`; equals `torch.nn.Sequential`.

    If one of the layers is a `StatefulModel`, so is the result, and its buffers have the paths of
    its parameters. It takes a `mask` if all layers with buffers do.

    The parameters of a layer have its position (`"0"`, `"3"`; functions count too) or its name as
    the first part of their path. A layer without parameters has no entry. Layer `i` gets the key
    `fold_in(key, i)`, in `init` and in `apply`.

    Raises:
        TypeError: positional and named layers together; a layer that cannot be called, a torch
            module, or a function that makes layers, such as `nn.flatten` instead of `nn.flatten()`.
        ValueError: a name with a dot; at apply, `params` or `buffers` has an entry that is not a
            layer, or a layer with buffers does not take the mask.

    >>> from fdl import nn, tree
    >>> net = sequential(nn.linear(4, 3), nn.relu, lambda x: x - x.mean(), nn.linear(3, 1))
    >>> print(tree.summary(net.init(random.key(0))))
    path      shape   dtype    count  bytes
    0.weight  [3, 4]  float32     12     48
    0.bias    [3]     float32      3     12
    3.weight  [1, 3]  float32      3     12
    3.bias    [1]     float32      1      4
    total                         19     76
    >>> list(sequential(hidden=nn.linear(4, 3), act=nn.relu).init(random.key(0)))
    ['hidden']
    >>> params, buffers = sequential(nn.linear(4, 3), nn.batch_norm(3)).init(random.key(0))
    >>> list(buffers["1"])
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    if layers and named:
        raise TypeError("sequential: give layers by position or by name, not both")
    children = named or {str(i): layer for i, layer in enumerate(layers)}
    for name, layer in children.items():
        if "." in name:
            raise ValueError(
                f"sequential: a name must not contain a dot, got {name!r}; nest sequentials instead"
            )
        _check_layer(name, layer)

    with_buffers = [layer for layer in children.values() if isinstance(layer, StatefulModel)]
    uses_key = bool(with_buffers) or any(
        layer.uses_key for layer in children.values() if isinstance(layer, Model)
    )

    def keys(key: Tensor) -> Tensor:  # [layers, 2], in one call
        # At least one key, since vmap refuses an empty axis.
        numbers = torch.arange(max(1, len(children)), device=key.device)
        return torch.vmap(random.fold_in, (None, 0))(key, numbers)

    def init(key: Tensor) -> Any:
        check_key("sequential: init", key)
        child_keys = keys(key)
        params: dict[str, Tree] = {}
        buffers: dict[str, Tree] = {}
        for i, (name, layer) in enumerate(children.items()):
            if isinstance(layer, StatefulModel):
                params[name], buffers[name] = layer.init(child_keys[i])
            elif isinstance(layer, Model):
                params[name] = layer.init(child_keys[i])
        params, buffers = (
            {name: child for name, child in part.items() if child != {}}
            for part in (params, buffers)
        )
        return (params, buffers) if with_buffers else params

    def run(
        params: Tree, buffers: Tree, x: Tensor, train: bool, key: Tensor | None, mask: Any
    ) -> tuple[Tensor, Tree]:
        for argument, entries in (("params", params), ("buffers", buffers)):
            if not isinstance(entries, Mapping):
                raise TypeError(
                    f"sequential: {argument} must be a dict with an entry for each layer, got "
                    f"{describe(entries)}"
                )
            unknown = [name for name in entries if name not in children]
            if unknown:
                raise ValueError(
                    f"sequential: {argument} has entries {unknown}, but the layers are "
                    f"{list(children)}"
                )
        child_keys = None if key is None or not uses_key else keys(key)
        new_buffers = dict(buffers)
        for i, (name, layer) in enumerate(children.items()):
            try:
                if not is_model(layer):
                    x = layer(x)
                    if callable(x) and not isinstance(x, Tensor):
                        raise TypeError(
                            f"the function returned {describe(x)} instead of a tensor; if it makes "
                            "a layer, call it when you pass it to sequential"
                        )
                    continue
                options = {"train": train, "key": None if child_keys is None else child_keys[i]}
                child_params = params.get(name, {})
                if isinstance(layer, Model):
                    x = layer.apply(child_params, x, **options)
                    continue
                if mask is not None:
                    check_takes_mask("sequential", layer)
                    options["mask"] = mask
                x, child_buffers = layer.apply(child_params, buffers.get(name, {}), x, **options)
                new_buffers |= {name: child_buffers} if child_buffers != {} else {}
            except Exception as error:
                error.add_note(f"in layer {name!r} of sequential")
                raise
        return x, new_buffers

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        return run(params, {}, x, train, key, None)[0]

    def apply_stateful(
        params: Tree,
        buffers: Tree,
        x: Tensor,
        *,
        train: bool = False,
        key: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tree]:
        return run(params, buffers, x, train, key, mask)

    if with_buffers:
        takes_mask = all(layer.takes_mask for layer in with_buffers)
        return StatefulModel(init, apply_stateful, takes_mask)
    return Model(init, apply, uses_key)


def _check_layer(name: str, layer: Any) -> None:
    """Raise a TypeError unless `layer` is a model or can be a function `x -> y`."""
    caller = f"sequential: layer {name!r}"
    if is_model(layer):
        return
    if isinstance(layer, torch.nn.Module):
        raise TypeError(
            f"{caller} is the torch module {type(layer).__name__}, whose parameters and mode would "
            "be lost; interop.from_module makes a model of it"
        )
    if isinstance(layer, type) or not callable(layer):
        raise TypeError(
            f"{caller} must be a Model or a function x -> y, got {describe(layer)}"
            f"{first_is_model(layer)}"
        )
    check_not_factory(caller, layer)
    check_takes_one(caller, layer)


def tied(model: Model, same: Mapping[str, str]) -> Model:
    """Share parameters between paths: `same={"2": "0"}` makes layer 2 use those of layer 0.

    A shared parameter is stored once, as in `named_parameters()`. Its gradient is the sum over all
    its uses.

    Args:
        model: a model without buffers, whose parameters are nested dicts.
        same: maps the path to remove (a leaf or a whole branch) to the path used in its place,
            which may itself be one removed by an earlier entry.

    Raises:
        TypeError: `model` is not a `Model`.
        KeyError: a path is not in the parameters (at init and apply).

    >>> from fdl import nn, tree
    >>> shared = nn.linear(4, 4)
    >>> net = tied(nn.sequential(shared, nn.relu, shared), {"2": "0"})
    >>> list(tree.flatten_dict(net.init(random.key(0))))
    ['0.weight', '0.bias']
    """
    check_model("tied", model)
    if isinstance(model, StatefulModel):
        raise TypeError("tied: model must be a Model, without buffers, got a StatefulModel")

    def init(key: Tensor) -> Tree:
        params = model.init(key)
        for source in same.values():
            _get(params, source)
        for path in same:
            params = _without(params, path)
        return params

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        for path, source in same.items():
            params = _with(params, path, _get(params, source))
        return model.apply(params, x, train=train, key=key)

    return Model(init, apply, model.uses_key)


def _get(params: Tree, path: str) -> Tree:
    node = params
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            raise KeyError(f"tied: {path!r} is not a path of the parameters {list(params)}")
        node = node[part]
    return node


def _without(params: Tree, path: str) -> Tree:
    _get(params, path)
    first, _, rest = path.partition(".")
    child = _without(params[first], rest) if rest else {}
    others = {name: value for name, value in params.items() if name != first}
    return {**others, first: child} if child != {} else others


def _with(params: dict[str, Any], path: str, value: Tree) -> Tree:
    first, _, rest = path.partition(".")
    return {**params, first: _with(params.get(first, {}), rest, value) if rest else value}
