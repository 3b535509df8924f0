"""`jit` and `scan`: the one place that knows `torch.compile`.

`scan(f, init, xs)` is a loop written as a function, `jit(fn)` compiles a pure function of trees.
Together they turn a whole epoch of training into one program:

    epoch = fdl.jit(lambda state, batches: fdl.scan(step, state, batches))

How a `scan` runs depends on where it is called:

- eagerly, or under a `torch.func` transformation: a Python loop;
- inside `jit` on the CPU: torch's `scan` operator, so that Inductor emits the loop itself;
- inside `jit` on CUDA, or where the operator refuses: a loop over a compiled body.
"""

from __future__ import annotations  # Dynamo cannot trace the annotations of inner functions

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import FunctionType
from typing import Any, NoReturn, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._higher_order_ops.scan import scan as _scan_operator
from torch._subclasses import FakeTensorMode

from fdl import tree
from fdl.tree import Tree

__all__ = ["disable_jit", "jit", "scan"]

Carry = TypeVar("Carry")
F = TypeVar("F", bound=Callable[..., Any])


class _Abstract:
    """The state of one abstract evaluation: did `fn` call `scan`?"""

    scans = False


class _Bodies(dict[Any, Callable[..., Any]]):
    """The compiled bodies of the scans of one program, where its loops run in Python."""


