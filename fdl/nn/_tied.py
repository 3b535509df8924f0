"""Share parameters within a model: `tied`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fdl.nn._capture import Record, inside
from fdl.nn._model import Model, StatefulModel, check_model
from fdl.tree import Tree


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

    >>> from fdl import nn, random, tree
    >>> shared = nn.linear(4, 4)
    >>> net = tied(nn.sequential(shared, nn.relu, shared), {"2": "0"})
    >>> list(tree.flatten_dict(net.init(random.key(0))))
    ['0.weight', '0.bias']
    """
    check_model("tied", model)
    if isinstance(model, StatefulModel):
        raise TypeError("tied: model must be a Model, without buffers, got a StatefulModel")

    keyword = inside(model)

    def init(key: Tensor) -> Tree:
        params = model.init(key)
        for source in same.values():
            _get(params, source)
        for path in same:
            params = _without(params, path)
        return params

    def apply(params: Tree, x: Any, *, record: Record | None = None, **options: Any) -> Any:
        for path, source in same.items():
            params = _with(params, path, _get(params, source))
        options |= keyword("", record)
        return model.apply(params, x, **options)

    return Model(init, apply, model.uses_key)


def _get(params: Tree, path: str) -> Tree:
    node = params
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node.keys():  # noqa: SIM118
            raise KeyError(f"tied: {path!r} is not a path of the parameters {[*params.keys()]}")
        node = node[part]
    return node


def _without(params: Tree, path: str) -> Tree:
    _get(params, path)
    first, _, rest = path.partition(".")
    child = _without(params[first], rest) if rest else {}
    others = {name: value for name, value in params.items() if name != first}
    return {**others, first: child} if child != {} else others


def _with(params: Mapping[str, Any], path: str, value: Tree) -> Tree:
    first, _, rest = path.partition(".")
    return {**params, first: _with(params.get(first, {}), rest, value) if rest else value}
