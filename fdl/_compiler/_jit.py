"""`jit`: a cache of programs, one for each signature of the arguments."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fdl._compiler._backward import differentiable, pullback
from fdl._compiler._closure import Sources
from fdl._compiler._donation import donated_indices, give_away, own_memory, take_back
from fdl._compiler._inductor import kernels_written
from fdl._compiler._routes import Program, Refused, Route, build
from fdl._compiler._settings import Ambient, ambient, are_watched, changes, has_grad
from fdl._compiler._signature import flatten, form, paths
from fdl._modes import in_transform, is_tracing
from fdl.tree._checks import check_tensors
from fdl.tree._summary import dtype_name

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

_Key = tuple[Hashable, tuple[Any, ...], Ambient]  # structure, forms of leaves, settings

_disabled: ContextVar[bool] = ContextVar("fdl_disabled", default=False)


class Report(NamedTuple):
    """What one program of a jitted function is.

    >>> fn = jit(lambda x: x + 1)
    >>> fn.report()                             # nothing is compiled before the first call
    ()
    """

    why: str  # why it was made: what is new in the form of the arguments
    route: str  # how it runs: "one program", "CUDA graph", …
    seconds: float  # it took to trace and compile, the first run included
    kernels: int  # that the compiler wrote; those of a loop's body count once
    graphs: int  # CUDA graphs: one, but for loops that are too long, and where there is no GPU
    memory: int  # bytes that they keep for its arguments, results and in between
    fallbacks: tuple[str, ...]  # why it runs no faster way
    closed_over: tuple[str, ...] = ()  # names of the tensors that it reads beside its arguments


class Jitted(Protocol[P, R]):
    """A function made by `jit`.

    >>> fn: Jitted = jit(lambda x: x + 1)
    >>> with disable_jit():
    ...     fn(torch.tensor(1))
    tensor(2)
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the program for the form of these arguments."""

    def report(self) -> tuple[Report, ...]:
        """Say what each program is, in the order in which they were made."""


@contextmanager
def disable_jit() -> Iterator[None]:
    """Run jitted functions eagerly inside the `with` block, to step through them in a debugger.

    The environment variable `FDL_JIT=0` does the same for a whole process.

    >>> with disable_jit():
    ...     jit(lambda x: x + 1)(torch.tensor(1))
    tensor(2)
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def jit(
    fn: Callable[P, R], *, donate: int | Sequence[int] = (), strict: bool = False
) -> Jitted[P, R]:
    """Compile a pure function of trees of tensors; equals `fn` to rounding.

    Each structure, shape, stride, dtype and device of the arguments gets a program of its own,
    compiled at the first call; so does each state of torch's settings (autocast, default dtype and
    device, grad mode, …). As with `jax.jit`, `fn` is traced, not run: what depends on Python values
    is decided once per program, so numbers that change must be tensors. Inside another `jit` or a
    `torch.func` transformation, `fn` is inlined; `backward()` through its result runs a jitted
    function as well. Tensors that `fn` closes over are looked up by their names at each call; none
    may be changed in place but those that `fn` makes, and `fn` may keep none.

    On the CPU all of `fn`, its scans included, is one program. On CUDA it is one CUDA graph: a scan
    of a whole epoch is launched by a single call.

    Args:
        fn: a pure function; every leaf of its arguments and its result is a tensor. Random numbers
            come from keys.
        donate: positions of arguments whose memory the program may take: results are written right
            there where forms agree and nothing else refers to it. Using a donated tensor afterwards
            raises, also after a call that failed or was interrupted while the program ran.
        strict: raise where a program would run in a slower way than this, rather than warn.

    Returns:
        A function with the signature of `fn`, and with `report()`. Its results never share memory
        with arguments.

    Raises:
        TypeError: an argument or the result holds a leaf that is not a tensor (at call).
        ValueError: `donate` names an absent argument, a tensor is donated and also passed or
            closed over, something is donated though an argument requires grad, `fn` closes over a
            tensor that requires grad, changes in place what it has not made, keeps a tensor after
            it returned, or draws from torch's generator (at call).
        NotImplementedError: an argument is a DTensor that requires grad (at call).
        RuntimeError: a slower way was to be taken, and `strict` (at call).

    >>> double = jit(lambda params: {"w": params["w"] * 2})
    >>> with disable_jit():                     # a doctest need not wait for the compiler
    ...     double({"w": torch.ones(2)})
    {'w': tensor([2., 2.])}
    """
    positions = (donate,) if isinstance(donate, int) else tuple(donate)
    made: dict[_Key, list[_Made]] = {}  # several where what is closed over had several forms
    records: list[_Made] = []
    backwards: dict[Any, Any] = {}
    donated_in: dict[Hashable, list[int]] = {}  # which leaves, by structure

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        # While Dynamo traces there is nothing to look up, and a ContextVar it could not read.
        if torch.compiler.is_compiling() or _runs_inline():
            return fn(*args, **kwargs)
        leaves, spec = flatten((args, kwargs))
        _check_arguments(fn, leaves, args, kwargs)
        state = ambient()
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            return with_backward(leaves, spec, state)
        if not positions:
            return run(leaves, spec, state)
        if spec not in donated_in:
            donated_in[spec] = donated_indices(args, positions)
        return run(leaves, spec, state, donated_in[spec])

    def run(
        leaves: list[Tensor], spec: Hashable, state: Ambient, donated: Sequence[int] = ()
    ) -> Any:
        given = [leaves[i] for i in donated]
        own_memory(leaves, donated)
        if any(leaf.is_neg() or leaf.is_conj() for leaf in leaves):  # signs yet to be applied
            leaves = [leaf.resolve_neg().resolve_conj() for leaf in leaves]
        key = (spec, form(leaves), state)
        for record in made.get(key, ()):
            constants = record.sources.read()
            if constants is not None and form(constants) == record.constants:
                _check_closed_over(constants, leaves, donated, has_grad(state))
                return _execute(record.program, leaves, constants, donated, given)
        return first_run(key, leaves, donated, given)

    def first_run(
        key: _Key, leaves: list[Tensor], donated: Sequence[int], given: list[Tensor]
    ) -> Any:
        spec, _, state = key
        start, kernels, route = time.perf_counter(), kernels_written(), Route(fn, strict)
        with torch.set_grad_enabled(has_grad(state)):  # inside backward() it is off
            program = build(fn, leaves, spec, donated, route)
        sources = Sources(fn, program.constants)
        _check_closed_over(sources.tensors, leaves, donated, has_grad(state))
        result = _execute(program, leaves, sources.tensors, donated, given)
        seconds, written = time.perf_counter() - start, kernels_written() - kernels
        why = _why(key, [record.key for record in records])
        record = _Made(key, program, sources, form(sources.tensors), why, route, seconds, written)
        made.setdefault(key, []).append(record)
        records.append(record)
        return result

    def with_backward(leaves: list[Tensor], spec: Hashable, state: Ambient) -> Any:
        if positions:
            raise ValueError(
                "jit: nothing can be donated where an argument requires grad, since backward() "
                "needs the arguments; detach them, or take gradients inside with torch.func.grad"
            )
        wanted = tuple(i for i, leaf in enumerate(leaves) if leaf.requires_grad)
        which = (spec, wanted, state)
        if which not in backwards:
            backwards[which] = jit(pullback(fn, spec, wanted, state), strict=strict)
        return differentiable(partial(run, spec=spec, state=state), backwards[which], leaves)

    def report() -> tuple[Report, ...]:
        own = [record.report() for record in records]
        behind = [r for backward in backwards.values() for r in backward.report()]
        return (*own, *(r._replace(why=f"backward: {r.why}") for r in behind))

    jitted = cast(Any, call)
    jitted.report = report
    return cast(Jitted[P, R], jitted)