_running: ContextVar[_Abstract | _Bodies | None] = ContextVar("fdl_running", default=None)
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_transform() -> bool:
    """Say whether a torch.func transformation is active, also while Dynamo traces one."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def scan(
    f: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    xs: Tree = (),
    *,
    length: int | None = None,
) -> tuple[Carry, Tree]:
    """Fold `f` over the first axis of `xs`: `carry, y = f(carry, x)`; equals `jax.lax.scan`.

    Args:
        f: a pure function `(carry, x) -> (carry, y)`. The carry keeps its structure, shapes and
            dtypes. `y` is any tree of tensors, `()` for none.
        init: the first carry, a tree of tensors.
        xs: a tree of tensors with one common first axis; step `i` sees `leaf[i]`.
        length: the number of steps; needed only where `xs` has no leaves.

    Returns:
        The last carry, and the `y`s stacked along a new first axis.

    Raises:
        ValueError: `xs` has no common first axis, or `f` changed the form of the carry (every
            path is listed).

    >>> scan(lambda total, x: (total + x, total), torch.tensor(0), torch.arange(4))
    (tensor(6), tensor([0, 0, 1, 3]))
    """
    length = _scan_length(xs, length)
    if _in_transform():  # the operator has no rules for grad, vmap and jvp
        return _scan_as_loop(f, init, xs, length)
    if torch.compiler.is_compiling():
        return _scan_as_operator(f, init, xs, length)
    running = _running.get()
    if isinstance(running, _Abstract):
        running.scans = True
        return _scan_abstractly(f, init, xs, length)
    if isinstance(running, _Bodies):
        f = _compiled_body(f, running)
    return _scan_as_loop(f, init, xs, length)


def _scan_length(xs: Tree, length: int | None) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in tree.leaves(xs)}
    if length is not None:
        lengths.add(length)
    if len(lengths) != 1 or None in lengths:
        found = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(xs).items()}
        raise ValueError(
            f"scan: xs needs one common first axis (length={length}), got shapes {found}"
        )
    (steps,) = lengths
    if not steps:
        raise ValueError("scan: needs at least one step, got none")
    return steps


def _row(xs: Tree, i: int) -> Tree:
    return tree.map(lambda leaf: leaf[i], xs)


def _check_carry(init: Tree, carry: Tree) -> list[Tensor]:
    """Return the leaves of `carry` in the order of `init`, having compared their forms."""
    found = tree.match(init, carry, "scan: the carry that f returned")
    for before, after in zip(tree.leaves(init), found, strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            lines = tree.diff(init, carry, values=False)
            raise ValueError(
                "scan: f must return a carry of the form it was given:\n  " + "\n  ".join(lines)
            )
    return found


def _scan_as_loop(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    carry, ys = init, []
    for i in range(length):
        new, y = f(carry, _row(xs, i))
        spec = pytree.tree_structure(init)
        carry = pytree.tree_unflatten(_check_carry(carry, new), spec)
        ys.append(y)
    return carry, tree.map(lambda *rows: torch.stack(rows), *ys)


def _scan_abstractly(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    new, y = f(init, _row(xs, 0))
    carry = pytree.tree_unflatten(_check_carry(init, new), pytree.tree_structure(init))
    return carry, tree.map(lambda leaf: leaf.new_empty((length, *leaf.shape)), y)


def _scan_as_operator(
    f: Callable[..., Any], init: Tree, xs: Tree, length: int
) -> tuple[Tree, Tree]:
    # The operator takes flat lists only, and its body may have no side effects, so the structure
    # of y has to be known beforehand: trace f once more. Inductor drops that unused copy.
    init_leaves, carry_spec = pytree.tree_flatten(init)
    xs_leaves, x_spec = pytree.tree_flatten(xs)
    y_spec = pytree.tree_structure(f(init, _row(xs, 0))[1])
    # It also wants at least one tensor to carry and one to run along.
    idle = torch.zeros(length, dtype=torch.bool, device=(init_leaves + xs_leaves)[0].device)

    def body(carry: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        carry, x = carry[: carry_spec.num_leaves], x[: x_spec.num_leaves]
        new, y = f(pytree.tree_unflatten(carry, carry_spec), pytree.tree_unflatten(x, x_spec))
        outputs = tree.match(pytree.tree_unflatten(carry, carry_spec), new, "scan")
        # Outputs must not alias inputs (unchanged leaves do), and strides must be stable.
        return [_fresh(leaf) for leaf in outputs or [idle[0]]], [
            _fresh(leaf) for leaf in tree.leaves(y)
        ]

    carry, ys = _scan_operator(
        body, [_fresh(leaf) for leaf in init_leaves or [idle[0]]], xs_leaves or [idle]
    )
    carry = carry[: carry_spec.num_leaves]
    return pytree.tree_unflatten(carry, carry_spec), pytree.tree_unflatten(ys, y_spec)


def _fresh(leaf: Tensor) -> Tensor:
    return leaf.clone(memory_format=torch.contiguous_format)


def _call_flat(
    f: Callable[..., Any], spec: pytree.TreeSpec, leaves: list[Tensor]
) -> tuple[Any, Any]:
    carry, x = pytree.tree_unflatten(leaves, spec)
    return f(carry, x)


def _compiled_body(f: Callable[..., Any], bodies: _Bodies) -> Callable[..., Any]:
    """Compile the body of a loop; Dynamo's guards recognise `f` by its code when it comes again.

    A `lambda` inside a jitted function is a new object at each call, and what it closes over may
    be an argument of that call; Dynamo reads closed-over tensors anew each time.
    """
    code = getattr(f, "__code__", f)

    def body(carry: Tree, x: Tree) -> tuple[Tree, Tree]:
        leaves, spec = pytree.tree_flatten((carry, x))
        key = (code, spec, _form(leaves))
        if key not in bodies:
            bodies[key] = _compile(_call_flat)
        return bodies[key](f, spec, leaves)

    return body


def _form(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in leaves)


def _compile(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with a code object of its own: Dynamo's limit of 8 recompilations counts per code.

    The C++ wrapper halves the cost of a step of a small model, and works with `scan` from torch
    2.12 on.
    """
    assert isinstance(fn, FunctionType)
    own = FunctionType(
        fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False, options=_options())


