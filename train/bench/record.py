"""The JSON document of a benchmark, and the figures computed from raw measurements."""

from __future__ import annotations

import json
import os
import platform
import statistics
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fdl
from train.bench.task import Task
from train.bench.workloads import Workload
from train.records import to_json

__all__ = ["SCHEMA", "floor", "new_document", "new_workload", "read", "summarise", "write"]

SCHEMA = 2
Record = dict[str, Any]


def new_document(device: str, threads: int, rounds: int, rates: Record, data: str) -> Record:
    """Begin the document of a run."""
    return {
        "schema": SCHEMA,
        "date": date.today().isoformat(),
        "device": device,
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": threads,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "system": platform.system(),
        },
        "versions": {
            "fdl": fdl.__version__,
            "python": platform.python_version(),
            **{name: installed(name) for name in ("torch", "jax", "optax")},
        },
        "rates": rates,
        "data": data,
        "rounds": rounds,
        "workloads": [],
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def new_workload(workload: Workload, task: Task) -> Record:
    """Begin the record of one workload."""
    return {
        "name": workload.name,
        "scaled": workload.scaled,
        "model": task.model,
        "batch": task.batches.shape[1],
        "steps": task.steps,
        "lr": task.lr,
        "momentum": task.momentum,
        "adam": task.adam,
        "weight_decay": task.weight_decay,
        "runners": [],
    }


def floor(task: Task, flops: int, rates: Record) -> Record:
    """Bound the time of a step: by its products at the best rate, or its least memory traffic.

    A step must read its batch, and read and write every parameter with its moments, and
    every running statistic, once.
    """
    batch = task.batches.shape[1]
    example = task.x[0].nbytes + task.y[0].nbytes + task.batches.itemsize
    weights = sum(p.nbytes for p in task.params.values()) * (
        3 if task.adam else 2 if task.momentum else 1
    )
    weights += sum(p.nbytes for p in task.buffers.values())
    moved = batch * example + 2 * weights
    seconds = max(flops / rates["matrix_flops"], moved / rates["copy_bytes"])
    return {"flops": flops, "bytes": moved, "us": seconds * 1e6}


def summarise(workload: Record) -> None:
    """Add the figures that follow from the raw measurements."""
    for runner in workload["runners"]:
        if runner["status"] == "measuring":  # interrupted before, or between, its rounds
            runner["status"] = "right" if runner.get("rounds_us") else "unfinished"
        if runner.get("rounds_us"):
            runner["min_us"] = min(runner["rounds_us"])
            runner["median_us"] = statistics.median(runner["rounds_us"])
            runner["examples_per_s"] = workload["batch"] / runner["median_us"] * 1e6
            for start in ("cold", "warm"):
                if f"{start}_call_s" in runner:  # minus the other steps of that call
                    others = (runner["first_steps"] - 1) * runner["median_us"] / 1e6
                    runner[f"{start}_s"] = max(0.0, runner[f"{start}_call_s"] - others)
    compare(workload)


def compare(workload: Record) -> None:
    """Add the comparisons: start-up beyond eager's, the best peer, the share of the floor."""
    right = [runner for runner in workload["runners"] if runner["status"] == "right"]
    eager = next((runner for runner in right if runner["name"] == "eager"), None)
    for runner in right:
        for start in ("cold", "warm"):
            if eager is not None and f"{start}_s" in runner:
                runner[f"{start}_over_eager_s"] = runner[f"{start}_s"] - eager["cold_s"]
    ours = min((runner for runner in right if is_fdl(runner)), key=median, default=None)
    peer = min((runner for runner in right if not is_fdl(runner)), key=median, default=None)
    workload["best_fdl"] = ours and ours["name"]
    workload["best_peer"] = peer and peer["name"]
    if ours and peer:
        workload["fdl_over_best_peer"] = ours["median_us"] / peer["median_us"]
    if ours and "floor" in workload:
        workload["floor_reached"] = workload["floor"]["us"] / ours["median_us"]


def is_fdl(runner: Record) -> bool:
    """Return True for a runner of fdl."""
    return str(runner["name"]).startswith("fdl-")


def median(runner: Record) -> float:
    """Return the median time of a runner, to rank it by."""
    return float(runner["median_us"])


def write(document: Record, path: Path) -> None:
    """Write a document with four digits, more than a measurement is worth."""
    path.write_text(to_json(rounded(document), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Round every float to four digits.

    >>> rounded({"us": [12.3456, 7], "loss": 1e-9})
    {'us': [12.35, 7], 'loss': 1e-09}
    """
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [rounded(item) for item in value]
    return value


def read(path: Path) -> Record:
    """Read a document.

    Raises:
        ValueError: the file was written by another release of the benchmark, or is damaged.
    """
    try:
        document: Record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {schema}; measure again")
    return document
