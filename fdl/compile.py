"""`jit` and `scan`: the one place that knows `torch.compile`.

`scan(f, init, xs)` is a loop written as a function, `jit(fn)` compiles a pure function of trees.
Together they turn a whole epoch of training into one program:

    epoch = fdl.jit(lambda state, batches: fdl.scan(step, state, batches))

`scan` itself stands in `_scan.py`.
"""

import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import accumulate
from typing import Any, NoReturn, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import _inductor, tree
from fdl._scan import form, in_transform, scan
from fdl._trace import Traced, check_tensors, is_tracing, nodes_of, results_of, trace
from fdl.tree import Tree

__all__ = ["disable_jit", "jit", "scan"]

F = TypeVar("F", bound=Callable[..., Any])
Program = Callable[[list[Tensor]], Tree]

aten = torch.ops.aten

_disabled: ContextVar[bool] = ContextVar("fdl_disabled", default=False)


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


class _Donated(Tensor):
    """What becomes of a donated tensor: any use of it raises."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise RuntimeError(
            "this tensor was donated to a jitted function (fdl.jit(..., donate=...)), which may "
            "have reused its memory: use the value that the function returned instead"
        )


def jit(fn: F, *, donate: int | Sequence[int] = ()) -> F:
    """Compile a pure function of trees of tensors; equals `fn` to rounding.

    Each structure, shape, stride, dtype and device of the arguments gets a program of its own,
    compiled at the first call. As with `jax.jit`, `fn` is traced, not run: what depends on
    Python values is decided once per program, so numbers that change must be tensors. Inside
    another `jit` or a `torch.func` transformation, `fn` is inlined.

    Args:
        fn: a pure function; every leaf of its arguments and of its result is a tensor.
        donate: positions of arguments whose memory the program may take: results are written right
            there where forms agree and nothing else refers to it. Using a donated tensor afterwards
            raises.

    Returns:
        A function with the signature of `fn`. Its results never share memory with arguments.

    Raises:
        TypeError: an argument or the result holds a leaf that is not a tensor (at call).
        ValueError: `donate` names an absent argument, or a tensor is donated and also passed
            elsewhere (at call).

    >>> double = jit(lambda params: {"w": params["w"] * 2})
    >>> with disable_jit():                     # a doctest need not wait for the compiler
    ...     double({"w": torch.ones(2)})
    {'w': tensor([2., 2.])}
    """
    positions = (donate,) if isinstance(donate, int) else tuple(donate)
    programs: dict[Any, Program] = {}

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        # While Dynamo traces there is nothing to look up, and a ContextVar it could not read.
        if torch.compiler.is_compiling() or _runs_inline():
            return fn(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        check_tensors(leaves, (args, kwargs), "jit: every leaf of an argument")
        donated = _donated_indices(args, leaves, positions)
        key = (spec, form(leaves), torch.is_grad_enabled())
        given = [leaves[i] for i in donated]
        for i in donated:
            if not _is_all_of_its_memory(leaves[i]):
                leaves[i] = leaves[i].clone()  # only the copy may be written to
        if key in programs:
            result = programs[key](leaves)
        else:
            programs[key], result = _build(fn, leaves, spec, donated)
        for leaf in given:
            leaf.data = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            leaf.__class__ = _Donated
        return result

    return call  # type: ignore[return-value]


def _runs_inline() -> bool:
    off = _disabled.get() or os.environ.get("FDL_JIT") == "0"
    return off or is_tracing() or in_transform()


def _donated_indices(
    args: tuple[Any, ...], leaves: list[Tensor], positions: tuple[int, ...]
) -> list[int]:
    """Say which leaves are given away; raise if one is needed elsewhere."""
    if not positions:
        return []
    if not all(0 <= i < len(args) for i in positions):
        raise ValueError(
            f"jit: donate={positions} must be positions of the {len(args)} arguments passed"
        )
    ends = list(accumulate(len(tree.leaves(arg)) for arg in args))
    donated = [j for i in positions for j in range(ends[i] - len(tree.leaves(args[i])), ends[i])]
    times = Counter(leaf.untyped_storage()._cdata for leaf in leaves)
    if any(times[leaves[i].untyped_storage()._cdata] > 1 for i in donated):
        raise ValueError(
            "jit: a donated tensor is passed twice, or shares memory with another argument; it "
            "cannot be given away and kept, so clone it"
        )
    return donated


def _is_all_of_its_memory(leaf: Tensor) -> bool:
    """Say whether no view, no base and no NumPy array could see a change."""
    storage = leaf.untyped_storage()
    alone = 2  # the tensor and the Python object above
    return (
        storage.nbytes() == leaf.nbytes
        and storage.resizable()  # memory of others is not
        and torch._C._storage_Use_Count(storage._cdata) == alone
    )


def _build(
    fn: Callable[..., Any], leaves: list[Tensor], spec: pytree.TreeSpec, donated: list[int]
) -> tuple[Program, Tree]:
    """Make the program for one form of arguments, the fastest that works, and run it once."""
    on_cuda = any(leaf.is_cuda for leaf in leaves)
    if not on_cuda and not _inductor.finds_compiler():

        def run_eagerly(leaves: list[Tensor]) -> Tree:
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            return fn(*args, **kwargs)

        return run_eagerly, run_eagerly(leaves)
    traced = trace(fn, leaves, spec)
    home = _homes(leaves, donated, traced.results)
    _write_home(traced, home)
    inputs = [node.meta["val"] for node in nodes_of(traced.graph.graph, "placeholder")]
    compiled = _inductor.lower(traced.graph, traced.mode, inputs)

    def run(leaves: list[Tensor]) -> Tree:
        fresh = iter(compiled([*leaves, *traced.constants]))
        results = [
            leaves[home[out]].detach() if out in home else next(fresh)
            for out in range(len(traced.results))
        ]
        return pytree.tree_unflatten(results, traced.spec)

    return run, run(leaves)


def _write_home(traced: Traced, home: dict[int, int]) -> None:
    """Write results where donated leaves were: Inductor computes them right there."""
    graph = traced.graph.graph
    arguments, results = nodes_of(graph, "placeholder"), results_of(graph)
    (output,) = nodes_of(graph, "output")
    with graph.inserting_before(output):
        for out, i in home.items():
            copy = graph.call_function(aten.copy_.default, (arguments[i], results[out]))
            copy.meta["val"] = arguments[i].meta["val"]
    output.args = ([node for out, node in enumerate(results) if out not in home],)
    traced.graph.recompile()


def _homes(leaves: list[Tensor], donated: list[int], outputs: Sequence[Tensor]) -> dict[int, int]:
    """Give each result the memory of a donated leaf of its form, as long as there are some."""
    free: dict[Any, list[int]] = defaultdict(list)
    for i in donated:
        if not leaves[i].requires_grad:
            free[leaves[i].shape, leaves[i].dtype, leaves[i].device].append(i)
    found = {}
    for out, result in enumerate(outputs):
        same = free[result.shape, result.dtype, result.device]
        if same:
            found[out] = same.pop(0)
    return found
