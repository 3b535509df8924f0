"""`capture`: the values inside a model, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from fdl.nn._model import Model, StatefulModel, check_model
from fdl.tree import Tree
from fdl.tree._paths import join

AnyModel = TypeVar("AnyModel", Model, StatefulModel)
Record = Callable[[str, Any], None]  # takes the dotted name of a value, and the value

OWN = "__call__"  # the name of the output of a layer that has layers inside, as in Flax


def capture(model: AnyModel) -> AnyModel:
    """Return the model that also returns the output of each layer inside it, by name.

    Its `apply` returns `(y, values)` in place of y. `values` are nested dicts with the names of the
    parameters: `values["conv"]["0"]` is what the layer `conv.0` returned. A layer with layers
    inside has its own output at `"__call__"`. `tree.flatten_dict(values)` has the dotted names,
    which are those of `named_modules()` in torch. The values are results like any other: they can
    be differentiated, batched by `vmap`, and returned from `jit`, which computes only those that
    are used.

    Names come from `sequential`, `parallel`, `concat`, `transformer_encoder_layer` and the modules
    of `interop.from_module`, where a second call of one submodule adds `_1`. `residual`, `tied` and
    `with_policy` add no name. Inside a function or a model of your own there are none, unless its
    `apply` takes a keyword `record=None`, a function, and calls `record(name, value)` if that is
    not None. (It cannot be called inside a `scan` or `vmap` of the model: return the values.)

    Args:
        model: a `Model` or a `StatefulModel`; the result has the same type and parameters.

    Raises:
        TypeError: `model` is not a model.
        ValueError: the model has no names inside; at apply, a name is recorded twice, or none is.

    >>> import torch
    >>> from fdl import nn, random, tree
    >>> net = nn.sequential(body=nn.sequential(nn.linear(3, 4), nn.relu), head=nn.linear(4, 1))
    >>> y, values = capture(net).apply(net.init(random.key(0)), torch.ones(2, 3))
    >>> list(tree.flatten_dict(values))
    ['body.0', 'body.1', 'body.__call__', 'head']
    >>> values["body"]["1"].shape, torch.equal(values["head"], y)
    (torch.Size([2, 4]), True)

    A model that names one of its values:

    >>> def apply(params, x, *, train=False, key=None, record=None):
    ...     hidden = x @ params["w"]
    ...     if record is not None:
    ...         record("hidden", hidden)
    ...     return hidden.relu()
    >>> own = nn.Model(lambda key: {"w": random.normal(key, (3, 2))}, apply)
    >>> list(capture(own).apply(own.init(random.key(0)), torch.ones(1, 3))[1])
    ['hidden']
    """
    check_model("capture", model)
    if not takes_record(model):
        raise ValueError(
            "capture: the model has no names inside: its apply takes no keyword record; make it of "
            "named layers with nn.sequential, or let apply call record(name, value)"
        )

    if isinstance(model, StatefulModel):

        def apply_stateful(params: Tree, buffers: Tree, x: Any, **options: Any) -> Any:
            values: dict[str, Any] = {}
            y, buffers = model.apply(params, buffers, x, record=_recorder(values), **options)
            return (y, _nested(values)), buffers

        return model._replace(apply=apply_stateful)

    def apply(params: Tree, x: Any, **options: Any) -> Any:
        values: dict[str, Any] = {}
        y = model.apply(params, x, record=_recorder(values), **options)
        return y, _nested(values)

    return model._replace(apply=apply)


def takes_record(layer: Any) -> bool:
    """Return whether `layer` is a model whose `apply` records the values inside it.

    >>> from fdl import nn
    >>> takes_record(nn.sequential(nn.relu)), takes_record(nn.linear(2, 1)), takes_record(nn.relu)
    (True, False, False)
    """
    if not isinstance(layer, Model | StatefulModel):
        return False
    try:
        return "record" in inspect.signature(layer.apply).parameters
    except (TypeError, ValueError):  # a builtin may have none
        return False


def inside(layer: Any) -> Callable[[str, Record | None], dict[str, Record]]:
    """Return a function of a name and `record`: the keyword that records what is inside the layer.

    With the name `""` values keep the names that they have in the layer. It is empty for a layer
    that records nothing, and where nobody captures.

    >>> from fdl import nn
    >>> inside(nn.sequential(nn.relu))("block", print)["record"]("0", 3)
    block.0 3
    >>> inside(nn.relu)("block", print), inside(nn.sequential(nn.relu))("block", None)
    ({}, {})
    """
    taken = takes_record(layer)

    def keyword(name: str, record: Record | None) -> dict[str, Record]:
        if record is None or not taken:
            return {}
        return {"record": lambda path, value: record(join(name, path), value)}

    return keyword


def _recorder(values: dict[str, Any]) -> Record:
    def record(name: str, value: Any) -> None:
        if not isinstance(name, str) or not all(name.split(".")):
            raise ValueError(f"capture: a name must be a dotted path such as 'a.b', got {name!r}")
        if name in values:
            raise ValueError(f"capture: {name!r} is recorded twice; give each call its own name")
        values[name] = value

    return record


def _nested(values: dict[str, Any]) -> Tree:
    """Nest values by their dotted names, in the order in which they were recorded."""
    if not values:
        raise ValueError("capture: the model has no names inside: it recorded no value")
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        if any(other.startswith(f"{path}.") for other in values):
            parents, name = [*parents, name], OWN
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested
