"""`summary`: the layers of a model, with shapes, parameters and FLOPs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from fdl import random, tree
from fdl._checks import check_accepts, describe
from fdl._table import WIDTH, aligned
from fdl.nn import Model, StatefulModel
from fdl.nn._model import check_model, check_not_factory, is_model
from fdl.tree import Tree

HEADER = ("layer", "parameters", "output", "count", "FLOPs")
LIMITS = (WIDTH, 24, 24, 40, 40)  # most characters of a cell; names get the rest of a line


class Layer(NamedTuple):
    """What is known of a layer."""

    output: Any  # a tree of tensors without memory
    flops: int


def summary(model: Model | StatefulModel | Callable[..., Any], *args: Any) -> str:
    """Tabulate the layers of a model: shapes of parameters and output, their count, and FLOPs.

    Nothing is computed: tensors have no memory here, so x may be as large as you like, or on the
    device `meta`. The model runs as in evaluation, forward only.

    FLOPs are those of `torch.utils.flop_counter`: a multiplication and an addition are two, and
    only matrix products, convolutions and attention (causal or not) are counted. Biases,
    activations, norms, pools and lookups are not.

    Names are those of `nn.capture`. A layer has the FLOPs since the layer before it returned; one
    with layers inside has a row only for what these do not have. Where a model has no names inside,
    as a function of your own, parameters are listed by path, and the total alone has an output and
    FLOPs. Buffers are no parameters.

    Args:
        model: a `Model`, a `StatefulModel`, or a function whose first argument is the parameters.
        args: the input of the model; of a function all its arguments, the parameters first.

    Raises:
        TypeError: `model` is none of these, or the input is missing.
        ValueError: the model reads the values of tensors, as `cond` does, which takes one branch.

    >>> from fdl import nn
    >>> net = nn.sequential(hidden=nn.linear(784, 256), act=nn.relu, out=nn.linear(256, 10))
    >>> print(summary(net, torch.empty(64, 1, 784)))
    layer   parameters    output      count       FLOPs
    hidden  256×784, 256  64×1×256  200,960  25,690,112
    act                   64×1×256
    out     10×256, 10    64×1×10     2,570     327,680
    total                 64×1×10   203,530  26,017,792

    >>> weight = torch.ones(3, 2)
    >>> print(summary(lambda params, x: x @ params["w"].T, {"w": weight}, torch.ones(5, 2)))
    layer  parameters  output  count  FLOPs
    w      3×2                     6
    total              5×3         6     60
    """
    from torch.utils.flop_counter import FlopCounterMode

    if not callable(model) or isinstance(model, torch.nn.Module | type):
        check_model("summary", model)
    check_not_factory("summary: model", model)
    if len(args) < (1 if is_model(model) else 2):
        raise TypeError(
            f"summary: the input is missing, got {describe(model)} and {len(args)} arguments; call "
            "summary(model, x), or summary(apply, params, x)"
        )
    layers: dict[str, Layer] = {}
    # Under such modes jitted functions run eagerly.
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:

        def record(name: str, output: Any) -> None:
            before = sum(layer.flops for layer in layers.values())
            layers[name] = Layer(output, counter.get_total_flops() - before)

        try:
            params, output = _run(model, tree.map(_without_memory, args), record)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"summary: the model reads the values of tensors, which have none here ({error})"
            ) from error
    return _table(params, layers, Layer(output, counter.get_total_flops()))


def _without_memory(leaf: Any) -> Any:
    """Make a tensor like another; of one on the device `meta`, one on the CPU."""
    if not isinstance(leaf, Tensor):
        return leaf
    device = "cpu" if leaf.is_meta else leaf.device
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=device)


def _run(model: Any, args: Any, record: Callable[[str, Any], None]) -> tuple[Tree, Any]:
    """Apply the model, and return its parameters and its output."""
    if not is_model(model):
        return args[0], model(*args, **_keyword(model, record))
    devices = [leaf.device for leaf in tree.leaves(args) if isinstance(leaf, Tensor)]
    _check_arguments(model, args)
    made = model.init(random.key(0, *devices[:1]))
    if isinstance(model, StatefulModel):
        return made[0], model.apply(*made, *args, **_keyword(model.apply, record))[0]
    return made, model.apply(made, *args, **_keyword(model.apply, record))


def _check_arguments(model: Any, args: Any) -> None:
    """Raise if a model takes fewer arguments, as it does if the parameters are among them."""
    made = ("params", "buffers") if isinstance(model, StatefulModel) else ("params",)
    try:
        check_accepts("summary: model", model.apply, "", (*made, *map(str, range(len(args)))))
    except TypeError:
        raise TypeError(
            f"summary: the model takes another number of inputs than {len(args)}; its parameters "
            "are made here, so call summary(model, x), or summary(model.apply, params, x)"
        ) from None


def _keyword(apply: Callable[..., Any], record: Callable[[str, Any], None]) -> dict[str, Any]:
    try:
        takes = "record" in inspect.signature(apply).parameters
    except (TypeError, ValueError):  # a builtin may have none
        takes = False
    return {"record": record} if takes else {}


def _table(params: Tree, layers: dict[str, Layer], whole: Layer) -> str:
    leaves = {p: x for p, x in tree.flatten_dict(params).items() if isinstance(x, Tensor)}
    owned: dict[str, list[Tensor]] = {name: [] for name in layers}
    for path, leaf in leaves.items():
        owned.setdefault(_owner(path, layers), []).append(leaf)
    rows = []
    for name, own in owned.items():
        layer = layers.get(name, Layer([], 0))
        around = any(other.startswith(f"{name}.") for other in layers)
        if own or layer.flops or not around:
            rows.append(_row(name, own, layer))
    rest = whole.flops - sum(layer.flops for layer in layers.values())
    if layers and rest:
        rows.append(_row("no layer", [], Layer([], rest)))
    total = _row("total", [*leaves.values()], whole)
    return aligned([HEADER, *rows, (total[0], "", *total[2:])], numbers=(3, 4), limits=LIMITS)


def _owner(path: str, layers: dict[str, Layer]) -> str:
    """Return the innermost layer that a parameter belongs to, else what is around it."""
    parts = path.split(".")
    around = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in around if name in layers), (around[1:] or [path])[0])


def _row(name: str, params: list[Tensor], layer: Layer) -> tuple[str, str, str, str, str]:
    count = sum(leaf.numel() for leaf in params)
    return (
        name,
        ", ".join(map(_shape, params)),
        ", ".join(_shape(x) for x in tree.leaves(layer.output) if isinstance(x, Tensor)),
        f"{count:,}" if params else "",
        f"{layer.flops:,}" if layer.flops else "",
    )


def _shape(x: Tensor) -> str:
    return "×".join(map(str, x.shape)) or "scalar"
