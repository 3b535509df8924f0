"""The coordinator: start the workers, ask them in turn, and record their answers.

While one works, all others wait for a line of input, so that no two compete for cores.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from fdl.data import Dataset
from train import recipes
from train.bench import record, registry, render
from train.bench import task as tasks
from train.bench.check import Reference, check
from train.bench.client import Client, RunnerError, environment, run_module
from train.bench.config import Bench, RunnerName
from train.bench.runner import Trajectory
from train.bench.task import Task
from train.bench.workloads import Workload, find, make_task
from train.image_sets import load_images

__all__ = ["Setting", "measure", "run"]


class Setting(NamedTuple):
    """Settings of a whole benchmark."""

    config: Bench
    device: str
    threads: int
    folder: Path  # temporary: tasks, caches, logs

    def env(self, *parts: str) -> dict[str, str]:
        """Make the environment of the worker whose caches are in the folder `parts`."""
        return environment(self.device, self.threads, self.folder.joinpath(*parts))


def run(config: Bench) -> int:
    """Run the command; return 0.

    Raises:
        ValueError: an option is wrong.
        OSError: the result cannot be written.
        KeyboardInterrupt, SystemExit: interrupted; the measurements so far are written.
    """
    if config.render:
        print("\n".join(f"wrote {path}" for path in render.render()))
        return 0
    device = recipes.find_device(config.device).type
    out = config.out or Path("runs/bench") / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"
    if config.runners and not registry.runners_for(device, config.runners, scaling=False):
        raise ValueError(f"--runners: none of {', '.join(config.runners)} runs on {device}")
    if out.exists():
        raise ValueError(f"--out {out} exists already; choose another name or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        setting = Setting(config, device, torch.get_num_threads(), Path(folder))
        pairs, data = make_tasks(setting)
        print(f"{device}, {setting.threads} threads; {data}", flush=True)
        rates = find_rates(setting)
        document = record.new_document(device, setting.threads, config.rounds, rates, data)
        record.write(document, out)  # an error in --out is raised before measuring
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            for workload, task in pairs:
                entry = record.new_workload(workload, task)
                document["workloads"].append(entry)
                try:
                    measure(setting, workload, task, rates, entry)
                finally:
                    record.summarise(entry)
                    record.write(document, out)
                    print(f"\n{render.terminal_table(entry)}\n", flush=True)
        finally:
            print(f"written to {out}")
    return 0


def make_tasks(setting: Setting) -> tuple[list[tuple[Workload, Task]], str]:
    """Make the tasks that the options name, without batches larger than the data set."""
    images: Dataset | None = None
    workloads, data, pairs = find(setting.config), "synthetic data", []
    if any(workload.model != "linreg" for workload in workloads):
        images, _, data = load_images(setting.config.data)
    for workload in workloads:
        most = len(images.x) if images and workload.scaled else None
        if most is not None and workload.recipe.batch_size > most:
            print(f"{workload.name} is left out: there are only {most:,} images")
            continue
        pairs.append((workload, make_task(workload, setting.config, images, setting.device)))
    if not pairs:
        raise ValueError("--batch-sizes: every size exceeds the number of images")
    return pairs, data


def find_rates(setting: Setting) -> dict[str, Any]:
    """Measure the rates of the device with each installed library, and keep the best."""
    libraries = ["torch"] if registry.missing("jax-step") else ["torch", "jax"]
    found: dict[str, dict[str, float]] = {}
    for library in libraries:
        try:
            printed = run_module(
                "train.bench.rates", library, setting.device, env=setting.env("rates")
            )
        except RunnerError:  # such as a JAX without CUDA, which its runners report
            if library == "torch":
                raise
        else:
            found[library] = json.loads(printed)
    by = max(found, key=lambda library: found[library]["matrix_flops"])
    print(
        f"products at {found[by]['matrix_flops'] / 1e9:,.0f} GFLOP/s (by {by}), "
        f"copies at {found['torch']['copy_bytes'] / 1e9:,.1f} GB/s\n",
        flush=True,
    )
    return found["torch"] | {"matrix_flops": found[by]["matrix_flops"], "matrix_by": by}


def measure(
    setting: Setting, workload: Workload, task: Task, rates: dict[str, Any], entry: dict[str, Any]
) -> None:
    """Measure one workload; `entry` is filled in with each result, so that none are lost."""
    path = setting.folder / f"{workload.name}.npz"
    tasks.save(task, path)
    reference, flops = find_reference(setting, task, path)
    entry["floor"] = record.floor(task, flops, rates)
    say(f"{workload.name}, batch {entry['batch']}, {task.steps} steps a call")
    with ExitStack() as stack:
        clients: dict[RunnerName, Client] = {}
        asked = setting.config.runners
        for name in registry.runners_for(setting.device, asked, workload.scaled):
            row: dict[str, Any] = {"name": name, "label": registry.RUNNERS[name].label}
            row["status"] = "not installed" if registry.missing(name) else "measuring"
            entry["runners"].append(row)
            if row["status"] == "measuring":
                client = stack.enter_context(start(setting, workload, name, path))
                prepare(client, setting, row, reference)
                if row["status"] == "measuring":
                    clients[name] = client
                else:
                    client.end()
            say(f"  {name:20} {status_line(row)}")
        rows = {row["name"]: row for row in entry["runners"]}
        for number in range(setting.config.rounds):
            for name in rotated(clients, number):
                attempt(rows[name], lambda name=name: add_round(clients[name], rows[name]))
            say(f"  round {number + 1}/{setting.config.rounds}")
        for name, client in clients.items():
            attempt(rows[name], lambda client=client, row=rows[name]: add_memory(client, row))
            client.end()
    for row in entry["runners"]:
        again = setting.config.warm_starts and registry.RUNNERS[row["name"]].compiles
        if row["status"] == "measuring" and again:
            attempt(row, lambda row=row: add_warm_start(setting, workload, row, path))


def say(line: str) -> None:
    """Print progress at once, cut to one line."""
    print(line[:79], flush=True)


def status_line(row: dict[str, Any]) -> str:
    """Describe how a runner started, in one line."""
    if row["status"] == "measuring":
        return f"first call {row['cold_call_s']:.2f} s, trains correctly"
    return f"{row['status']}: {row['reason']}" if "reason" in row else str(row["status"])


def rotated(clients: dict[RunnerName, Client], number: int) -> Iterator[RunnerName]:
    """Yield the runners of a round; each round begins with another one."""
    names = list(clients)
    shift = number % max(1, len(names))
    yield from names[shift:] + names[:shift]


def find_reference(setting: Setting, task: Task, path: Path) -> tuple[Reference, int]:
    """Compute the reference in a process of its own."""
    out = path.with_suffix(".reference.npz")
    run_module("train.bench.reference", str(path), str(out), env=setting.env("reference"))
    found, rest = read_trajectory(out)
    masks = tuple(rest["other_masks"].tolist()) if "other_masks" in rest else None
    start = task.params | task.buffers
    return Reference(found.losses, start, found.params, masks), int(rest["flops"])


def read_trajectory(path: Path) -> tuple[Trajectory, dict[str, Any]]:
    """Read the losses and parameters in a file, and everything else in it."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    params = tasks.take(arrays, "params/")
    return Trajectory(arrays.pop("losses"), params), arrays


