"""`jit`: a cache of programs, one for each signature of the arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import takewhile
from threading import RLock
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fdl import tree
from fdl._checks import check_function
from fdl._compiler import _dispatch
from fdl._compiler._backward import differentiable, pullback
from fdl._compiler._closure import Sources, check_closed_over
from fdl._compiler._donation import (
    as_positions,
    copy_if_shared,
    donated_indices,
    invalidate,
    revalidate,
)
from fdl._compiler._garbage import fewer_collections
from fdl._compiler._interrupt import INTACT
from fdl._compiler._nans import check_result, watching
from fdl._compiler._program import Program
from fdl._compiler._routes import Route, Times, build
from fdl._compiler._settings import Settings, changes, current_settings, has_active_mode, has_grad
from fdl._compiler._signature import (
    check_arguments,
    flatten,
    paths,
    resolved,
    runs_in_python,
    signature,
    unordered,
)
from fdl._compiler._tracebacks import shorten
from fdl._modes import disabled, in_transform, is_tracing
from fdl.tree._summary import dtype_name

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

_Key = tuple[Hashable, tuple[Any, ...], Settings]  # structure, signature of the leaves, settings

one_at_a_time = RLock()  # torch's tracers and its compiler keep state of the process


class Report(NamedTuple):
    """How `jit` compiled one program, and how it runs: an element of `Jitted.report()`.

    Attributes:
        why: why the program was compiled: the first call, or what was new about the arguments,
            torch's settings or the closed-over tensors.
        route: how it runs: `"one program"` or `"CUDA graph"`, or a slower way: `"compiled loop
            bodies"`, `"compiled pieces"`, `"CUDA graphs of loops"`, `"compiled"` (without a graph),
            `"eager"`.
        seconds: time to trace, compile and run it the first time.
        kernels: kernels that Inductor generated, also in attempts that failed; those of a loop body
            count once.
        graphs: CUDA graphs; 0 on the CPU.
        memory: bytes that the CUDA graphs keep between calls.
        fallbacks: why it does not run in a faster way, with the path of a log if torch's compiler
            failed; empty if it runs in the fastest.
        closed_over: names of the tensors that it reads besides its arguments.
        cached: the program was loaded from the cache on disk.
        times: the parts of `seconds`: `trace`, `compile`, `load` (look the program up on disk, or
            wait for another process that compiles it) and `run`, the first run.
        regions: parts of the program, around convolutions on a CPU, that are computed for a few
            images at a time, while these are in the processor's cache.
        left_out: why a convolution is in none of them, with its shapes.

    >>> fn = jit(lambda x: x + 1)
    >>> fn.report()                             # nothing is compiled before the first call
    ()
    >>> Report._fields[:3]
    ('why', 'route', 'seconds')
    """

    why: str
    route: str
    seconds: float
    kernels: int
    graphs: int
    memory: int
    fallbacks: tuple[str, ...]
    closed_over: tuple[str, ...] = ()
    cached: bool = False
    times: Times = Times()
    regions: int = 0
    left_out: tuple[str, ...] = ()


class Jitted(Protocol[P, R]):
    """The type of a function that `jit` returns: callable like the original, with `report()`.

    >>> fn: Jitted = jit(lambda x: x + 1)
    >>> with disable_jit():
    ...     fn(torch.tensor(1))
    tensor(2)
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the program for the structure, shapes, dtypes and devices of these arguments."""

    def report(self) -> tuple[Report, ...]:
        """Return a `Report` for each compiled program, oldest first, backward passes last.

        >>> jit(lambda x: x + 1).report()
        ()
        """


@contextmanager
def disable_jit() -> Iterator[None]:
    """Run jitted functions eagerly inside the `with` block, to step through them in a debugger.

    The environment variable `FDL_JIT=0` does the same for a whole process.

    >>> with disable_jit():
    ...     jit(lambda x: x + 1)(torch.tensor(1))
    tensor(2)
    """
    token = disabled.set(True)
    try:
        yield
    finally:
        disabled.reset(token)


def jit(
    fn: Callable[P, R], *, donate_argnums: int | Sequence[int] = (), strict: bool = False
) -> Jitted[P, R]:
    """Compile a pure function of trees of tensors; equals `fn` to rounding.

    One program is compiled at the first call for each structure, shape, stride, dtype and device of
    the arguments, and for each state of torch's settings (autocast, default dtype and device, grad
    mode, …). As with `jax.jit`, `fn` is traced: Python values are fixed when a program is compiled,
    so numbers that change must be tensors. Inside another `jit` or a `torch.func` transformation,
    `fn` is inlined; `backward()` through its result runs a jitted function too. Closed-over tensors
    are looked up by name at each call. `fn` must not change a tensor in place that it did not
    create, nor keep a tensor after it returns.

    On the CPU all of `fn`, scans included, is one program. On CUDA it is one CUDA graph: a single
    call launches a scan of a whole epoch.

    Args:
        fn: a pure function; every leaf of its arguments and its result is a tensor. Random numbers
            come from keys.
        donate_argnums: position or positions of arguments whose memory the program may reuse for
            results of the same shape, dtype and device, as in `jax.jit`. Using a donated tensor
            afterwards raises, even after a call that failed. After Ctrl-C in a compiled loop the
            arguments are valid, and as they were.
        strict: raise instead of warning if a program would run in a slower way than this.

    Returns:
        A function with the signature of `fn`, and with `report()`. Its results never share memory
        with its arguments.

    Raises:
        TypeError: `fn` is not a function, or `donate_argnums` not a position or positions; an
            argument or the result holds a leaf that is not a tensor (at call).
        ValueError: `donate_argnums` is out of range, a donated tensor is also passed elsewhere or
            closed over, something is donated although an argument requires grad, or `fn` closes
            over a tensor that requires grad, changes a tensor in place that it did not create,
            keeps a tensor after it returned, or draws from torch's generator (at call).
        NotImplementedError: an argument is a DTensor that requires grad (at call).
        RuntimeError: `strict`, and only a slower way is possible (at call).

    >>> double = jit(lambda params: {"w": params["w"] * 2})
    >>> with disable_jit():                     # a doctest need not wait for the compiler
    ...     double({"w": torch.ones(2)})
    {'w': tensor([2., 2.])}
    """
    check_function("jit", "fn", fn)
    argnums = as_positions(donate_argnums)
    cache: dict[_Key, list[_Entry]] = {}  # one entry for each signature of closed-over tensors
    entries: list[_Entry] = []  # all of the cache, oldest first
    backwards: dict[Any, Any] = {}
    donated_in: dict[Hashable, list[int]] = {}  # donated leaves, by structure
    known: list[Any] = []  # programs for `_dispatch.call_known`

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        # While Dynamo traces there is nothing to look up, and it cannot read a ContextVar.
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        try:
            result = _dispatch.call_known(known, args, kwargs)
            if result is NotImplemented and not _runs_inline():
                result = watched(args, kwargs) if watching.get() else dispatch(args, kwargs)
        except Exception as error:
            shorten(error)
            raise
        return fn(*args, **kwargs) if result is NotImplemented else result

    def watched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def eagerly() -> None:
            with disable_jit():
                fn(*args, **kwargs)

        copies = tree.map(Tensor.clone, args) if argnums else args  # those are used up
        result = dispatch(copies, kwargs)
        check_result(result, flatten((args, kwargs))[0], eagerly)
        return result

    def dispatch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = flatten((args, kwargs))
        check_arguments(fn, leaves, args, kwargs)
        if any(map(runs_in_python, leaves)):
            return fn(*args, **kwargs)
        settings = current_settings()
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            return with_backward(leaves, spec, settings)
        if not argnums:
            return run(leaves, spec, settings)
        if spec not in donated_in:
            donated_in[spec] = donated_indices(args, argnums)
        return run(leaves, spec, settings, donated_in[spec])

    def run(
        leaves: list[Tensor], spec: Hashable, settings: Settings, donated: Sequence[int] = ()
    ) -> Any:
        donated_leaves = [leaves[i] for i in donated]
        copy_if_shared(leaves, donated)
        leaves = resolved(leaves)
        key = (spec, signature(leaves), settings)
        for entry in cache.get(key, ()):
            closed_over = entry.sources.read()
            constants = closed_over and resolved(closed_over)
            if constants is not None and signature(constants) == entry.constants:
                check_closed_over(closed_over or (), leaves, donated, has_grad(settings))
                if not entry.known:
                    direct, read = entry.program.direct, entry.sources.read
                    new = _dispatch.prepare(direct, spec, leaves, constants, donated, read)
                    enlist(entry, new)
                return _execute(entry.program, leaves, constants, donated, donated_leaves)
        return first_run(key, leaves, donated, donated_leaves)

    def first_run(
        key: _Key, leaves: list[Tensor], donated: Sequence[int], donated_leaves: list[Tensor]
    ) -> Any:
        spec, _, settings = key
        with fewer_collections():
            _dispatch.start()
            route = Route(fn, strict)
            # Inside backward() grad mode is off.
            with one_at_a_time, torch.set_grad_enabled(has_grad(settings)):
                program = build(fn, leaves, spec, donated, route, in_other_order(spec, settings))
        sources = Sources(fn, program.constants)
        check_closed_over(sources.tensors, leaves, donated, has_grad(settings))
        constants = resolved(sources.tensors)
        new = _dispatch.prepare(program.direct, spec, leaves, constants, donated, sources.read)
        route.lap("load" if route.stored else "compile")
        result = _execute(program, leaves, constants, donated, donated_leaves)
        route.lap("run")
        entry = _Entry(
            key,
            program,
            sources,
            signature(constants),
            _why(key, [entry.key for entry in entries]),
            route,
            sum(route.times),
            [],
        )
        enlist(entry, new)
        cache.setdefault(key, []).append(entry)
        if route.name:  # else an earlier one is used
            entries.append(entry)
        return result

    def enlist(entry: _Entry, new: list[Any] | None) -> None:
        """Let `_dispatch` run a program, in the order of `run`: what closes over less fits too."""
        if new is None:
            return
        before = takewhile(lambda other: other is not entry, cache.get(entry.key, ()))
        in_order = len(known) < _dispatch.MOST and all(True in other.known for other in before)
        known.extend(new if in_order else ())
        entry.known.append(bool(new) and in_order)

    def in_other_order(spec: Hashable, settings: Settings) -> list[tuple[Hashable, Program]]:
        form = unordered(spec)
        like = [entry for entry in entries if entry.key[2] == settings]
        return [(e.key[0], e.program) for e in like if unordered(e.key[0]) == form]

    def with_backward(leaves: list[Tensor], spec: Hashable, settings: Settings) -> Any:
        if argnums:
            raise ValueError(
                "jit: nothing can be donated where an argument requires grad, since backward() "
                "needs the arguments; detach them, or take gradients inside with torch.func.grad"
            )
        wanted = tuple(i for i, leaf in enumerate(leaves) if leaf.requires_grad)
        backward_key = (spec, wanted, settings)
        if backward_key not in backwards:
            backwards[backward_key] = jit(pullback(fn, spec, wanted, settings), strict=strict)
        forward = partial(run, spec=spec, settings=settings)
        return differentiable(forward, backwards[backward_key], leaves)

    def report() -> tuple[Report, ...]:
        reports = [entry.report() for entry in entries]
        behind = [r for backward in backwards.values() for r in backward.report()]
        return (*reports, *(r._replace(why=f"backward: {r.why}") for r in behind))

    jitted = cast(Any, call)
    jitted.report = report
    return cast(Jitted[P, R], jitted)


class _Entry(NamedTuple):
    """A program in the cache, and what its report needs."""

    key: _Key
    program: Program
    sources: Sources  # of the tensors that it closes over
    constants: tuple[Any, ...]  # their signature
    why: str
    route: Route
    seconds: float
    known: list[bool]  # to `_dispatch`; empty until that is ready

    def report(self) -> Report:
        return Report(
            self.why,
            self.route.name,
            self.seconds,
            self.route.kernels,
            *self.program.kept_graphs(),
            tuple(self.route.fallbacks),
            tuple(self.sources.names()),
            self.route.stored,
            self.route.times,
            *self.route.regions,
        )


def _execute(
    program: Program,
    leaves: list[Tensor],
    constants: Sequence[Tensor],
    donated: Sequence[int],
    donated_leaves: Sequence[Tensor],
) -> Any:
    """Run a program. Tensors that it may write to are invalidated first: it may be interrupted."""
    if not program.writes:
        result = program.run(leaves, constants)
        for leaf in donated_leaves:
            invalidate(leaf)
        return result
    before = [(type(leaf), leaf.detach()) for leaf in donated_leaves]
    for i, leaf, (_, value) in zip(donated, donated_leaves, before, strict=True):
        if leaves[i] is leaf:  # not a copy
            leaves[i] = value
        invalidate(leaf)
    try:
        return program.run(leaves, constants)
    except BaseException as error:
        if not hasattr(error, INTACT):
            raise  # it may have been raised after something was written
        for leaf, (tensor_type, value) in zip(donated_leaves, before, strict=True):
            revalidate(leaf, tensor_type, value)
        raise


def _why(key: _Key, earlier: Sequence[_Key]) -> str:
    """Describe what is new about a call, compared with the last program."""
    if not earlier:
        return "the first call"
    if key in earlier:
        return "the closed-over tensors have another signature"
    spec, signatures, settings = key
    last_spec, last_signatures, last_settings = earlier[-1]
    if spec != last_spec:
        return "the arguments have another structure"
    changed = [
        f"{path}: {_describe(new)}, was {_describe(old)}"
        for path, new, old in zip(paths(spec), signatures, last_signatures, strict=True)
        if new != old
    ]
    return "; ".join(changed + changes(settings, last_settings))


def _describe(leaf_signature: tuple[Any, ...]) -> str:
    shape, stride, dtype, device = leaf_signature
    return f"{dtype_name(dtype)}{list(shape)}, strides {list(stride)}, {device}"


def _runs_inline() -> bool:
    off = disabled.get() or os.environ.get("FDL_JIT") == "0"
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return off or is_tracing() or in_transform() or forward_mode or has_active_mode()
