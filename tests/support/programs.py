"""The programs in `tests/programs`: their form, and the ways in which each is run."""

import contextlib
import functools
import importlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

import fdl
from fdl import tree

FOLDER = Path(__file__).parents[1] / "programs"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith(("_", "test_")))
TOLERANCES = {  # relative and absolute
    torch.float64: (1e-9, 1e-11),
    torch.complex128: (1e-9, 1e-11),
    torch.float32: (1e-5, 1e-6),
    torch.complex64: (1e-5, 1e-6),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (2e-2, 1e-2),
}


class Program(NamedTuple):
    """A user's step, what it starts from, and how it runs.

    Attributes:
        step: `(state, row) -> (state, y)`, trees of tensors; it may close over anything.
        init: makes the first state.
        xs: makes 4 to 8 rows, stacked.
        route: the route in the report of every jitted form.
        differentiable: the forms with gradients are tested.
        vmap: why `torch.vmap` refuses the step eagerly; empty if it accepts it.
        fullgraph: a part of the error with which `torch.compile(fullgraph=True)` refuses the step;
            empty if it accepts it.
        rtol, atol: tolerances instead of those in TOLERANCES.
        faults: what is wrong with a form (a name in FORMS) until it is cured; its tests are strict
            xfails, which do not run if it starts with "crash". A fault of Inductor's alone is at
            "inductor: " and the form.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    init: Callable[[], Any]
    xs: Callable[[], Any]
    route: str = "one program"
    differentiable: bool = True
    vmap: str = ""
    fullgraph: str = ""
    rtol: float | None = None
    atol: float | None = None
    faults: dict[str, str] = {}  # noqa: RUF012


def load(name: str) -> Program:
    return importlib.import_module(f"tests.programs.{name}").PROGRAM


def rows(xs: Any) -> Iterator[Any]:
    """The rows of a tree of stacked tensors."""
    leaves, spec = pytree.tree_flatten(xs)
    for row in zip(*(leaf.unbind(0) for leaf in leaves), strict=True):
        yield pytree.tree_unflatten(row, spec)


def loop(step: Callable[[Any, Any], Any], state: Any, xs: Any) -> tuple[Any, Any]:
    """What `fdl.scan` computes, written as a user would without it: the oracle."""
    ys = []
    for row in rows(xs):
        state, y = step(state, row)
        ys.append(y)
    return state, stack(ys)


def stack(trees: list[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def is_float(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def total(results: Any) -> Tensor:
    """The sum of all real numbers in a result, in float64."""
    value = torch.zeros((), dtype=torch.float64)
    for leaf in filter(is_float, tree.leaves(results)):
        real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        value = value + real.double().sum()
    return value


def split(state: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The leaves of a state that have gradients, and how to put others in their places."""
    leaves, spec = pytree.tree_flatten(state)

    def join(floats: list[Tensor]) -> Any:
        rest = iter(floats)
        return pytree.tree_unflatten([next(rest) if is_float(x) else x for x in leaves], spec)

    return [leaf for leaf in leaves if is_float(leaf)], join


def gradients(run: Callable[[Any], Any], state: Any) -> list[Tensor]:
    """Gradients of the total of a result, by torch.autograd."""
    floats, join = split(state)
    floats = [leaf.detach().clone().requires_grad_() for leaf in floats]
    grads = torch.autograd.grad(total(run(join(floats))), floats, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(floats, grads, strict=True)]


def grad_of(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], list[Tensor]]:
    """The same gradients, by torch.func."""

    def grad(state: Any, x: Any) -> list[Tensor]:
        floats, join = split(state)
        return torch.func.grad(lambda floats: total(run(join(floats), x)))(floats)

    return grad


# A form computes (results, expected results). `jit` is fdl.jit, and remembers what it jitted.
Form = Callable[[Program, Callable[..., Any]], tuple[Any, Any]]


