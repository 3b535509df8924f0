"""The report of `make gpu`, as JSON and as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.bench import kernels, record, render, speed_population
from train.records import to_json

__all__ = ["new_report", "text", "write"]

SCHEMA = 1
Record = dict[str, Any]


def new_report(seconds: float, rehearsal: bool) -> Record:
    """Begin the report of a run."""
    device = "cpu" if rehearsal else "cuda"
    head = record.new_document(device, torch.get_num_threads(), 0, {}, "")
    report = {name: head[name] for name in ("date", "machine", "versions")}
    report["versions"] |= {"cuda": torch.version.cuda, "triton": record.installed("triton")}
    if not rehearsal:
        properties = torch.cuda.get_device_properties(0)
        report["machine"] |= {
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return {"schema": SCHEMA, "rehearsal": rehearsal, "seconds": seconds, **report, "parts": []}


def write(report: Record, folder: Path) -> None:
    """Write report.json and report.txt."""
    (folder / "report.json").write_text(to_json(record.rounded(report), indent=1) + "\n")
    (folder / "report.txt").write_text(text(report) + "\n")


def text(report: Record) -> str:
    """Describe the whole run: where, then each part with its figures."""
    lines = [where(report), f"{report['took_s']:.0f} of {report['seconds']:.0f} s"]
    if report["rehearsal"]:
        lines.append("REHEARSAL on the CPU, with tiny sizes: no figure below means anything.")
    for part in report["parts"]:
        lines += ["", heading(part)]
        lines += [f"  wrong: {line}" for line in part.get("wrong", [])]
        if "result" in part:
            lines += ["", SHOW[part["name"]](part["result"])]
    return "\n".join(lines)


def where(report: Record) -> str:
    """Describe the machine and the releases in one line."""
    machine, versions = report["machine"], report["versions"]
    device = machine["gpu"] or machine["cpu"]
    if machine["gpu"]:
        memory = machine["gpu_bytes"] / 2**30
        device += f" (compute capability {machine['capability']}, {memory:.0f} GiB)"
    names = [f"{name} {versions[name]}" for name in ("torch", "cuda", "triton", "jax", "python")]
    return f"{report['date']}: fdl {versions['fdl']} on {device}; {', '.join(names)}"


def heading(part: Record) -> str:
    """Say in one line how a part ended, and what of it did not run."""
    line = f"{part['name']}: {part['status']}"
    if "seconds" in part:
        line += f", {part['seconds']:.0f} s of at most {part['limit_s']:.0f}"
    if "reason" in part:
        line += f": {part['reason']}"
    if part.get("not_run"):
        line += f"; not run: {', '.join(part['not_run'])}"
    return line


def show_tests(result: Record) -> str:
    """Count the tests by their fate, and those that did not run."""
    counts = dict(result["counts"])
    if result["selected"] is not None:
        counts["not run"] = result["selected"] - sum(result["counts"].values())
    return ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)


def show_benchmark(document: Record) -> str:
    """Show the table of each workload."""
    return "\n\n".join(render.terminal_table(entry) for entry in document["workloads"])


SHOW: dict[str, Callable[[Any], str]] = {
    "tests": show_tests,
    "benchmark": show_benchmark,
    "kernels": kernels.markdown,
    "population": speed_population.table,
}
