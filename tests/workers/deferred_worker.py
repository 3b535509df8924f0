"""What a process has imported after it has traced functions.

`python -m tests.workers.deferred_worker` prints a JSON object: what each case returned, or its
error. Each runs in a fork of a process that has imported torch and fdl, and nothing of torch's
compiler.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from threading import Barrier, Thread
from typing import Any

import torch
from torch import Tensor

from fdl._compiler._cache_key import name as cache_name
from fdl._compiler._deferred import Finder, StandIn
from fdl._compiler._settings import current_settings
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace
from tests.support.programs import load, rows

PROGRAMS = (
    "branches",
    "char_gru",
    "early_stop",
    "indexing_writes",
    "integers",
    "module_batch_norm",
)
X = torch.linspace(-1, 1, 6).reshape(2, 3)


def traced(fn: Callable[..., Any], *args: Any) -> str | None:
    """Trace a function, and return the name that its program has in the cache."""
    leaves, spec = flatten((args, {}))
    return cache_name(trace(fn, leaves, spec).graph, (), current_settings())


def imported() -> list[str]:
    """Return what of the compiler has been imported or replaced."""
    names = {"torch._dynamo", "torch._inductor"}
    found = [x.__name__ for x in tuple(sys.modules.values()) if isinstance(x, StandIn)]
    found += names & sys.modules.keys()
    return sorted([*found, *(["finder"] if Finder in sys.meta_path else [])])


def program(name: str) -> Any:
    """Trace a program without and with Dynamo."""
    case = load(name)
    state, row = case.init(), next(rows(case.xs()))
    first, after = traced(case.step, state, row), imported()
    import torch._dynamo
    import torch._inductor  # noqa: F401

    return [after, first is not None and first == traced(case.step, state, row)]


def asked_for() -> Any:
    """Import a module of Dynamo in the middle of a trace, below transformations."""

    def loss(x: Tensor) -> Tensor:
        y = x.sin()
        import torch._dynamo.utils

        torch._dynamo.utils.is_compile_supported("cpu")
        return (y * x).sum()

    def fn(x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(loss))(x)

    with torch.device("cpu"):
        first = traced(fn, X)
    module = sys.modules["torch._dynamo.utils"]
    compiled = torch.compile(lambda x: torch.func.grad(lambda x: (x.sin() * x).sum())(x))
    expected = X.cos() * X + X.sin()
    return [
        imported(),
        module is torch._dynamo.utils,
        type(getattr(module.__spec__, "loader", None)).__name__,
        first == traced(fn, X),
        torch.allclose(compiled(X), expected),
    ]


def attribute() -> Any:
    """Ask for an attribute of Dynamo while a function is traced."""

    def fn(x: Tensor) -> Tensor:
        return x + torch._dynamo.is_compiling()

    return [traced(fn, X) == traced(fn, X), imported()]


def missing() -> Any:
    """Import what does not exist."""

    def fn(x: Tensor) -> Tensor:
        import_module("torch._dynamo.no_such_module")
        return x

    return traced(fn, X)


def thread() -> Any:
    """Import the compiler in another thread while a function is traced."""
    seen: list[Any] = []

    def work() -> None:
        import torch._dynamo.source
        import torch._inductor.config as config

        seen.append([torch._dynamo.source.LocalSource.__name__, config.max_autotune])

    def fn(x: Tensor) -> Tensor:
        other = Thread(target=work)
        other.start()
        y = x.exp()
        other.join()
        return y

    traced(fn, X)
    return [imported(), seen]


def set_in_a_trace() -> Any:
    """Change a setting of the compiler while a function is traced."""

    def fn(x: Tensor) -> Tensor:
        import torch._inductor.config as config

        config.size_asserts = False
        return x.exp()

    traced(fn, X)
    return [imported(), sys.modules["torch._inductor.config"].size_asserts]


def side_by_side() -> Any:
    """Trace in two threads, of which one ends first."""
    barrier, names = Barrier(2), []

    def fn(x: Tensor) -> Tensor:
        barrier.wait(60)
        return x.exp() * x

    def work(wait: bool) -> None:
        names.append(traced(lambda x: fn(x).sum() if wait else fn(x), X))

    threads = [Thread(target=work, args=(wait,)) for wait in (True, False)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return [None not in names, imported()]


def failing() -> Any:
    """Raise in a trace."""

    def fn(x: Tensor) -> Tensor:
        raise ZeroDivisionError(len(x))

    try:
        traced(fn, X)
    except ZeroDivisionError as error:
        return [str(error), imported()]


def nothing_kept() -> Any:
    """Look for functions that torch would not let Dynamo skip."""
    from torch.fx.experimental import proxy_tensor

    skipped: Any = proxy_tensor.dispatch_trace
    before = traced(lambda x: x * 2, X)
    kept = hasattr(skipped.__wrapped__, "__dynamo_disable")
    import torch._dynamo
    import torch._inductor  # noqa: F401

    after = traced(lambda x: x * 2, X)
    return [kept, hasattr(skipped.__wrapped__, "__dynamo_disable"), before == after]


def planned() -> Any:
    """Try an eager step of a recipe, as `train` does before it compiles; later take gradients."""
    from train import planning, recipes
    from train.config import Softmax

    config = Softmax(data="sample", compile="on")
    problem, state, _ = recipes.set_up(config, torch.device("cpu"))
    planning.make_plan(problem, config, state)
    after = imported()
    gradient = torch.func.grad(lambda x: x.exp().sum())(X)
    compiled = torch.compile(lambda x: x.exp())
    return [after, torch.equal(gradient, X.exp()), torch.allclose(compiled(X), gradient)]


ALONE = (
    asked_for,
    attribute,
    missing,
    thread,
    set_in_a_trace,
    side_by_side,
    failing,
    nothing_kept,
    planned,
)
CASES: dict[str, Callable[[], Any]] = {
    **{name: partial(program, name) for name in PROGRAMS},
    **{case.__name__: case for case in ALONE},
}


def results() -> Iterator[tuple[str, Any]]:
    """Run the cases."""
    for name, case in CASES.items():
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                result = case()
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            os.write(writer, json.dumps(result).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            yield name, json.loads(file.read() or "null")
        os.wait()


if __name__ == "__main__":
    loaded = imported()
    print(json.dumps({"loaded": loaded, **dict(results())}))