def start(setting: Setting, workload: Workload, name: RunnerName, path: Path) -> Client:
    """Start the worker of a runner; a second start finds the caches of the first."""
    log = setting.folder / f"{workload.name}-{name}.log"
    return Client(name, path, setting.env(workload.name, name), log)


def attempt(row: dict[str, Any], call: Any) -> None:
    """Call, unless the runner has failed; an error is recorded in its row."""
    if row["status"] != "measuring":
        return
    try:
        call()
    except RunnerError as error:
        row["status"], row["reason"] = "failed", str(error)
        row.pop("rounds_us", None)


def prepare(client: Client, setting: Setting, row: dict[str, Any], reference: Reference) -> None:
    """Time the first call of a runner, and check how it trains."""

    def call() -> None:
        client.read()
        first = client.ask("first")
        row["cold_call_s"], row["first_steps"] = first["seconds"], first["steps"]
        out = setting.folder / "trajectory.npz"
        client.ask("trajectory", out=str(out))
        if client.warned:
            row["warnings"] = client.warned
        result = check(reference, read_trajectory(out)[0], registry.RUNNERS[row["name"]].own_masks)
        row["check"] = result._asdict()
        if not result.right:
            row["status"], row["reason"] = "wrong", result.reason
            return
        row["round"] = client.ask("calibrate", seconds=setting.config.seconds)
        row["rounds_us"] = []

    attempt(row, call)


def add_round(client: Client, row: dict[str, Any]) -> None:
    """Time one round."""
    answer = client.ask("round")
    row["rounds_us"].append(answer["us"])
    row["idle_cpu"] = max(answer["idle_cpu"], row.get("idle_cpu", 0.0))


def add_memory(client: Client, row: dict[str, Any]) -> None:
    """Record the memory taken."""
    answer = client.ask("peak")
    row["peak_bytes"], row["start_bytes"] = answer["peak"], answer["start"]


def add_warm_start(setting: Setting, workload: Workload, row: dict[str, Any], path: Path) -> None:
    """Time the first call in a second process, with the caches that the first left on disk.

    Its memory is that of training, without that of the compiler.
    """
    with start(setting, workload, row["name"], path) as client:
        client.read()
        row["warm_call_s"] = client.ask("first")["seconds"]
        answer = client.ask("peak")
        row["warm_peak_bytes"], row["warm_start_bytes"] = answer["peak"], answer["start"]
