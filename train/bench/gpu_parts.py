"""The parts of `make gpu`: their commands, and how to read what they wrote."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fdl import data
from train.bench import record
from train.bench.client import ROOT

__all__ = ["Part", "parts", "read_benchmark", "read_json", "read_tests", "test_files"]

Record = dict[str, Any]
# The tests that tell most come first: if time runs out, they have run.
TELLING = ("train/test_recipes.py", "compiler/test_cuda_graphs.py", "random/test_samplers.py")
WORKLOADS = ("lenet", "mlp", "softmax", "linreg")
RUNNERS = ("fdl-scan", "eager", "compile-step-graphs", "jax-scan")
MOST_TESTERS = 4  # processes that share the GPU
# A line of pytest -v, alone or with pytest-xdist.
ALONE = re.compile(r"^(?P<test>\S+::.+?) (?P<fate>PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
SHARED = re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<fate>[A-Z]+) (?P<test>\S+::.+)$")


class Part(NamedTuple):
    """A part of the run: a command, and how to read what it wrote."""

    name: str
    share: int  # of the time
    command: list[str]
    codes: tuple[int, ...]  # exit codes of a part that ran to its end
    # Returns the entries `result`, `wrong` and `not_run`; raises OSError or ValueError for nothing.
    read: Callable[[Path], Record]


def parts(folder: Path, rehearse: bool) -> list[Part]:
    """List the parts in their order.

    Args:
        folder: where they write.
        rehearse: run on the CPU with tiny sizes.
    """
    device = "cpu" if rehearse else "cuda"
    images = "sample" if rehearse else found_data()
    python = [sys.executable, "-m"]
    bench = [*python, "train", "bench", "--device", device, "--data", images, "--no-warm-starts"]
    bench += ["--workloads", *WORKLOADS, "--out", str(folder / "benchmark.json")]
    kernels = [*python, "train.bench.kernels", "--device", device]
    kernels += ["--out", str(folder / "kernels.json")]
    population = [*python, "train.bench.speed_population", "--device", device]
    population += ["--models", "lenet", "--ways", "one model", "vmap, one order"]
    population += ["--out", str(folder / "population.json")]
    if rehearse:
        bench += ["--runners", "fdl-eager", "eager", "--rounds", "1", "--steps", "2"]
        bench += ["--seconds", "0.01"]
        kernels += ["--workloads", "linreg"]
        population += ["--members", "2", "--rounds", "1", "--steps", "1"]
    else:
        bench += ["--runners", *RUNNERS, "--rounds", "3"]
        kernels += ["--workloads", *WORKLOADS]
        population += ["--members", "64"]
    return [
        Part("tests", 6, [*python, "pytest", *test_options(), *test_files()], (0, 1), read_tests),
        Part("benchmark", 9, bench, (0,), read_benchmark),
        Part("kernels", 3, kernels, (0,), partial(read_json, "kernels.json")),
        Part("population", 2, population, (0,), partial(read_json, "population.json")),
    ]


def found_data() -> str:
    """Choose the whole of Fashion-MNIST if the parts, which run in ROOT, find it, or the sample."""
    try:
        with chdir(ROOT):
            data.fashion_mnist(download=False)
    except (OSError, ValueError):
        return "sample"
    return "auto"


def test_options() -> list[str]:
    """Return pytest's options, with more than one process if pytest-xdist is installed."""
    options = ["-v", "--tb=short", "-m", "cuda", "-p", "no:cacheprovider"]
    processes = min(MOST_TESTERS, (os.cpu_count() or 1) // 4)
    shared = processes > 1 and find_spec("xdist") is not None
    return [*options, "-n", str(processes)] if shared else options


def test_files(tests: Path = ROOT / "tests") -> list[str]:
    """List the files with tests marked `cuda`, those that tell most first."""
    marked = [path for path in tests.rglob("test_*.py") if "mark.cuda" in path.read_text()]
    first = [tests / name for name in TELLING if tests / name in marked]
    return [str(path.relative_to(ROOT)) for path in [*first, *sorted(set(marked) - set(first))]]


def read_tests(folder: Path) -> Record:
    """Count the tests in the log by their fate; those that failed are wrong."""
    text = (folder / "tests.log").read_text(errors="replace")
    fates: dict[str, str] = {}
    for line in text.splitlines():
        if match := ALONE.match(line) or SHARED.match(line):
            fates[match["test"].strip()] = match["fate"].lower()
    selected = re.search(r"(\d+) selected|\[(\d+) items?\]", text)
    if not fates and selected is None:
        raise ValueError(f"no test was found: {text.strip()[-200:]}")
    counts = {fate: list(fates.values()).count(fate) for fate in sorted(set(fates.values()))}
    reasons = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    failed = [test for test, fate in fates.items() if fate in ("failed", "error")]
    expected = int(selected[1] or selected[2]) if selected else None
    return {"result": {"selected": expected, "counts": counts}, "wrong": reasons or failed}


def read_benchmark(folder: Path) -> Record:
    """Read the benchmark; a runner that is wrong or failed is wrong."""
    document = record.read(folder / "benchmark.json")
    wrong = [
        f"{workload['name']}, {runner['name']}: {runner['status']}: {runner.get('reason', '')}"
        for workload in document["workloads"]
        for runner in workload["runners"]
        if runner["status"] in ("wrong", "failed")
    ]
    names = [workload["name"] for workload in document["workloads"]]
    not_run = [name for name in WORKLOADS if name not in names]
    return {"result": document, "wrong": wrong, "not_run": not_run}


def read_json(name: str, folder: Path) -> Record:
    """Read the list of results that a part wrote."""
    return {"result": json.loads((folder / name).read_text())}
