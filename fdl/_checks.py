"""Argument checks shared by several packages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_positive(caller: str, name: str, value: int) -> None:
    """Raise unless `value` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{caller}: {name} must be at least 1, got {value}")


def check_number(
    caller: str, name: str, value: Any, words: str, fits: Callable[[Any], Any]
) -> None:
    """Raise unless an argument is a number in a range; a 0-d tensor may stand for a number.

    Args:
        caller: function to name in the message.
        name: name of the argument.
        value: its value.
        words: the range, for the message.
        fits: whether a number is in the range, told by comparisons: NaN passes none of them.

    >>> check_number("dropout", "rate", 0.5, "in [0, 1)", lambda rate: 0 <= rate < 1)
    """
    is_scalar = isinstance(value, Tensor) and not value.ndim and not value.is_complex()
    if not is_scalar and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{caller}: {name} must be a number, got {describe(value)}")
    if not fits(value):
        raise ValueError(f"{caller}: {name} must be {words}, got {value}")


def check_at_least_0(caller: str, **numbers: Any) -> None:
    """Raise unless each argument is a finite number that is not negative.

    >>> check_at_least_0("random_rotation", degrees=10)
    """
    for name, value in numbers.items():
        check_number(caller, name, value, "finite and at least 0", lambda x: 0 <= x < math.inf)


def check_function(caller: str, name: str, f: Any, form: str = "") -> None:
    """Raise unless an argument can be called.

    Args:
        caller: function to name in the message.
        name: name of the argument.
        f: its value.
        form: what the function takes and returns, for the message.

    >>> check_function("scan", "f", max, "(carry, x) -> (carry, y)")
    """
    # Dynamo cannot tell of every function whether it can be called, but does not need to.
    if not torch.compiler.is_compiling() and not callable(f):
        form = form and f" {form}"
        raise TypeError(f"{caller}: {name} must be a function{form}, got {describe(f)}")


def as_tuple(caller: str, name: str, values: Any, what: str) -> tuple[Any, ...]:
    """Return the entries of an argument that holds several, or raise and say `what` it must be.

    >>> as_tuple("multi_step", "milestones", [10, 20], "a list of ints")
    (10, 20)
    """
    if isinstance(values, str | bytes | Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"{caller}: {name} must be {what}, got {describe(values)}")
    return tuple(values)


def check_dict(caller: str, name: str, value: Any, what: str) -> None:
    """Raise unless an argument is a mapping, of any library, and say `what` it must be.

    >>> check_dict("shard", "rules", {"*": 0}, "a dict from globs to dimensions")
    """
    if not hasattr(value, "keys"):
        raise TypeError(f"{caller}: {name} must be {what}, got {describe(value)}")


def check_accepts(
    what: str,
    function: Callable[..., Any],
    expected: str,
    positional: Sequence[str],
    keywords: Iterable[str] = (),
) -> None:
    """Raise unless a function can be called with these arguments, as far as its signature tells.

    Args:
        what: first words of an error message: the caller and the name of the argument.
        function: a function of the user's.
        expected: what it must accept, for the message.
        positional: names of the positional arguments.
        keywords: names of arguments passed by name.

    >>> check_accepts("here: loss", lambda batch, **_: 0, "(batch, *, key)", ["batch"], ["key"])
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have none
        return
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        raise TypeError(
            f"{what} must accept {expected}, got {describe(function)} with the signature "
            f"{signature} ({error})"
        ) from None


def module_of(x: Any) -> str:
    """Return the name of the module that defines a function or a class, "" if none is known.

    >>> module_of(inspect.signature), module_of(eval("lambda: 0", {"__name__": None}))
    ('inspect', '')
    """
    name = getattr(x, "__module__", None)
    return name if isinstance(name, str) else ""


def describe(x: Any) -> str:
    """Describe an argument by type, shape and dtype, never by its values.

    >>> import torch
    >>> describe(torch.zeros(2)), describe(0.5), describe(int)
    ('a tensor float32[2]', 'a float', 'the class int')
    """
    if isinstance(x, Tensor):
        return f"a tensor {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if inspect.isclass(x):
        return f"the class {x.__name__}"
    if inspect.isroutine(x):
        return f"the function {getattr(x, '__name__', 'without a name')}"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{type(x).__module__.partition('.')[0]} {x.dtype}{list(x.shape)}"
    name = type(x).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def describe_value(x: object) -> str:
    """Describe an argument by its value, if it is a number; a tensor by dtype and shape.

    >>> describe_value(0.5), describe_value(torch.zeros(2))
    ('0.5 (float)', 'a tensor, float32 of shape (2,)')
    """
    if isinstance(x, Tensor):
        return f"a tensor, {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
    if hasattr(x, "dtype") and hasattr(x, "shape"):  # an array, whose values may be many lines
        return describe(x)
    return f"{x!r} ({type(x).__name__})"


def check_key(caller: str, key: Tensor) -> None:
    """Raise unless `key` is a random key, and name the likely mistake."""
    got = describe_value(key)
    expected = f"{caller}: `key` expected a key, an int64 tensor of shape (2,), got {got}"
    if isinstance(key, int):
        raise TypeError(f"{expected}; make a key from a seed with random.key({key})")
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        raise TypeError(f"{expected}; make one with random.key(seed)")
    if key.shape != (2,):
        hint = "use torch.vmap to draw with a batch of keys" if key.ndim > 1 else "see random.key"
        raise ValueError(f"{expected}; {hint}")


def conversion(x: Any) -> str:
    """Say how to make a tensor of an array or of a column of a data set; "" for anything else.

    >>> conversion(range(3)), conversion(0.5)
    ('take the rows of a column, as in d["x"][:]', '')
    """
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return "convert arrays with interop.from_numpy or interop.from_jax"
    if isinstance(x, Sequence) and not isinstance(x, str | bytes):  # as those of Hugging Face
        return 'take the rows of a column, as in d["x"][:]'
    return ""
