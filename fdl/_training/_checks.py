"""Checks of what a training step receives: a loss, an optimizer, a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._checks import check_accepts, describe, module_of
from fdl._masks import fill_masked
from fdl._training._loss import StatefulLoss
from fdl._training._state import TrainState
from fdl.data import Batch
from fdl.data._forms import batch_of
from fdl.metrics._sums import Sums
from fdl.nn._model import is_model
from fdl.tree import Tree
from fdl.tree._map import match
from fdl.tree._structure import flatten, unflatten


def as_batch(caller: str, batch: Any) -> Batch:
    """Return the `Batch` that a step received, with its masked rows replaced by harmless ones.

    Args:
        caller: first words of an error message.
        batch: a `Batch`, a tuple or list (x, y) or (x, y, mask), or a dict with these names.

    Raises:
        TypeError: `batch` is none of these, or contains arrays that are not tensors.
        ValueError: the mask does not have the shape `[batch]`.

    >>> as_batch("here", {"x": torch.zeros(3, 2), "y": torch.zeros(3)}).mask
    ()
    """
    batch = batch_of(caller, batch)
    if not isinstance(batch.mask, Tensor):
        return batch
    if batch.mask.shape != (length(batch),):
        raise ValueError(
            f"{caller}: mask must have the shape [{length(batch)}], one entry per example, got "
            f"{list(batch.mask.shape)}"
        )
    x, y = fill_masked(batch.mask, (batch.x, batch.y))
    return Batch(x, y, batch.mask)


def length(batch: Batch) -> int:
    """Return the number of examples: the size of the first axis of y, or of x if y has no leaves.

    >>> length(Batch({"text": torch.zeros(3, 2)}, ()))
    3
    """
    return next(
        leaf.shape[0] for leaf in tree.leaves((batch.y, batch.x)) if isinstance(leaf, Tensor)
    )


def check_loss(caller: str, loss: Any) -> None:
    """Raise unless `loss` can be called as a loss of its type, with `train` and `key`.

    >>> check_loss("here", lambda params, batch, *, train, key: (params, {}))
    """
    if is_model(loss) or module_of(loss).startswith(("fdl.nn.", "fdl.interop.")):
        raise TypeError(
            f"{caller}: loss must be the loss of a model, got {describe(loss)} of fdl itself; "
            "fdl.supervised(model, losses.mse) makes the loss of a model"
        )
    is_opt = hasattr(loss, "init") and hasattr(loss, "update")
    if is_opt or not callable(loss) or isinstance(loss, torch.nn.Module):
        raise TypeError(
            f"{caller}: loss must be a function (params, batch, *, train, key) -> "
            f"(scalar, metrics), as fdl.supervised makes it, got {describe(loss)}"
            + ("; the order is train_step(loss, opt)" if is_opt else "")
        )
    if isinstance(loss, type):
        raise TypeError(f"{caller}: loss must be a function, got {describe(loss)}")
    stateful = isinstance(loss, StatefulLoss)
    fn = loss.fn if stateful else loss
    positional = ("params", "buffers", "batch") if stateful else ("params", "batch")
    try:
        expected = f"({', '.join(positional)}, *, train, key)"
        check_accepts(f"{caller}: loss", fn, expected, positional, ("train", "key"))
    except TypeError as error:
        hint = "" if stateful else "; wrap a loss with buffers in fdl.StatefulLoss"
        raise TypeError(f"{error}{hint}") from None


def check_state(caller: str, state: Any) -> None:
    """Raise unless `state` has the fields of a `TrainState`.

    >>> from types import SimpleNamespace
    >>> check_state("here", SimpleNamespace(params={}, buffers={}, opt_state={}, key=0, step=0))
    """
    if not all(hasattr(state, field) for field in TrainState._fields):
        raise TypeError(
            f"{caller}: state must be a TrainState, got {describe(state)}; make one with "
            "fdl.TrainState.create(model, opt, key=key)"
        )


def check_result(caller: str, result: Any, stateful: bool) -> None:
    """Raise unless a loss returned `(scalar, metrics)`, or `(scalar, (metrics, buffers))`.

    >>> check_result("here", (torch.tensor(1.0), {}), stateful=False)
    """
    expected = "(scalar, (metrics, buffers))" if stateful else "(scalar, metrics)"
    if not (isinstance(result, tuple) and len(result) == 2):
        empty = "(value, ({}, buffers))" if stateful else "(value, {})"
        raise TypeError(
            f"{caller}: the loss must return {expected}, got {describe(result)}; return {empty} if "
            "there is nothing to report"
        )
    value, rest = result
    if not isinstance(value, Tensor) or value.ndim:
        raise TypeError(f"{caller}: the loss must return a 0-d tensor first, got {describe(value)}")
    if stateful and not (isinstance(rest, tuple) and len(rest) == 2):
        raise TypeError(f"{caller}: the loss must return {expected}, got {describe(rest)} second")
    metrics = rest[0] if stateful else rest
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"{caller}: metrics must be a dict of Means or tensors, got {describe(metrics)}; "
            "return {} if there is nothing to report"
        )
    for path, leaf in _leaves(metrics):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{caller}: metrics{path} must be a Mean or a tensor, got {describe(leaf)}; "
                "make a Mean with fdl.metrics.mean(values)"
            )


def check_buffers(caller: str, old: Tree, new: Tree) -> Tree:
    """Check that new buffers are like the old ones, and return them with keys in the old order.

    >>> check_buffers("here", {"mean": torch.zeros(2)}, {"mean": torch.ones(2)})
    {'mean': tensor([1., 1.])}
    """
    if new is old:
        return new
    leaves, structure = flatten(old)
    found = match(old, new, f"{caller}: the buffers that the loss returned", structure)
    if any(_kind(a) != _kind(b) for a, b in zip(leaves, found, strict=True)):
        lines = "\n  ".join(tree.diff(old, new, values=False))
        raise ValueError(
            f"{caller}: the loss must keep the shapes and dtypes of the buffers:\n  {lines}"
        )
    return unflatten(found, structure)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)


def check_step_metrics(caller: str, metrics: Any) -> None:
    """Raise unless the metrics of a step are None or a function.

    >>> check_step_metrics("here", lambda state, grads: {})
    """
    if metrics is not None and not callable(metrics):
        raise TypeError(
            f"{caller}: metrics must be a function (state, grads) -> {{name: scalar}}, got "
            f"{describe(metrics)}; metrics of predictions belong to fdl.supervised"
        )
    if metrics is not None:
        check_accepts(f"{caller}: metrics", metrics, "(state, grads)", ("state", "grads"))


def check_step_metrics_result(caller: str, metrics: Any, taken: Mapping[str, Any]) -> None:
    """Raise unless the metrics of a step are scalars or sums, under names that are not taken.

    >>> check_step_metrics_result("here", {"lr": torch.tensor(0.1)}, {"loss": ()})
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{caller}: metrics must return a dict of scalars, got {describe(metrics)}")
    for name, value in metrics.items():
        if name in taken:
            raise ValueError(
                f"{caller}: metrics returned {name!r}, which is a metric of the loss already; "
                "choose another name"
            )
        scalar = isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex()
        if not scalar and not isinstance(value, Sums):
            raise TypeError(
                f"{caller}: metrics[{name!r}] must be a real 0-d tensor or a Mean, got "
                f"{describe(value)}"
            )


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return (path, leaf) pairs, paths in Python's notation, since a name may contain dots."""
    return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]