def _step(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    state, row = program.init(), next(rows(program.xs()))
    return jit(program.step)(state, row), program.step(state, row)


def _donated(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    step, state = jit(program.step, donate_argnums=0), tree.map(torch.clone, program.init())
    ys = []
    for row in rows(program.xs()):
        state, y = step(state, row)
        ys.append(y)
    return (state, stack(ys)), loop(program.step, program.init(), program.xs())


def _scan(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    state, xs = program.init(), program.xs()
    run = jit(lambda state, xs: fdl.scan(program.step, state, xs))
    return run(state, xs), loop(program.step, state, xs)


def _unrolled(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    state, xs = program.init(), tree.map(lambda leaf: torch.cat([leaf, leaf]), program.xs())
    run = jit(lambda state, xs: fdl.scan(program.step, state, xs))
    with patch("fdl._compiler._scan_traced.MAX_UNROLL", 2):  # a loop of two steps a turn
        return run(state, xs), loop(program.step, state, xs)


def _grad(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    state, row = program.init(), next(rows(program.xs()))
    expected = gradients(lambda state: program.step(state, row), state)
    return jit(grad_of(program.step))(state, row), expected


def _grad_of_scan(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    state, xs = program.init(), program.xs()
    expected = gradients(lambda state: loop(program.step, state, xs), state)
    return jit(grad_of(lambda s, xs: fdl.scan(program.step, s, xs)))(state, xs), expected


def _backward(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    state, xs = program.init(), program.xs()
    run = jit(lambda state, xs: fdl.scan(program.step, state, xs))
    expected = gradients(lambda state: loop(program.step, state, xs), state)
    return gradients(lambda state: run(state, xs), state), expected


def _two_states(program: Program) -> list[Any]:
    return [program.init(), program.step(program.init(), next(rows(program.xs())))[0]]


def _vmap(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    states, row = _two_states(program), next(rows(program.xs()))
    expected = stack([program.step(state, row) for state in states])
    return jit(torch.vmap(program.step, (0, None)))(stack(states), row), expected


def _vmap_of_scan(program: Program, jit: Callable[..., Any]) -> tuple[Any, Any]:
    states, xs = _two_states(program), program.xs()
    expected = stack([loop(program.step, state, xs) for state in states])
    run = jit(torch.vmap(lambda state, xs: fdl.scan(program.step, state, xs), (0, None)))
    return run(stack(states), xs), expected


FORMS: dict[str, Form] = {
    "step": _step,
    "donated": _donated,
    "scan": _scan,
    "unrolled": _unrolled,
    "grad": _grad,
    "grad of scan": _grad_of_scan,
    "backward": _backward,
    "vmap": _vmap,
    "vmap of scan": _vmap_of_scan,
}


def forms(program: Program) -> list[str]:
    """The forms in which a program can be run."""
    left_out = ("grad", "backward") if not program.differentiable else ()
    left_out += ("vmap",) if program.vmap else ()
    return [form for form in FORMS if not form.startswith(left_out)]


@functools.cache
def turn() -> int:
    """A number that changes with every change of the library, and is the same until then."""
    sources = sorted(Path(fdl.__file__).parent.rglob("*.py"))
    return zlib.crc32(b"".join(path.read_bytes() for path in sources))


def check_equal(program: Program, actual: Any, expected: Any) -> None:
    """Fail unless structure, shapes, dtypes, NaNs and, to rounding, values are equal."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    got, wanted = tree.flatten_dict([actual]), tree.leaves(expected)
    for (path, leaf), other in zip(got.items(), wanted, strict=True):
        rtol, atol = TOLERANCES.get(other.dtype, (0.0, 0.0))
        if other.dtype in TOLERANCES:
            rtol = rtol if program.rtol is None else program.rtol
            atol = atol if program.atol is None else program.atol
        torch.testing.assert_close(
            leaf,
            other,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, path=path: f"result {path}: {text}",
        )


def leave_forward_mode() -> None:
    """Leave what Dynamo has entered and not left, where it refuses a function within a jvp."""
    eager_transforms.JVP_NESTING = 0
    forward_ad._current_level = -1
    # Dynamo's refusal may put back the Python level and not that of C++ below it.
    with contextlib.suppress(RuntimeError):
        torch._C._exit_dual_level(level=0)
    with forward_ad.dual_level():
        pass
