"""The mode in which `from_module` runs a forward: it makes calls of torch pure.

Within `with KeyedRandomMode(key):` the n-th random call draws from `fold_in(key, n)`. Functions
whose kernels lack derivatives are written out when these are needed. Writes to values of the caller
raise, and so do random functions without a rule: nothing draws from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._differentiable import _functions
from fdl._torch_compat import assume_constant_result
from fdl.interop import _random_functions, _random_layers
from fdl.interop._keys import Keys

# By module and name, because `F.dropout` and `torch.dropout` differ in their arguments.
RULES: dict[str, Callable[..., Any]] = (
    _random_layers.RULES | _random_functions.RULES | _functions.RULES
)
REFUSED = {
    *("alpha_dropout_", "dropout_", "feature_alpha_dropout_", "feature_dropout"),
    *("feature_dropout_", "native_dropout", "rrelu_"),
    *("binomial", "cauchy_", "geometric_", "log_normal_", "multinomial", "poisson"),
    *("randint_like", "random_", "rrelu_with_noise", "_standard_gamma", "_sample_dirichlet"),
    *("fractional_max_pool2d", "fractional_max_pool3d"),
    *("fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices"),
}


class KeyedRandomMode(Keys):
    """Make random functions draw from a key: `with KeyedRandomMode(random.key(0)): F.dropout(x)`.

    Args:
        key: the key; with None random functions raise.
        owned: values of the caller, by name; a write to them raises.
    """

    def __init__(self, key: Tensor | None, owned: dict[str, Any] | None = None) -> None:
        super().__init__(key)
        self.owned = owned or {}
        self.owners: dict[int, str] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not torch.compiler.is_compiling():  # Dynamo cannot trace storages
            self._check_writes(func, name.partition(".")[0], args, kwargs)
        rule = RULES.get(f"{_place(func)}.{name}")
        if rule is None:
            if name in REFUSED:
                raise NotImplementedError(
                    f"{name} draws from torch's global generator and cannot draw from a key"
                )
            return func(*args, **kwargs)
        if foreign := [each for each in types if not issubclass(each, Tensor)]:
            raise TypeError(
                f"{name}: expected tensors, got {foreign[0].__name__}; call it for each of its "
                "leaves"
            )
        if kwargs.pop("generator", None) is not None:
            raise NotImplementedError(f"{name}: a torch.Generator cannot draw from a key; omit it")
        return rule(self, *args, **kwargs)

    def _check_writes(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Raise if a call would write to a value of the caller."""
        for target in _targets(func, name, args, kwargs):
            if self.owners is None:
                named = pytree.tree_flatten_with_path(self.owned)[0]
                self.owners = {_memory(x): _named(path) for path, x in named if _has_memory(x)}
            where = self.owners.get(_memory(target)) if _has_memory(target) else None
            if where is not None:
                raise ValueError(
                    f"apply: {name} would write to {where}, which belongs to the caller: a forward "
                    "may change only buffers (register_buffer), which apply returns; use "
                    "inplace=False or the function that returns a new tensor"
                )


_PLACES = {None: "Tensor", "torch.nn.functional": "F", "torch._C._nn": "F", "torch.nn.init": "init"}


def _place(func: Any) -> str:
    """Return the module of a torch function; methods have none."""
    return _PLACES.get(getattr(func, "__module__", None), "torch")


# -------------------------------------------------------------------------------------- writes


_OPERATORS = "add sub mul div truediv floordiv mod pow and or xor lshift rshift"
_IN_PLACE = {f"__i{name}__" for name in _OPERATORS.split(" ")} | {"__setitem__"}


def _targets(func: Any, name: str, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that a call writes to."""
    into_first = (
        name in _IN_PLACE
        or (kwargs.get("inplace") and ("dropout" not in name or kwargs.get("training")))
        or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        or (name == "__set__" and func.__self__ is Tensor.data)
    )
    if into_first:
        yield from pytree.tree_leaves(args[:1] or kwargs.get("input", kwargs.get("tensor")))
    if "out" in kwargs:
        yield from pytree.tree_leaves(kwargs["out"])


def _has_memory(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided


def _memory(x: Tensor) -> int:
    """Identify the storage of a tensor, below the wrappers of `grad` and `vmap`."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x.untyped_storage()._cdata


def _named(path: Any) -> str:
    kind, *rest = (str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)
    return f"{kind} {'.'.join(rest)!r}"


@assume_constant_result  # called while Dynamo traces, but not traced
def register_with_dynamo() -> None:
    """Make Dynamo pass `torch.rand` and similar functions to the mode, as eager torch does.

    Its list of overridable functions lacks some of them.
    """
    from torch._dynamo.variables.torch import get_overridable_functions  # loads Dynamo

    overridable = get_overridable_functions()
    for name in {rule.removeprefix("torch.") for rule in RULES} | REFUSED:
        if hasattr(torch, name):
            overridable.add(getattr(torch, name))
