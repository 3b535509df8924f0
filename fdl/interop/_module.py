"""Convert an `nn.Module` to pure functions, and back."""

from __future__ import annotations

import copy
import operator
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from fdl import tree
from fdl._modes import under_vmap
from fdl.interop._key_mode import KeyedRandomMode, register_with_dynamo
from fdl.nn import Model, StatefulModel
from fdl.nn._capture import Record
from fdl.tree import Tree, flatten_dict, unflatten_dict
from fdl.tree._paths import join

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def from_module(module: nn.Module) -> tuple[Model | StatefulModel, Tree, Tree]:
    """Convert a module to pure functions, its parameters and its buffers.

    The values are copies: training them does not change the module, and later changes to the module
    do not reach the model. Their paths are those of `named_parameters()` and `named_buffers()`; a
    tied parameter is stored once, and its gradient is the sum over all uses.

    `apply(params, *inputs, train=False, key=None, **options)` calls the module with `inputs` and
    `options`; with buffers it is `apply(params, buffers, *inputs, …) -> (y, new_buffers)`. Both
    also accept flat dicts such as `dict(module.named_parameters())`.

    - *Mode*: `train=False` evaluates every submodule. `train=True` trains all except submodules
      that were in eval mode while the module itself was not: these are frozen.
    - *Randomness*: the n-th random call in the forward draws from `fold_in(key, n)`, in dropout,
      attention, an LSTM, stochastic depth or `torch.rand`. Torch's generator is never used.
    - *Derivatives*: of every order, in reverse and forward mode and under `vmap`. Kernels of torch
      that lack derivatives, such as normalisation and attention beyond the first, are replaced.
    - *Writes*: a forward may write to its buffers, which are copied before, and to no other value
      from outside. `ReLU(inplace=True)` on the input is an error.
    - *`init(key)`* returns the module's own values on the device of the key, for
      `TrainState.create`. The key has no other effect, because the module was initialised in its
      constructor.
    - *`requires_grad`* is ignored: `grad` differentiates with respect to its argument. Use
      `optim.freeze` to keep parameters constant.

    Args:
        module: the module, on one device and without hooks.

    Returns:
        The model, a `StatefulModel` if there are buffers; the parameters; the buffers, `{}` if
        there are none.

    Raises:
        TypeError: `module` is not an `nn.Module`, or is compiled to TorchScript.
        ValueError: a submodule has hooks, uninitialised lazy parameters, or tensors on several
            devices (each is listed); at apply: parameters or buffers have other paths or shapes, a
            random function has no key, or the forward sets attributes or writes to parameters or
            inputs.
        NotImplementedError: at apply: a random function cannot draw from a key, or a function does
            not have the derivative.

    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    >>> model, params, buffers = from_module(net)
    >>> y, buffers = model.apply(params, buffers, torch.randn(8, 3), train=True)
    >>> buffers["1"]["num_batches_tracked"], net[1].num_batches_tracked
    (tensor(1), tensor(0))
    """
    _check_module(module)
    params, buffers = (
        _nested({path: x.detach().clone() for path, x in named})
        for named in (module.named_parameters(), module.named_buffers())
    )
    shapes = [_shapes(params), _shapes(buffers)]
    own = tree.map(torch.clone, (params, buffers))
    shells = {train: _shell(module, train) for train in (False, True)}
    held = {train: _tensors_held(shell) for train, shell in shells.items()}

    def call(
        values: list[Tree], inputs: Any, options: Any, train: bool, key: Any, record: Any
    ) -> Any:
        flat = [flatten_dict(tree) for tree in values]
        for kind, leaves, expected in zip(("params", "buffers"), flat, shapes, strict=True):
            _check_values(f"apply of {type(module).__name__}: {kind}", leaves, expected)
        owned = {
            "params": flat[0],
            "input": inputs,
            "option": options,
            "attribute": held[train],  # tensors that are neither parameters nor buffers
        }
        # Copies, because a module writes to its buffers.
        flat[1] = _copies(flat[1], (flat[0], inputs, options, key) if train else ())
        named = {f"module.{path}": x for leaves in flat for path, x in leaves.items()}
        shell = shells[train]
        if torch.compiler.is_compiling():  # Dynamo cannot trace the checks below
            register_with_dynamo()
            if record is not None:
                raise NotImplementedError(
                    "nn.capture of a module cannot be traced by torch.compile; use fdl.jit"
                )
            if parametrize._cache_enabled:
                raise ValueError("apply: cannot be compiled inside parametrize.cached()")
            with KeyedRandomMode(key):
                return functional_call(shell, named, inputs, options)
        with _recording(shell, record), _unchanged(shell), _own_cache():
            try:
                with KeyedRandomMode(key, owned):
                    return functional_call(shell, named, inputs, options)
            except Exception as error:
                error.add_note(_whereabouts(error, shell))
                raise

    def stateless(
        params: Tree,
        *inputs: Any,
        train: bool = False,
        key: Tensor | None = None,
        record: Record | None = None,
        **options: Any,
    ) -> Any:
        return call([params, {}], inputs, options, train, key, record)[0]

    def stateful(
        params: Tree,
        buffers: Tree,
        *inputs: Any,
        train: bool = False,
        key: Tensor | None = None,
        record: Record | None = None,
        **options: Any,
    ) -> Any:
        y, flat = call([params, buffers], inputs, options, train, key, record)
        return y, _nested(flat)

    def init(key: Tensor) -> Any:
        return tree.map(lambda x: x.to(key.device, copy=True), own if buffers else own[0])

    model = StatefulModel(init, stateful) if buffers else Model(init, stateless)
    return model, params, buffers


