"""Count the kernels of a training step: `python -m train.bench.kernels`.

On a CPU: how many kernels Inductor generated for `fdl.jit(step)`, without calls of libraries for
products and convolutions, and how many kernels and calls it would have on an H100
(`kernels_for_cuda`). On a GPU: what a step of an epoch, one CUDA graph, launches; names, counts and
times are those of `torch.profiler`, library calls and copies included.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile

from fdl._compiler import _cuda_graphs
from fdl.data import Dataset
from train import recipes
from train.bench import kernels_for_cuda
from train.bench.config import Bench, WorkloadName
from train.bench.fdl_runners import Scan, Step
from train.bench.workloads import Workload, find, make_task
from train.image_sets import load_images
from train.records import to_json

__all__ = ["launches", "markdown", "measure"]

WARM_UP = 4  # calls before the one that is profiled; donated memory is at its place after the third
STEPS = 8  # of an epoch that is profiled
MOST = 20  # kernels that are shown by name
Record = dict[str, Any]


def measure(workload: Workload, config: Bench, images: Dataset | None, device: str) -> Record:
    """Count the kernels of a step of a workload; profile them on a GPU, or count them for one."""
    task = make_task(workload, config, images, device)
    runner = Scan(task) if device == "cuda" else Step(task)
    runner.first()
    report = runner.program.report()[-1]
    entry: Record = {
        "name": workload.name,
        "batch": task.batches.shape[1],
        "route": report.route,
        "generated": report.kernels,
        "regions": report.regions,
        "fallbacks": list(report.fallbacks),
    }
    return entry | (profile_epoch(runner) if isinstance(runner, Scan) else for_cuda(runner))


def for_cuda(step: Step) -> Record:
    """Count the kernels that the step would have on a GPU, or say why they cannot be counted."""
    args = step.state, step.problem.train, step.rows[0]
    try:
        return {"for_cuda": kernels_for_cuda.count(step.program.__wrapped__, args)}
    except (ImportError, RuntimeError) as error:
        return {"for_cuda": None, "not_counted": str(error).partition("\n")[0]}


def profile_epoch(runner: Scan) -> Record:
    """Profile what a step launches within the CUDA graph of an epoch.

    A profiler that does not look into graphs sees no kernel; then one sees the program as it runs
    without a graph, which launches the same kernels.
    """
    events, steps = profile_call(runner), runner.task.steps
    graphed = bool(events)
    if not graphed:
        with patch.object(_cuda_graphs, "_capture", refuse):
            events = profile_call(Scan(runner.task))
    return {"steps": steps, "profiled_graph": graphed} | launches(events, steps)


def refuse(*_: object) -> None:
    """Stand in for the capture of a graph; its caller then launches kernels one by one."""
    raise RuntimeError("the profiler does not look into graphs")


def profile_call(runner: Scan) -> list[tuple[str, float]]:
    """List what one call of a compiled epoch runs on the device: names and microseconds."""

    def call() -> None:
        runner.wait(runner.epoch())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a capture was refused
        for _ in range(WARM_UP):
            call()
    return on_device(call, runner.device.type)


def on_device(call: Callable[[], None], device: str) -> list[tuple[str, float]]:
    """Profile a call; list its events on a type of device, but for annotations."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:  # else torch 2.11 warns
        call()
    return [
        (event.name, event.time_range.elapsed_us())
        for event in profiler.events() or ()
        if event.device_type.name == device.upper()
        and not getattr(event, "is_user_annotation", False)
    ]


def launches(events: list[tuple[str, float]], steps: int) -> Record:
    """Sum up events by name, for one of `steps` steps, the longest first.

    >>> found = launches([("add", 3.0), ("mul", 9.0), ("add", 5.0), ("add", 4.0)], 2)
    >>> found["launches"], found["device_us"], found["kernels"][0]
    (2.0, 10.5, {'name': 'add', 'count': 1.5, 'us': 6.0})
    """
    counts: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for name, us in events:
        counts[name] += 1
        times[name] += us
    kernels = [
        {"name": name, "count": counts[name] / steps, "us": times[name] / steps}
        for name in sorted(times, key=lambda name: -times[name])
    ]
    return {
        "launches": len(events) / steps,
        "device_us": sum(times.values()) / steps,
        "kernels": kernels,
    }


def markdown(entries: list[Record]) -> str:
    """Make a table with a row for each workload, and below it the kernels of those profiled."""
    lines = [
        "| a step | batch | way | kernels generated | regions | for CUDA: Triton, library "
        "| launched in the graph | their µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = [
            entry["name"],
            entry["batch"],
            entry["route"],
            entry["generated"],
            entry["regions"],
        ]
        counted, profiled = entry.get("for_cuda"), "launches" in entry
        cells.append(f"{counted['triton']}, {counted['library']}" if counted else "")
        cells += [f"{entry[key]:.1f}" if profiled else "" for key in ("launches", "device_us")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for entry in entries:
        lines += named(entry)
    return "\n".join(lines)


def named(entry: Record) -> list[str]:
    """List the longest kernels of a workload, a line each, and why it runs in no faster way."""
    lines = [f"{entry['name']}: {reason}" for reason in entry["fallbacks"]]
    if "not_counted" in entry:
        lines.append(f"{entry['name']}: not counted for CUDA: {entry['not_counted']}")
    if entry.get("kernels"):
        how = "in the graph" if entry["profiled_graph"] else "as launched without a graph"
        lines += ["", f"{entry['name']}, a step {how}: count, µs, name"]
    for kernel in entry.get("kernels", ())[:MOST]:
        lines.append(f"{kernel['count']:6.1f} {kernel['us']:8.2f}  {kernel['name']}"[:100])
    return lines


def main() -> None:
    """Measure the workloads that the command line names."""
    names = [name for name in get_args(WorkloadName) if name != "lenet-scaling"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--data", default="sample", help="auto, sample or a folder")
    parser.add_argument("--out", type=Path, help="JSON file to write, after every workload")
    options = parser.parse_args()
    device = recipes.find_device(options.device).type
    config = Bench(workloads=tuple(options.workloads), steps=STEPS)
    workloads = find(config)
    images: Dataset | None = None
    if any(workload.model != "linreg" for workload in workloads):
        images, _, _ = load_images(options.data)
    entries: list[Record] = []
    for workload in workloads:
        entries.append(measure(workload, config, images, device))
        print(f"{workload.name}: {entries[-1]['generated']} kernels", file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text(to_json(entries, indent=1) + "\n")
    print(markdown(entries))


if __name__ == "__main__":
    main()