class _Made(NamedTuple):
    """A program, and what there is to say of it."""

    key: _Key
    program: Program
    sources: Sources  # of what it closes over
    constants: tuple[Any, ...]  # their forms
    why: str
    route: Route
    seconds: float
    kernels: int

    def report(self) -> Report:
        return Report(
            self.why,
            self.route.name,
            self.seconds,
            self.kernels,
            *self.program.kept_graphs(),
            tuple(self.route.fallbacks),
            tuple(self.sources.names()),
        )


def _execute(
    program: Program,
    leaves: list[Tensor],
    constants: Sequence[Tensor],
    donated: Sequence[int],
    given: Sequence[Tensor],
) -> Any:
    """Run a program; what it may write to is given away first, should it be interrupted."""
    if not program.writes:
        result = program.run(leaves, constants)
        for leaf in given:
            give_away(leaf)
        return result
    kinds = [type(leaf) for leaf in given]
    for i, leaf in zip(donated, given, strict=True):
        if leaves[i] is leaf:
            leaves[i] = leaf.detach()
        give_away(leaf)
    try:
        return program.run(leaves, constants)
    except Refused:  # which happens before anything is written
        for i, leaf, kind in zip(donated, given, kinds, strict=True):
            take_back(leaf, kind, leaves[i])
        raise


def _check_closed_over(
    constants: Sequence[Tensor], leaves: Sequence[Tensor], donated: Sequence[int], watched: bool
) -> None:
    """Raise if what a function closes over is given away by this call, or needs a gradient."""
    if constants and donated:
        taken = {leaves[i].untyped_storage()._cdata for i in donated}
        if any(leaf.untyped_storage()._cdata in taken for leaf in constants):
            raise ValueError("jit: a donated tensor is also closed over by the function; clone it")
    if watched and any(leaf.requires_grad for leaf in constants):
        raise ValueError(
            "jit: the function closes over a tensor that requires grad, which backward() would not "
            "reach; pass it as an argument, detach it, or call under torch.no_grad()"
        )


def _why(key: _Key, earlier: Sequence[_Key]) -> str:
    """Say what is new in a form of arguments, compared with the last one."""
    if not earlier:
        return "the first call"
    if key in earlier:
        return "what the function closes over has another form"
    spec, forms, state = key
    last_spec, last_forms, last_state = earlier[-1]
    if spec != last_spec:
        return "another structure of the arguments"
    changed = [
        f"{path}: {_describe(new)}, was {_describe(old)}"
        for path, new, old in zip(paths(spec), forms, last_forms, strict=True)
        if new != old
    ]
    return "; ".join(changed + changes(state, last_state))


def _describe(form: tuple[Any, ...]) -> str:
    shape, stride, dtype, device = form
    return f"{dtype_name(dtype)}{list(shape)}, strides {list(stride)}, {device}"


def _runs_inline() -> bool:
    off = _disabled.get() or os.environ.get("FDL_JIT") == "0"
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return off or is_tracing() or in_transform() or forward_mode or are_watched()


def _check_arguments(
    fn: Callable[..., Any], leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return
    try:
        named: Any = inspect.signature(fn).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature, or one that they do not fit
        named = (args, kwargs)
    check_tensors(leaves, named, "jit: every leaf of an argument")
