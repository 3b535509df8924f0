"""What a training step is given, looked at where it comes in: a loss, a model's apply, a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._masks import filled
from fdl.data import Batch
from fdl.nn import Model, StatefulModel
from fdl.optim import Optimizer
from fdl.tree._summary import shape_dtype


def kind(x: Any) -> str:
    """Describe an argument by type, shape and dtype, never by its values.

    >>> kind(torch.zeros(2)), kind(0.5), kind(int)
    ('a tensor float32[2]', 'a float', 'the class int')
    """
    if isinstance(x, Tensor):
        return f"a tensor {shape_dtype(x)}"
    if inspect.isclass(x):
        return f"the class {x.__name__}"
    if inspect.isroutine(x):
        return f"the function {getattr(x, '__name__', 'without a name')}"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{type(x).__module__.partition('.')[0]} {x.dtype}{list(x.shape)}"
    name = type(x).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def as_batch(caller: str, batch: Any) -> Batch:
    """Make a `Batch` of what a step was given, with the rows that do not count replaced.

    Args:
        caller: how an error begins.
        batch: a `Batch`, a tuple or list (x, y) or (x, y, mask), or a dict with these names.

    Raises:
        TypeError: a batch of another form, or one with arrays that are not torch's.
        ValueError: a mask of another shape than `[batch]`.

    >>> as_batch("here", {"x": torch.zeros(3, 2), "y": torch.zeros(3)}).mask
    ()
    """
    names = set(batch) if isinstance(batch, Mapping) else None
    if names in ({"x", "y"}, {"x", "y", "mask"}):
        batch = Batch(**batch)
    elif names is None and isinstance(batch, tuple | list) and len(batch) in (2, 3):
        batch = Batch(batch[0], batch[1], batch[2] if len(batch) == 3 else ())
    else:
        got = f"the entries {list(batch)}" if names is not None else kind(batch)
        raise TypeError(
            f"{caller}: batch must be Batch(x, y), Batch(x, y, mask), a tuple of these or a dict "
            f"with the entries x, y and mask, got {got}"
        )
    for path, leaf in _leaves(batch):
        if not isinstance(leaf, Tensor) and hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
            raise TypeError(
                f"{caller}: batch{path} must be a tensor, got {kind(leaf)}; "
                "interop.from_numpy and interop.from_jax make tensors of arrays"
            )
    if not isinstance(batch.mask, Tensor):
        return batch
    if batch.mask.shape != (length(batch),):
        raise ValueError(
            f"{caller}: mask must have the shape [{length(batch)}], one entry per example, got "
            f"{list(batch.mask.shape)}"
        )
    x, y = filled(batch.mask, (batch.x, batch.y))
    return Batch(x, y, batch.mask)


def length(batch: Batch) -> int:
    """Count the examples of a batch, by the first axis of y, or of x where there is no y.

    >>> length(Batch({"text": torch.zeros(3, 2)}, ()))
    3
    """
    return next(
        leaf.shape[0] for leaf in tree.leaves((batch.y, batch.x)) if isinstance(leaf, Tensor)
    )


def check_apply(caller: str, apply: Any) -> None:
    """Raise unless `apply` can be that of a model: `(params, x, *, train=False, key=None)`.

    >>> check_apply("here", lambda params, x, *, train=False, key=None: x)
    """
    if isinstance(apply, Model | StatefulModel):
        raise TypeError(f"{caller}: apply must be a function, got a model; pass model.apply")
    if isinstance(apply, torch.nn.Module):
        raise TypeError(
            f"{caller}: apply must be a function, got the module {type(apply).__name__}; "
            "interop.from_module makes a model of it, whose apply to pass"
        )
    if not callable(apply):
        raise TypeError(f"{caller}: apply must be a function, got {kind(apply)}")
    parameters = inspect.signature(apply).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not any_name and not {"train", "key"} <= parameters.keys():
        raise TypeError(
            f"{caller}: apply must be that of a model, (params, x, *, train=False, key=None), got "
            f"{kind(apply)} with the parameters {list(parameters)}"
        )


def check_loss(caller: str, loss: Any) -> None:
    """Raise unless `loss` can be called.

    >>> check_loss("here", lambda params, batch, key=None: (params, {}))
    """
    if isinstance(loss, Optimizer) or not callable(loss) or isinstance(loss, torch.nn.Module):
        raise TypeError(
            f"{caller}: loss must be a function (params, batch, key) -> (scalar, metrics), as "
            f"fdl.supervised makes it, got {kind(loss)}"
        )


def check_opt(caller: str, opt: Any) -> None:
    """Raise unless `opt` is an optimizer.

    >>> from fdl import optim
    >>> check_opt("here", optim.sgd(0.1))
    """
    if not isinstance(opt, Optimizer):
        raise TypeError(f"{caller}: opt must be an optimizer, as optim.sgd(0.1), got {kind(opt)}")


def check_result(caller: str, result: Any, stateful: bool) -> None:
    """Raise unless a loss gave `(scalar, metrics)`, or `(scalar, (metrics, buffers))`.

    >>> check_result("here", (torch.tensor(1.0), {}), stateful=False)
    """
    expected = "(scalar, (metrics, buffers))" if stateful else "(scalar, metrics)"
    if not (isinstance(result, tuple) and len(result) == 2):
        empty = "(value, ({}, buffers))" if stateful else "(value, {})"
        raise TypeError(
            f"{caller}: the loss must return {expected}, got {kind(result)}; return {empty} if "
            "there is nothing to report"
        )
    value, rest = result
    if not isinstance(value, Tensor) or value.ndim:
        raise TypeError(f"{caller}: the loss must return a 0-d tensor first, got {kind(value)}")
    if stateful and not (isinstance(rest, tuple) and len(rest) == 2):
        raise TypeError(f"{caller}: the loss must return {expected}, got {kind(rest)} second")
    for path, leaf in _leaves(rest[0] if stateful else rest):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{caller}: metrics{path} must be a Mean or a tensor, got {kind(leaf)}; "
                "fdl.metrics.mean(values) makes a Mean"
            )


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """List the leaves with their paths as Python writes them, since a name may hold dots."""
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]
