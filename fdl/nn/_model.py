"""`Model` and `StatefulModel`: a model is a pair of pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl._checks import check_accepts, describe, module_of
from fdl.tree import Tree


class Model(NamedTuple):
    """A layer or a whole model, as two pure functions.

    To write your own, write the two functions. This one maps x to scale · x:

    >>> import torch
    >>> from fdl import random
    >>> scale = Model(
    ...     init=lambda key: {"scale": torch.ones(())},
    ...     apply=lambda params, x, *, train=False, key=None: params["scale"] * x,
    ... )
    >>> scale.apply(scale.init(random.key(0)), torch.arange(3.0))
    tensor([0., 1., 2.])
    """

    init: Callable[[Tensor], Tree]  # key -> params
    # (params, x, *, train=False, key=None) -> y; x and y are tensors or trees of them. It may also
    # take record=None, a function (name, value), for `capture`.
    apply: Callable[..., Any]
    uses_key: bool = True  # False if `apply` ignores its key; `sequential` then derives none

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a TypeError: call `apply`, not the model."""
        raise TypeError("a Model is two functions: call model.apply(params, x), not model(x)")


class StatefulModel(NamedTuple):
    """A model with buffers, such as running statistics: `apply` takes them and returns new ones.

    >>> import torch
    >>> from fdl import random
    >>> counter = StatefulModel(
    ...     init=lambda key: ({}, {"calls": torch.tensor(0)}),
    ...     apply=lambda params, buffers, x, *, train=False, key=None: (
    ...         x, {"calls": buffers["calls"] + 1}),
    ... )
    >>> params, buffers = counter.init(random.key(0))
    >>> counter.apply(params, buffers, torch.ones(1))
    (tensor([1.]), {'calls': tensor(1)})
    """

    init: Callable[[Tensor], tuple[Tree, Tree]]  # key -> (params, buffers)
    # (params, buffers, x, *, train=False, key=None) -> (y, buffers)
    apply: Callable[..., tuple[Tensor, Tree]]
    takes_mask: bool = False  # True if `apply` also takes mask=, bool [batch]: the rows that count

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a TypeError: call `apply`, not the model."""
        raise TypeError(
            "a StatefulModel is two functions: call model.apply(params, buffers, x), not model(x)"
        )


Layer = Model | Callable[[Tensor], Tensor]


def is_model(x: Any) -> bool:
    """Return whether `x` is a `Model` or a `StatefulModel`.

    >>> is_model(Model(lambda key: {}, lambda params, x, *, train=False, key=None: x))
    True
    """
    return isinstance(x, Model | StatefulModel)


def check_model(caller: str, model: Any) -> None:
    """Raise a TypeError that says what to pass instead, unless `model` is a model.

    >>> check_model("here", Model(lambda key: {}, lambda params, x, *, train=False, key=None: x))
    """
    if is_model(model):
        return
    if isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{caller}: model must be a Model, got the torch module {type(model).__name__}; "
            "interop.from_module makes a model of it"
        )
    check_not_factory(f"{caller}: model", model)
    hint = "; pass the model itself, not its apply" if callable(model) else first_is_model(model)
    raise TypeError(
        f"{caller}: model must be a Model or a StatefulModel, got {describe(model)}{hint}"
    )


def first_is_model(x: Any) -> str:
    """Return the end of an error message if `x` is what `interop.from_module` returns, else "".

    >>> first_is_model((Model(lambda key: {}, max), {}))
    '; pass the model alone, the first of them'
    """
    is_pair = isinstance(x, tuple) and x and is_model(x[0])
    return "; pass the model alone, the first of them" if is_pair else ""


def check_not_factory(caller: str, x: Any) -> None:
    """Raise a TypeError if `x` is a function of `fdl.nn` that makes a layer, such as `nn.linear`.

    >>> check_not_factory("layer '0'", torch.relu)
    """
    module, name = module_of(x), str(getattr(x, "__qualname__", ""))
    if not name.isidentifier() or isinstance(x, type):
        return
    if module.startswith("fdl.nn._") and module != "fdl.nn._activations":
        raise TypeError(
            f"{caller} is the function nn.{name}, which makes a layer: call it, nn.{name}(...)"
        )
    if module.startswith("fdl.optim"):
        raise TypeError(
            f"{caller} is the function optim.{name}, which makes an optimizer; an optimizer goes "
            "to train_step and TrainState.create"
        )


def check_takes_one(caller: str, fn: Callable[..., Any]) -> None:
    """Raise a TypeError if a function cannot be called as `fn(x)`, such as a model's `apply`.

    >>> check_takes_one("layer '0'", torch.relu)
    """
    try:
        check_accepts(caller, fn, "one argument", ["x"])
    except TypeError as error:
        is_apply = next(iter(inspect.signature(fn).parameters), "") == "params"
        hint = "; pass the model itself, not its apply" if is_apply else ""
        raise TypeError(f"{error}{hint}") from None


def check_takes_mask(caller: str, model: StatefulModel) -> None:
    """Raise a ValueError if a model with buffers would count the padded examples of a batch.

    >>> check_takes_mask("here", StatefulModel(lambda key: ({}, {}), max, takes_mask=True))
    """
    if not model.takes_mask:
        raise ValueError(
            f"{caller}: the batch has a mask, but the model takes none (its takes_mask is False), "
            "so padding would enter its statistics; epoch_indices(..., drop_last=True) makes "
            "batches without padding"
        )