def _options() -> dict[str, Any]:
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return {"cpp_wrapper": True} if release >= (2, 12) else {}


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
        donate: positions of arguments whose memory the program may take. Using a donated tensor
            afterwards raises.

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
    programs: dict[Any, Callable[[list[Tensor]], Tree]] = {}

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        # While Dynamo traces there is nothing to look up, and a ContextVar it could not read.
        if torch.compiler.is_compiling() or _runs_inline():
            return fn(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        _check_tensors(leaves, (args, kwargs), "argument")
        donated = _donated_leaves(args, leaves, positions)
        form = (spec, _form(leaves), torch.is_grad_enabled())
        if form not in programs:
            programs[form] = _build(fn, leaves, spec)
        result = programs[form](leaves)
        for leaf in donated:
            leaf.data = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            leaf.__class__ = _Donated
        return result

    return call  # type: ignore[return-value]


def _runs_inline() -> bool:
    off = _disabled.get() or os.environ.get("FDL_JIT") == "0"
    return off or _running.get() is not None or _in_transform()


def _check_tensors(leaves: list[Any], whole: Tree, what: str) -> None:
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return
    pairs, _ = pytree.tree_flatten_with_path(whole)
    found = [f"{tree.dotted(p)}: {leaf!r}" for p, leaf in pairs if not isinstance(leaf, Tensor)]
    raise TypeError(
        f"jit: every leaf of an {what} must be a tensor; wrap numbers in torch.tensor, close over "
        "what is constant. Not tensors:\n  " + "\n  ".join(found)
    )


def _donated_leaves(
    args: tuple[Any, ...], leaves: list[Tensor], positions: tuple[int, ...]
) -> list[Tensor]:
    if not positions:
        return []
    if not all(0 <= i < len(args) for i in positions):
        raise ValueError(
            f"jit: donate={positions} must be positions of the {len(args)} arguments passed"
        )
    donated = [leaf for i in positions for leaf in tree.leaves(args[i])]
    times = [id(leaf) for leaf in leaves]
    if any(times.count(id(leaf)) > 1 for leaf in donated):
        raise ValueError(
            "jit: a donated tensor is passed twice; it cannot be given away and kept, so clone it"
        )
    return donated


def _build(
    fn: Callable[..., Any], leaves: list[Tensor], spec: pytree.TreeSpec
) -> Callable[[list[Tensor]], Tree]:
    """Make the program for one form of arguments: try the fastest way, then the next."""
    abstract, out_spec, aliases = _evaluate_abstractly(fn, leaves, spec)

    def flat(*leaves: Tensor) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        outputs = tree.leaves(fn(*args, **kwargs))
        return [leaf.clone() if i in aliases else leaf for i, leaf in enumerate(outputs)]

    compiled = _compile(flat)
    bodies = _Bodies()

    def run_compiled(leaves: list[Tensor]) -> Tree:
        return pytree.tree_unflatten(compiled(*leaves), out_spec)

    def run_bodies(leaves: list[Tensor]) -> Tree:
        token = _running.set(bodies)
        try:
            return pytree.tree_unflatten(flat(*leaves), out_spec)
        finally:
            _running.reset(token)

    if abstract.scans and any(leaf.is_cuda for leaf in leaves):
        return run_bodies
    try:
        run_compiled(leaves)
    except TorchDynamoException as error:
        if not abstract.scans:
            raise
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"jit: torch's scan operator refused {fn!r}; each step is compiled instead, in a "
            f"Python loop. The reason was: {reason}",
            stacklevel=3,
        )
        return run_bodies
    return run_compiled


def _evaluate_abstractly(
    fn: Callable[..., Any], leaves: list[Tensor], spec: pytree.TreeSpec
) -> tuple[_Abstract, pytree.TreeSpec, set[int]]:
    """Run `fn` on fake tensors, which have a form and no values.

    Mistakes in `fn` surface here as ordinary exceptions instead of from within the tracer.

    Returns:
        Whether `fn` calls `scan`, the structure of its result, and which of the result's leaves
        share memory with an argument.
    """
    abstract = _Abstract()
    token = _running.set(abstract)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(leaf) for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(fakes, spec)
            result = fn(*args, **kwargs)
    finally:
        _running.reset(token)
    outputs, out_spec = pytree.tree_flatten(result)
    _check_tensors(outputs, result, "result of the function, and of an argument,")
    taken = {fake.untyped_storage()._cdata for fake in fakes}
    aliases = {i for i, out in enumerate(outputs) if out.untyped_storage()._cdata in taken}
    return abstract, out_spec, aliases