def to_module(params: Tree, module: nn.Module, buffers: Tree | None = None) -> nn.Module:
    """Copy a module with other parameters and buffers, as `load_state_dict` does.

    The module itself is not changed, and the copy owns its memory. Parameters tied in `module` are
    tied in the copy; mode, `requires_grad` and hooks are those of `module`, dtypes and devices
    those of the values.

    Args:
        params: parameters with the paths of `from_module`.
        module: the module to copy.
        buffers: buffers with the paths of `from_module`; required if the module has buffers.

    Raises:
        TypeError: `module` is not an `nn.Module`, or a leaf is not a tensor.
        ValueError: paths or shapes differ from those of the module (each is listed).

    >>> net = torch.nn.Linear(3, 2)
    >>> model, params, _ = from_module(net)
    >>> to_module(tree.map(torch.zeros_like, params), net).bias
    Parameter containing:
    tensor([0., 0.], requires_grad=True)
    """
    _check_is_module(module, "to_module")
    return with_values("to_module", params, module, buffers)


def with_values(caller: str, params: Tree, module: nn.Module, buffers: Tree | None) -> nn.Module:
    """Copy a module with other values, as `to_module` does; `caller` begins error messages."""
    memo: dict[int, Any] = {}
    pairs: list[tuple[str, Tree, dict[str, Any]]] = [
        ("params", params, dict(module.named_parameters())),
        ("buffers", {} if buffers is None else buffers, dict(module.named_buffers())),
    ]
    for kind, values, own in pairs:
        leaves = flatten_dict(values)
        for path, x in leaves.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{caller}: {kind} at {path!r} must be a tensor, got {x!r}")
        _check_values(f"{caller}: {kind}", leaves, {path: x.shape for path, x in own.items()})
        for path, old in own.items():
            new = leaves[path].detach().clone()
            is_parameter = isinstance(old, nn.Parameter)
            memo[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
    return copy.deepcopy(module, memo)


class _Shell(nn.Module):
    """Wrap a module so that it also returns its buffers after the call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        """Call the module."""
        params = dict(self.module.named_parameters())
        y = self.module(*inputs, **options)
        for path, p in self.module.named_parameters():
            if params.get(path) is not p:
                raise ValueError(f"apply: the forward replaces the parameter {path!r}")
        return y, dict(self.module.named_buffers())


def _shell(module: nn.Module, train: bool) -> nn.Module:
    """Copy a module without its values; tied tensors stay tied."""
    stand_ins: dict[int, Any] = {
        id(x): torch.empty_like(x, device="meta") for x in module.buffers()
    } | {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in module.parameters()}
    shell = _Shell(copy.deepcopy(module, stand_ins))
    # Submodules in eval mode within a training module are frozen: keep the flags.
    return shell if train and module.training else shell.train(train)


def _copies(buffers: dict[str, Tensor], others: Any) -> dict[str, Tensor]:
    """Copy buffers; under `vmap` they get the axes of all values that may be written to them."""
    copies = {path: x.clone() for path, x in buffers.items()}
    if not (others and copies and under_vmap()):
        return copies
    # A 0 made from a tensor has its axes of `vmap`.
    leaves = [x for x in tree.leaves(others) if isinstance(x, Tensor)]
    return {
        path: sum((x.new_zeros((), dtype=copy.dtype) for x in leaves), copy)
        for path, copy in copies.items()
    }


def _nested(flat: Mapping[str, Tensor]) -> Tree:
    return unflatten_dict(flat) if flat else {}


def _shapes(values: Tree) -> dict[str, torch.Size]:
    return {path: x.shape for path, x in flatten_dict(values).items()}


def _check_is_module(module: Any, caller: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{caller}: module must be an nn.Module, got {module!r}")


def _check_module(module: nn.Module) -> None:
    """Raise unless a module can be called as a pure function."""
    _check_is_module(module, "from_module")
    lines: list[str] = []
    devices: dict[torch.device, str] = {}
    for path, part in module.named_modules():
        where = f"{path or 'the module itself'} ({type(part).__name__})"
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(f"from_module: {where} is TorchScript; pass its nn.Module")
        if any(getattr(part, hooks) for hooks in _HOOKS):
            lines.append(
                f"{where}: has hooks, which may have side effects; remove them (replace "
                "nn.utils.weight_norm and spectral_norm by those of nn.utils.parametrizations)"
            )
        for name, x in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if nn.parameter.is_lazy(x):
                lines.append(f"{where}: {name} is lazy; call the module once with an example")
            devices.setdefault(x.device, join(path, name))
    if len(devices) > 1:
        on = ", ".join(f"{path} on {device}" for device, path in devices.items())
        lines.append(f"tensors are on {len(devices)} devices: {on}; move them to one")
    if lines:
        raise ValueError("from_module: cannot take this module:\n  " + "\n  ".join(lines))


def _check_values(
    what: str, leaves: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    lines = [f"{path}: expected {list(expected[path])}, got nothing"
             for path in expected if path not in leaves]  # fmt: skip
    for path, x in leaves.items():
        if path not in expected:
            lines.append(f"{path}: expected nothing, got {x if x is None else list(x.shape)}")
        elif x.shape != expected[path]:
            lines.append(f"{path}: expected {list(expected[path])}, got {list(x.shape)}")
    if lines:
        raise ValueError(f"{what} do not match the module:\n  " + "\n  ".join(sorted(lines)))


@contextmanager
def _recording(shell: nn.Module, record: Record | None) -> Iterator[None]:
    """Record what submodules return, for `nn.capture`; the second call of one adds `_1`."""
    calls: Counter[str] = Counter()

    def hook(path: str, part: nn.Module, inputs: Any, y: Any) -> None:
        number, calls[path] = calls[path], calls[path] + 1
        # A copy, because a module after this one may write to it, as ReLU(inplace=True) does.
        y = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, y)
        record(f"{path}_{number}" if number else path, y)  # type: ignore[misc]

    handles = [
        part.register_forward_hook(partial(hook, path.removeprefix("module.")))
        for path, part in shell.named_modules()
        if record is not None and path not in ("", "module")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unchanged(shell: nn.Module) -> Iterator[None]:
    """Restore attributes that a forward has set, and raise: they would be hidden state."""
    before = [(path, part, dict(vars(part))) for path, part in shell.named_modules()]
    # Attributes of torch's modules, such as the list of an LSTM's weights, are set at each call.
    users = {path for path, part, _ in before if not type(part).__module__.startswith("torch.")}
    contents = [
        (path, name, value, value.copy())
        for path, _, attributes in before
        for name, value in attributes.items()
        if path in users and isinstance(value, list | dict | set) and name not in _OF_MODULES
    ]
    changed = []
    try:
        yield
    finally:
        for path, part, attributes in before:
            now = vars(part)
            names = [name for name in now if now[name] is not attributes.get(name, now)]
            for name in names:
                del now[name]
            now.update(attributes)
            if path in users:
                changed += [f"{_inside(path)} sets its attribute {name!r}" for name in names]
        for path, name, value, old in contents:
            if not _holds_the_same(value, old):
                value.clear()
                value.extend(old) if isinstance(value, list) else value.update(old)
                changed.append(f"{_inside(path)} changes the content of its attribute {name!r}")
    if changed:
        raise ValueError(
            "apply: a forward may change only buffers (register_buffer), which apply "
            "returns:\n  " + "\n  ".join(changed)
        )


def _holds_the_same(now: Any, old: Any) -> bool:
    if isinstance(now, dict):
        return list(now) == list(old) and _holds_the_same([*now.values()], [*old.values()])
    if isinstance(now, set):  # a copy may have another order
        return now == old
    return len(now) == len(old) and all(map(operator.is_, now, old))


def _tensors_held(shell: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are plain attributes, by path."""
    return {
        f"{path}.{name}".removeprefix("module").removeprefix("."): value
        for path, part in shell.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }


_OF_MODULES = frozenset(vars(nn.Module()))  # attributes of every module: hooks, parameters


@contextmanager
def _own_cache() -> Iterator[None]:
    """Hide the cache of a caller's `parametrize.cached()` from the call."""
    theirs = parametrize._cache
    parametrize._cache = {}
    try:
        yield
    finally:
        parametrize._cache = theirs


def _inside(path: str) -> str:
    return path.removeprefix("module").removeprefix(".") or "the module itself"


def _whereabouts(error: Exception, shell: nn.Module) -> str:
    """Name the submodule that an error comes from: the innermost with a running method."""
    names = {id(part): path for path, part in shell.named_modules()}
    whereabouts = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        part = frame.f_locals.get("self")
        if id(part) in names:
            whereabouts = f"in {_inside(names[id(part)])} ({type(part).__name__})"
    return whereabouts
