"""The process of one start: `python -m train.bench.start WAY WHAT`.

WHAT is the file of a task, or `program:` and a name in `tests/programs`. It prints when the first
result was there, and how long the imports took that do not count: those of torch or JAX, and those
of the benchmark.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["main"]

GRU_STEPS = 40


def main() -> None:
    """Import, compute the first result, and print when that was done."""
    way, what = sys.argv[1:]
    took = _import(["jax", "optax"] if way.startswith("jax") else ["torch"])
    if way.startswith("fdl"):
        _import(["fdl"])
    kind, _, name = what.partition(":")
    if kind == "program":
        took += _import(["fdl", "tests.support.programs", f"tests.programs.{name}"])
        _step(way, name)
    else:
        took += _import(["train.bench.task", f"train.bench.{RUNNERS_IN[way.partition('-')[0]]}"])
        _train(way, Path(what))
    end = time.time()
    from train.records import to_json

    print(to_json({"end": end, "not_counted": took}), flush=True)
    if way.startswith("fdl"):  # what is compiled in the background is not to slow the next start
        from fdl._compiler import _dispatch

        _dispatch.wait()


RUNNERS_IN = {"fdl": "fdl_runners", "compile": "torch_peers", "jax": "jax_peers"}


def _import(modules: list[str]) -> float:
    """Import modules, and return the seconds taken."""
    began = time.perf_counter()
    for module in modules:
        import_module(module)
    return time.perf_counter() - began


def _train(way: Any, path: Path) -> None:
    """Make the first call of a runner."""
    from train.bench import registry, task

    registry.build(way, task.load(path)).first()


def _step(way: str, name: str) -> None:
    """Make the first step of a program."""
    import torch

    import fdl
    from tests.support.programs import load, rows

    program = load(name)
    step: Any = fdl.jit(program.step) if way == "fdl-step" else torch.compile(program.step)
    row = next(rows(program.xs()))
    if name == "char_gru":
        row = row[:1].repeat(GRU_STEPS + 1, 1)
    _, y = step(program.init(), row)
    fdl.tree.leaves(y)[0].sum().item()


if __name__ == "__main__":
    main()
