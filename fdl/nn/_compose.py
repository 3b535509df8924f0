"""Put models together: `sequential` and `tied`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from fdl import random
from fdl.nn._model import Layer, Model, StatefulModel, _is_model, check_takes_mask
from fdl.tree import Tree


@overload
def sequential(*layers: Layer, **named: Layer) -> Model: ...  # type: ignore[overload-overlap]
@overload
def sequential(*layers: Layer | StatefulModel, **named: Layer | StatefulModel) -> StatefulModel: ...
def sequential(*layers: Any, **named: Any) -> Any:
    """Compose layers, each a `Model` or any function `x -> y`; equals `torch.nn.Sequential`.

    With a `StatefulModel` among them the result is one: buffers lie where parameters do. Its
    `apply` takes a `mask` of the examples that count, for the layers that take one.

    Parameters lie under the position (`"0"`, `"3"`; every element counts) or the name of their
    layer; a layer without parameters leaves no entry. Layer `i` gets the key `fold_in(key, i)`,
    in `init` and in `apply`.

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

    Raises:
        TypeError: both positional and named layers; a layer that cannot be called, a module of
            torch, or a function that makes layers where the layer is meant (`nn.flatten` without
            its brackets).
        ValueError: a name with a dot; `params` or `buffers` has an entry that is no layer, or a
            mask comes to a layer with buffers that takes none (at apply).
    """
    if layers and named:
        raise TypeError("sequential: give layers by position or by name, not both")
    children = named or {str(i): layer for i, layer in enumerate(layers)}
    for name, layer in children.items():
        if "." in name:
            raise ValueError(f"sequential: a name must not hold a dot, got {name!r}; nest instead")
        _check_layer(name, layer)

    stateful = any(isinstance(layer, StatefulModel) for layer in children.values())
    draws = any(getattr(layer, "draws", True) for layer in children.values() if _is_model(layer))

    def keys(key: Tensor) -> Tensor:  # [layers, 2], all in one go
        # At least one, since vmap takes no empty axis.
        numbers = torch.arange(max(1, len(children)), device=key.device)
        return torch.vmap(random.fold_in, (None, 0))(key, numbers)

    def init(key: Tensor) -> Any:
        child_keys = keys(key)
        drawn = {
            name: layer.init(child_keys[i])
            for i, (name, layer) in enumerate(children.items())
            if _is_model(layer)
        }
        has_buffers = [name for name in drawn if isinstance(children[name], StatefulModel)]
        params = {name: d[0] if name in has_buffers else d for name, d in drawn.items()}
        buffers = {name: drawn[name][1] for name in has_buffers}
        params, buffers = (
            {name: child for name, child in part.items() if child != {}}
            for part in (params, buffers)
        )
        return (params, buffers) if stateful else params

    def run(
        params: Tree, buffers: Tree, x: Tensor, train: bool, key: Tensor | None, mask: Any
    ) -> tuple[Tensor, Tree]:
        for kind, given in (("params", params), ("buffers", buffers)):
            unknown = [name for name in given if name not in children]
            if unknown:
                raise ValueError(
                    f"sequential: {kind} has entries {unknown}, but the layers are {list(children)}"
                )
        child_keys = None if key is None or not draws else keys(key)
        new = dict(buffers)
        for i, (name, layer) in enumerate(children.items()):
            try:
                if not _is_model(layer):
                    x = layer(x)
                    if callable(x) and not isinstance(x, Tensor):
                        raise TypeError(f"{layer!r} gave a function or model; was it to be called?")
                    continue
                options = {"train": train, "key": None if child_keys is None else child_keys[i]}
                own = params.get(name, {})
                if isinstance(layer, Model):
                    x = layer.apply(own, x, **options)
                    continue
                if mask is not None:
                    check_takes_mask(layer.apply, "sequential")
                    options["mask"] = mask
                x, changed = layer.apply(own, buffers.get(name, {}), x, **options)
                new |= {name: changed} if changed != {} else {}
            except Exception as error:
                error.add_note(f"in layer {name!r} of sequential")
                raise
        return x, new

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

    return StatefulModel(init, apply_stateful) if stateful else Model(init, apply, draws)


def _check_layer(name: str, layer: Any) -> None:
    """Raise unless a layer is a model or can be a function x -> y."""
    caller = f"sequential: layer {name!r}"
    if _is_model(layer):
        return
    if isinstance(layer, torch.nn.Module):
        raise TypeError(
            f"{caller} is the torch module {type(layer).__name__}, whose parameters and mode would "
            "be lost; interop.from_module makes a model of it"
        )
    if isinstance(layer, type) or not callable(layer):
        raise TypeError(f"{caller} must be a Model or a function x -> y, got {layer!r}")
    module, path = (getattr(layer, part, "") for part in ("__module__", "__qualname__"))
    if module.startswith("fdl.nn.") and path.isidentifier():
        raise TypeError(
            f"{caller} is the function nn.{path}, which makes a layer: call it, nn.{path}(...)"
        )


def tied(model: Model, same: Mapping[str, str]) -> Model:
    """Let paths of the parameters share others: `same={"2": "0"}` gives layer 2 those of layer 0.

    The parameters hold what is shared once, as `named_parameters()` does; its gradient is the sum
    over all uses.

    Args:
        model: a model whose parameters are nested dicts.
        same: from the path that goes (a leaf or a whole branch) to the path that it uses, which
            may itself be one that went before.

    Raises:
        KeyError: a path that is not in the parameters (at init and apply).

    >>> from fdl import nn, tree
    >>> shared = nn.linear(4, 4)
    >>> net = tied(nn.sequential(shared, nn.relu, shared), {"2": "0"})
    >>> list(tree.flatten_dict(net.init(random.key(0))))
    ['0.weight', '0.bias']
    """

    def init(key: Tensor) -> Tree:
        params = model.init(key)
        for source in same.values():
            _get(params, source)
        for path in same:
            params = _without(params, path)
        return params

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        whole = params
        for path, source in same.items():
            whole = _with(whole, path, _get(whole, source))
        return model.apply(whole, x, train=train, key=key)

    return Model(init, apply, model.draws)


def _get(params: Tree, path: str) -> Tree:
    node = params
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            raise KeyError(f"tied: no {path!r} in the parameters; there are {list(params)}")
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
