"""Build models from layers: `sequential`, `parallel`, `concat` and `residual`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from fdl import random
from fdl._checks import describe
from fdl.nn._capture import Record, inside
from fdl.nn._model import (
    Layer,
    Model,
    StatefulModel,
    check_not_factory,
    check_takes_mask,
    check_takes_one,
    first_is_model,
    is_model,
)
from fdl.random._checks import check_key
from fdl.tree import Tree

Calls = list[Callable[[Any], Any]]  # of the layers, in order


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
    return _composed("sequential", layers, named, _in_turn)


def _in_turn(calls: Calls, x: Any) -> Any:
    for call in calls:
        x = call(x)
    return x


@overload
def parallel(*layers: Layer, **named: Layer) -> Model: ...  # type: ignore[overload-overlap]
@overload
def parallel(*layers: Layer | StatefulModel, **named: Layer | StatefulModel) -> StatefulModel: ...
def parallel(*layers: Any, **named: Any) -> Any:
    """Apply each layer to the same x, and return the tuple of their outputs.

    Layers, the paths of their parameters and buffers, and their keys are those of `sequential`. A
    function of the tuple may follow: `sequential(parallel(f, g), sum)` is f(x) + g(x).

    Raises:
        TypeError: as `sequential`.
        ValueError: as `sequential`, or there are no layers.

    >>> from fdl import nn
    >>> double = lambda x: 2 * x
    >>> parallel(double, torch.square).apply({}, torch.tensor(3.0))
    (tensor(6.), tensor(9.))
    >>> from fdl import tree
    >>> block = nn.sequential(parallel(body=nn.linear(4, 3), shortcut=nn.linear(4, 3)), sum)
    >>> list(tree.flatten_dict(block.init(random.key(0))))
    ['0.body.weight', '0.body.bias', '0.shortcut.weight', '0.shortcut.bias']
    """
    return _branches("parallel", layers, named, lambda names, ys: ys)


@overload
def concat(*layers: Layer, dim: int = 1, **named: Layer) -> Model: ...  # type: ignore[overload-overlap]
@overload
def concat(
    *layers: Layer | StatefulModel, dim: int = 1, **named: Layer | StatefulModel
) -> StatefulModel: ...
def concat(*layers: Any, dim: int = 1, **named: Any) -> Any:
    """Apply each layer to the same x, and concatenate their outputs along an axis.

    Args:
        *layers: layers as in `sequential`, which also says how paths and keys follow from them.
        dim: the axis, by default that of the channels; negative numbers count from the last.
        **named: layers by name, as in `sequential`.

    Raises:
        TypeError: as `sequential`, or `dim` is not an int.
        ValueError: as `sequential`, or there are no layers; at apply, outputs differ in the sizes
            of other axes.

    >>> from fdl import nn
    >>> inception = concat(nn.conv2d(3, 4, 1), nn.conv2d(3, 8, 3, padding="same"))
    >>> inception.apply(inception.init(random.key(0)), torch.ones(2, 3, 6, 6)).shape
    torch.Size([2, 12, 6, 6])
    """
    if not isinstance(dim, int):
        raise TypeError(f"concat: dim must be an int, got {describe(dim)}")

    return _branches("concat", layers, named, functools.partial(_joined, dim))


def _joined(dim: int, names: list[str], ys: tuple[Any, ...]) -> Tensor:
    shapes = {name: list(y.shape) for name, y in zip(names, ys, strict=True)}
    if any(not -len(shape) <= dim < len(shape) for shape in shapes.values()):
        raise ValueError(f"concat: every output needs an axis {dim}, got shapes {shapes}")
    others = [[*shape] for shape in shapes.values()]
    for shape in others:
        del shape[dim]
    if any(shape != others[0] for shape in others):
        raise ValueError(f"concat: outputs may differ in axis {dim} alone, got shapes {shapes}")
    return torch.cat(ys, dim)


def _branches(
    caller: str,
    layers: tuple[Any, ...],
    named: dict[str, Any],
    join: Callable[[list[str], tuple[Any, ...]], Any],
) -> Any:
    """Compose layers that have the same input; `join` gets their names and outputs."""
    if not (layers or named):
        raise ValueError(f"{caller}: needs at least one layer")
    names = list(named) or [str(i) for i in range(len(layers))]
    return _composed(
        caller, layers, named, lambda calls, x: join(names, tuple(call(x) for call in calls))
    )


def _composed(
    caller: str,
    layers: tuple[Any, ...],
    named: dict[str, Any],
    forward: Callable[[Calls, Any], Any],
) -> Any:
    """Return the model that is `forward(calls of the layers, x)`."""
    if layers and named:
        raise TypeError(f"{caller}: give layers by position or by name, not both")
    children = named or {str(i): layer for i, layer in enumerate(layers)}
    for name, layer in children.items():
        if "." in name:
            raise ValueError(
                f"{caller}: a name must not contain a dot, got {name!r}; nest sequentials instead"
            )
        _check_layer(f"{caller}: layer {name!r}", layer)

    with_buffers = [layer for layer in children.values() if isinstance(layer, StatefulModel)]
    keywords = {name: inside(layer) for name, layer in children.items()}
    uses_key = bool(with_buffers) or any(
        layer.uses_key for layer in children.values() if isinstance(layer, Model)
    )

    def keys(key: Tensor) -> Tensor:  # [layers, 2], in one call
        # At least one key, since vmap refuses an empty axis.
        numbers = torch.arange(max(1, len(children)), device=key.device)
        return torch.vmap(random.fold_in, (None, 0))(key, numbers)

    def init(key: Tensor) -> Any:
        check_key(f"{caller}: init", key)
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
        params: Tree,
        buffers: Tree,
        x: Any,
        train: bool,
        key: Tensor | None,
        mask: Tensor | None,
        record: Record | None,
    ) -> tuple[Any, Tree]:
        _check_entries(caller, {"params": params, "buffers": buffers}, children)
        child_keys = None if key is None or not uses_key else keys(key)
        new_buffers = {**buffers}

        def call(i: int, name: str, layer: Any, x: Any) -> Any:
            y = output(i, name, layer, x)
            if record is not None:
                record(name, y)
            return y

        def output(i: int, name: str, layer: Any, x: Any) -> Any:
            if not is_model(layer):
                return _call_function(caller, layer, x)
            options: dict[str, Any] = {"train": train}
            options["key"] = None if child_keys is None else child_keys[i]
            options |= keywords[name](name, record)
            child_params = params.get(name, {})
            if isinstance(layer, Model):
                return layer.apply(child_params, x, **options)
            if mask is not None:
                check_takes_mask(caller, layer)
                options["mask"] = mask
            y, child_buffers = layer.apply(child_params, buffers.get(name, {}), x, **options)
            new_buffers.update({name: child_buffers} if child_buffers != {} else {})
            return y

        calls = [_noted(caller, call, i, *child) for i, child in enumerate(children.items())]
        return forward(calls, x), new_buffers

    def apply(
        params: Tree,
        x: Any,
        *,
        train: bool = False,
        key: Tensor | None = None,
        record: Record | None = None,
    ) -> Any:
        return run(params, {}, x, train, key, None, record)[0]

    def apply_stateful(
        params: Tree,
        buffers: Tree,
        x: Any,
        *,
        train: bool = False,
        key: Tensor | None = None,
        mask: Tensor | None = None,
        record: Record | None = None,
    ) -> tuple[Any, Tree]:
        return run(params, buffers, x, train, key, mask, record)

    if with_buffers:
        takes_mask = all(layer.takes_mask for layer in with_buffers)
        return StatefulModel(init, apply_stateful, takes_mask)
    return Model(init, apply, uses_key)


def _check_entries(caller: str, parts: dict[str, Any], children: dict[str, Any]) -> None:
    """Raise unless parameters and buffers are dicts with entries for the layers alone."""
    for argument, entries in parts.items():
        if not isinstance(entries, Mapping):
            raise TypeError(
                f"{caller}: {argument} must be a dict with an entry for each layer, got "
                f"{describe(entries)}"
            )
        unknown = [name for name in entries.keys() if name not in children]  # noqa: SIM118
        if unknown:
            flat = any(name.partition(".")[0] in children for name in unknown)
            raise ValueError(
                f"{caller}: {argument} has entries {unknown}, but the layers are {list(children)}"
                + ("; tree.unflatten_dict nests keys with dots" if flat else "")
            )


def _call_function(caller: str, layer: Callable[[Any], Any], x: Any) -> Any:
    y = layer(x)
    if callable(y) and not isinstance(y, Tensor):
        raise TypeError(
            f"the function returned {describe(y)} instead of a tensor; if it makes a layer, call "
            f"it when you pass it to {caller}"
        )
    return y


def _noted(
    caller: str, call: Callable[..., Any], i: int, name: str, layer: Any
) -> Callable[[Any], Any]:
    """Return the call of a layer, whose errors say which layer it was."""

    def named_call(x: Any) -> Any:
        try:
            return call(i, name, layer, x)
        except Exception as error:
            error.add_note(f"in layer {name!r} of {caller}")
            raise

    return named_call


@overload
def residual(layer: Layer) -> Model: ...  # type: ignore[overload-overlap]
@overload
def residual(layer: StatefulModel) -> StatefulModel: ...
def residual(layer: Any) -> Any:
    """Compute x + layer(x), for a layer that keeps the shape.

    Parameters, buffers, their paths, keys and masks are those of the layer itself. For a shortcut
    that is a layer of its own, see `parallel`.

    Args:
        layer: a `Model`, a `StatefulModel`, or a function `x -> y`.

    Raises:
        TypeError: the layer cannot be called, is a torch module or makes layers.
        ValueError: at apply, the layer changes the shape.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016,
    https://arxiv.org/abs/1512.03385

    >>> from fdl import nn
    >>> block = residual(nn.sequential(nn.layer_norm(4), nn.linear(4, 4), nn.relu))
    >>> params = block.init(random.key(0))
    >>> list(params), block.apply(params, torch.ones(2, 4)).shape
    (['0', '1'], torch.Size([2, 4]))
    """
    _check_layer("residual: layer", layer)

    def add(x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
            raise ValueError(
                f"residual: the layer must keep the shape of its input, got {describe(x)}, and "
                f"returned {describe(y)}"
            )
        return x + y

    keyword = inside(layer)

    if isinstance(layer, StatefulModel):

        def apply_stateful(
            params: Tree, buffers: Tree, x: Tensor, *, record: Record | None = None, **options: Any
        ) -> Any:
            options |= keyword("", record)
            y, new_buffers = layer.apply(params, buffers, x, **options)
            return add(x, y), new_buffers

        return layer._replace(apply=apply_stateful)

    def apply(
        params: Tree,
        x: Tensor,
        *,
        train: bool = False,
        key: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        if not isinstance(layer, Model):
            return add(x, _call_function("residual", layer, x))
        options = keyword("", record)
        return add(x, layer.apply(params, x, train=train, key=key, **options))

    if isinstance(layer, Model):
        return layer._replace(apply=apply)
    return Model(lambda key: {}, apply, uses_key=False)


def _check_layer(caller: str, layer: Any) -> None:
    """Raise a TypeError unless `layer` is a model or can be a function `x -> y`."""
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
