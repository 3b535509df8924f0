"""The one place where an optimizer is checked, and one of another library made one of fdl."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fdl._checks import check_accepts, describe
from fdl.optim._base import Optimizer
from fdl.tree import Tree

EXTRAS = ("value", "value_fn", "count")  # keywords of `Optimizer.update`


class _HasInitAndUpdate(Protocol):
    @property
    def init(self) -> Callable[..., Any]: ...
    @property
    def update(self) -> Callable[..., Any]: ...


OptimizerLike = _HasInitAndUpdate | tuple[Callable[..., Any], Callable[..., Any]]


def as_optimizer(caller: str, opt: OptimizerLike, name: str = "opt") -> Optimizer:
    """Return an optimizer whose `update` accepts every argument of the protocol.

    `update` of the optimizer that is passed gets those that its signature has, and `inplace=False`
    if it has `inplace`, which in TorchOpt overwrites the gradients by default.

    Args:
        caller: function to name in the message.
        opt: an `Optimizer`, another object with functions `init` and `update`, or a pair of them.
        name: name of the argument it was passed as.

    Raises:
        TypeError: it is none of these, or a function cannot be called as the protocol says; at
            update, the function of another library returns no pair.

    >>> pair = (lambda params: (), lambda grads, state, *, inplace=True: (grads, inplace))
    >>> as_optimizer("here", pair).update({"w": 2.0}, (), {"w": 1.0}, value=3.0)
    ({'w': 2.0}, False)
    """
    init, update = _functions(caller, opt, name)
    if torch.compiler.is_compiling():  # Dynamo cannot inspect a function that it is tracing
        if isinstance(opt, Optimizer):
            return opt
        raise TypeError(
            f"{caller}: {name} is {describe(opt)}, whose signature torch.compile cannot read; pass "
            "it outside of the function that is compiled"
        )
    check_accepts(f"{caller}: {name}.init", init, "(params)", ["params"])
    kinds = _parameters(update)
    if kinds is None:  # a builtin may have no signature
        return Optimizer(init, update)
    takes_any = any(kind.kind is kind.VAR_KEYWORD for kind in kinds)
    named = {kind.name for kind in kinds if kind.kind in _BY_NAME}
    extras = frozenset(EXTRAS if takes_any else named.intersection(EXTRAS))
    fixed = {"inplace": False} if "inplace" in named else {}
    third = _has_third(kinds)
    by_name = not third and (takes_any or "params" in named)
    positional = ["grads", "state", "params"] if third else ["grads", "state"]
    keywords = [*extras, *fixed, *(["params"] if by_name else [])]
    what = f"{caller}: {name}.update"
    check_accepts(what, update, "(grads, state, params)", positional, keywords)
    if isinstance(opt, Optimizer) and third and not fixed and len(extras) == len(EXTRAS):
        return opt

    def call(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        options = {key: value for key, value in extra.items() if takes_any or key in extras}
        if by_name:
            options["params"] = params
        result = update(grads, state, *((params,) if third else ()), **options, **fixed)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError(
                f"{caller}: {name}.update must return (updates, state), got {describe(result)}"
            )
        return result[0], result[1]

    return Optimizer(init, call)


_Kind = inspect.Parameter
_BY_PLACE = (_Kind.POSITIONAL_ONLY, _Kind.POSITIONAL_OR_KEYWORD)
_BY_NAME = (_Kind.POSITIONAL_OR_KEYWORD, _Kind.KEYWORD_ONLY)


def _has_third(kinds: list[inspect.Parameter]) -> bool:
    """Return whether a function takes the parameters after gradients and state, by place."""
    third = [kind.name for kind in kinds if kind.kind in _BY_PLACE][2:3]
    if third:
        return third[0] not in (*EXTRAS, "inplace")
    return any(kind.kind is kind.VAR_POSITIONAL for kind in kinds)


def _functions(caller: str, opt: Any, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the two functions of an optimizer, or raise."""
    parts: tuple[Any, Any] = (getattr(opt, "init", None), getattr(opt, "update", None))
    if type(opt) is tuple and len(opt) == 2:
        parts = opt
    if not isinstance(opt, type) and all(map(_is_function, parts)):
        return parts
    hint = f"; call it: {opt.__name__}(...)" if inspect.isfunction(opt) else ""
    raise TypeError(
        f"{caller}: {name} must be an optimizer such as optim.sgd(0.1), or a pair of functions "
        f"(init, update), got {describe(opt)}{hint}"
    )


def _is_function(x: Any) -> bool:
    return callable(x) and not isinstance(x, type)


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return None
