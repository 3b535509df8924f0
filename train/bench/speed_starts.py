"""Time how programs start: `python -m train.bench.speed_starts`.

Seconds of a whole process up to its first result, without the import of torch or JAX: first with
empty caches, then in a second process. Rounds are interleaved; the figures are medians.
`python -m train bench --render` then makes the table in docs/benchmark.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fdl import data
from train.bench import registry, task
from train.bench.client import RunnerError, environment, run_module
from train.bench.config import Bench
from train.bench.record import cpu_model, installed
from train.bench.workloads import RECIPES, Workload, make_task
from train.records import to_json

__all__ = ["WAYS", "main", "markdown"]

RESULT = Path("docs/starts.json")  # from the root of the repository
STEPS = 20  # of an epoch
WAYS = {
    "fdl-step": "`fdl.jit(step)`",
    "fdl-scan": "`fdl.jit(scan(step))`",
    "compile-step": "`torch.compile(step)`",
    "compile-model": "`torch.compile(model)`",
    "jax-step": "`jax.jit(step)`",
    "jax-scan": "`jax.jit(scan(step))`",
}
OF_TASKS = ("linreg", "softmax", "mlp", "dropout", "lenet")
PROGRAMS = {
    "module_batch_norm": "CNN with batch norm",
    "module_transformer": "transformer block",
    "char_gru": "GRU, 40 steps by `scan`",
    "variational_autoencoder": "variational autoencoder",
    "kalman": "Kalman filter",
}
Record = dict[str, Any]


def measure(names: list[str], ways: list[str], rounds: int, folder: Path) -> list[Record]:
    """Time every way of every program; a way that fails has no times, and a reason."""
    cells: list[Record] = [
        {"name": name, "way": way, "what": what, "cold": [], "again": []}
        for name, what in inputs(names, folder)
        for way in ways
        if not what.startswith("program:") or way in ("fdl-step", "compile-step")
        if not registry.missing(way)  # type: ignore[arg-type]
    ]
    for number in range(rounds):
        for cell in cells:
            place = folder / f"{number}-{cell['name']}-{cell['way']}"
            for start in ("cold", "again"):
                if "reason" not in cell:
                    add_start(cell, start, environment("cpu", torch.get_num_threads(), place))
            print(f"round {number + 1}: {line(cell)}"[:79], flush=True)
    return [{k: v for k, v in cell.items() if k != "what"} for cell in cells]


def inputs(names: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Write the tasks, and yield each name with what its process is told."""
    images = data.fashion_mnist_sample()
    for name in names:
        if name in PROGRAMS:
            yield name, f"program:{name}"
            continue
        path = folder / f"{name}.npz"
        config = Bench(steps=STEPS)
        task.save(make_task(Workload(name, *RECIPES[name], False), config, images, "cpu"), path)
        yield name, str(path)


def add_start(cell: Record, start: str, env: dict[str, str]) -> None:
    """Time one process."""
    began = time.time()
    try:
        printed = run_module("train.bench.start", cell["way"], cell["what"], env=env)
    except RunnerError as error:
        cell["reason"] = str(error)
        return
    answer = json.loads(printed.splitlines()[-1])
    cell[start].append(answer["end"] - began - answer["not_counted"])


def line(cell: Record) -> str:
    """Describe the times of a cell so far."""
    return f"{cell['name']}, {cell['way']}: {cell.get('reason') or figures(cell)}"


def figures(cell: Record) -> str:
    """Format the medians, cold and again.

    >>> figures({"cold": [3.0, 5.0, 4.04], "again": [0.5]})
    '4.0, 0.5'
    """
    return ", ".join(f"{statistics.median(cell[start]):.1f}" for start in ("cold", "again"))


def markdown(document: Record) -> str:
    """Make the table: a row for each program, a column for each way."""
    cells = {(cell["name"], cell["way"]): cell for cell in document["starts"]}
    names = list(dict.fromkeys(name for name, _ in cells))
    ways = [way for way in WAYS if any(other == way for _, other in cells)]
    rows = [["seconds: cold, again", *(WAYS[way] for way in ways)], ["---"] * (len(ways) + 1)]
    for name in names:
        row = [PROGRAMS.get(name, name)]
        for way in ways:
            cell = cells.get((name, way))
            row.append("" if cell is None else "failed" if "reason" in cell else figures(cell))
        rows.append(row)
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items() if v)
    rounds = document["rounds"]
    head = (
        f"{document['cpu']}, {document['cores']} cores; {versions}; {document['date']}; "
        f"{'one round' if rounds == 1 else f'medians of {rounds} rounds'}."
    )
    return f"{head}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measure the given programs, and write the result."""
    every = [*OF_TASKS, *PROGRAMS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("programs", nargs="*", metavar="program", help=f"of {', '.join(every)}")
    args = parser.parse_args()
    names = args.programs or every
    if unknown := set(names).difference(every):
        parser.error(f"unknown programs: {', '.join(sorted(unknown))}")
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        starts = measure(names, args.ways, args.rounds, Path(folder))
    document = {
        "date": date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {name: installed(name) for name in ("torch", "jax", "fdl")},
        "rounds": args.rounds,
        "starts": starts,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(to_json(document, indent=1) + "\n")
    print(f"\n{markdown(document)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
