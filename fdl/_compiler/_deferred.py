"""Trace without importing Dynamo and Inductor, which torch imports to trace and hardly uses.

Their import takes more than two seconds, longer than all the rest of a start with a program from
the cache. While a function is traced, stand-ins take the place of these modules and have the few
attributes that are asked for. Whoever needs more, in any thread, makes them go: the modules are
then imported where they are needed. Once they are imported nothing is deferred any more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pkgutil import resolve_name
from threading import RLock
from types import ModuleType
from typing import Any, cast

from torch import Tensor
from torch._C import _len_torch_function_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import Source
from torch._subclasses.fake_tensor import is_fake
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

from fdl._torch_compat import RELEASE

DYNAMO, INDUCTOR = "torch._dynamo", "torch._inductor"
HAS_CACHE = RELEASE >= (2, 12)  # otherwise every process compiles, and imports both anyway

# Torch's settings, as they are unless somebody has imported and changed them.
DYNAMO_SETTINGS = {
    "fake_tensor_cache_enabled": True,
    "fake_tensor_cache_crosscheck_enabled": False,
    "_custom_ops_profile": None,
}
INDUCTOR_SETTINGS = {"emulate_precision_casts": False, "fallback_random": False}

_lock = RLock()
_users = 0  # traces that are running
_undecorated: list[Callable[..., Any]] = []  # functions that Dynamo has not been told to skip


class StandIn(ModuleType):
    """A module or class with a few attributes; for any other, the real one is imported."""

    def __init__(self, name: str, **attributes: Any) -> None:
        super().__init__(name)
        vars(self).update(attributes, __path__=[])  # nothing is found there: see `Finder`

    def add(self, name: str, **attributes: Any) -> StandIn:
        """Add a stand-in for a part of the module."""
        return vars(self).setdefault(name, StandIn(f"{self.__name__}.{name}", **attributes))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # somebody looks at all modules
            raise AttributeError(f"module {self.__name__!r} has not been imported yet")
        with _importing():
            return getattr(resolve_name(self.__name__), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):  # Python's own
            super().__setattr__(name, value)
        else:
            with _importing():
                setattr(resolve_name(self.__name__), name, value)


class ConstantSource(Source):
    """Where a tensor comes from that no argument leads to; its name may be part of a message."""

    def __init__(self, source_name: str) -> None:
        self.source_name = source_name

    @property
    def name(self) -> str:
        """Return the name."""
        return self.source_name


# Kinds of sources that only Dynamo makes, of which there are none.
SOURCES = {
    name: type(name, (Source,), {})
    for name in ("RandomValueSource", "FloatTensorSource", "CallMethodItemSource")
}


class Finder:
    """Finds the other modules of the two packages, which need the real package."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """Import a module and the package around it, if the package is replaced by a stand-in."""
        if not name.startswith((f"{DYNAMO}.", f"{INDUCTOR}.")) or path is None or len(path):
            return None
        with _importing():
            return ModuleSpec(name, Imported(import_module(name)))


class Imported(Loader):
    """The loader of a module that has been imported already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is."""
        module.__spec__ = self.spec


@contextmanager
def deferred_imports() -> Iterator[None]:
    """Use stand-ins for Dynamo and Inductor in the context, unless these have been imported."""
    global _users
    if HAS_CACHE and not _are_imported():
        # Torch's tracer reads its classes as attributes, and relies on Dynamo to import them.
        import torch._higher_order_ops.triton_kernel_wrap  # noqa: F401
    with _lock:
        defers = HAS_CACHE and (_users > 0 or not _are_imported())
        if defers and _users == 0:
            _install()
        _users += defers
    try:
        yield
    finally:
        if defers:
            with _lock:
                _users -= 1
                if _users == 0:
                    _remove()


def _are_imported() -> bool:
    return bool({DYNAMO, INDUCTOR} & sys.modules.keys())


def _install() -> None:
    dynamo = StandIn(DYNAMO, disable=_disable)
    dynamo.add("config", **DYNAMO_SETTINGS)
    dynamo.add("compiled_autograd", _disable=nullcontext)
    dynamo.add("source", ConstantSource=ConstantSource, **SOURCES)
    dynamo.add("utils", clone_input=_clone_input)
    inductor = StandIn(INDUCTOR)
    config = {"effective_provenance_tracking_level": _nothing, **INDUCTOR_SETTINGS}
    inductor.add("config", **config).add("trace", provenance_tracking_level=0)  # torch 2.13's
    inductor.add("compiler_bisector").add("CompilerBisector", disable_subsystem=_nothing)
    inductor.add("codecache").add("PyCodeCache", stack_frames_for_code=_nothing)
    inductor.add("fx_passes").add("dedupe_symint_uses", dedupe_symints=_dedupe_symints)
    _register(dynamo)
    _register(inductor)
    sys.meta_path.insert(0, cast(Any, Finder))


def _register(module: StandIn) -> None:
    sys.modules[module.__name__] = module
    for value in vars(module).values():
        if isinstance(value, StandIn):
            _register(value)


def _remove() -> None:
    for name, module in tuple(sys.modules.items()):
        if isinstance(module, StandIn):
            del sys.modules[name]
    with suppress(ValueError):  # they have gone already
        sys.meta_path.remove(cast(Any, Finder))
    while _undecorated:
        with suppress(AttributeError):
            del cast(Any, _undecorated.pop()).__dynamo_disable


def _disable(fn: Callable[..., Any], recursive: bool = True, **options: Any) -> Callable[..., Any]:
    """Return a function that Dynamo need not skip, since it is not running."""
    _undecorated.append(fn)  # torch keeps the result as an attribute of it
    return fn


def _clone_input(x: Tensor) -> Tensor:
    """Copy the argument of a loop."""
    if is_fake(x):
        return x
    with _importing():
        clone = resolve_name(f"{DYNAMO}.utils:clone_input")
    return cast(Tensor, clone(x))


def _dedupe_symints(graph: Graph) -> None:
    """Compute equal numbers that are not known before a call once, if there are any."""
    if any(isinstance(node.meta.get("val"), py_sym_types) for node in graph.nodes):
        with _importing():
            dedupe = resolve_name(f"{INDUCTOR}.fx_passes.dedupe_symint_uses:dedupe_symints")
        dedupe(graph)


def _nothing(*args: Any) -> None:
    """Answer that nothing was compiled, no provenance is tracked, no pass bisected."""


@contextmanager
def _importing() -> Iterator[None]:
    """Remove the stand-ins; in the context nothing is active in this thread."""
    with _lock:
        _remove()
    with temporarily_clear_interpreter_stack(), _disable_current_modes(), _no_function_modes():
        yield


@contextmanager
def _no_function_modes() -> Iterator[None]:
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
