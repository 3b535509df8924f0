"""Measure the GPU of this machine in eight minutes: `python -m train.bench.gpu`, or `make gpu`.

Four parts run in turn, each in a process of its own: the tests marked `cuda`, the benchmark, the
kernels of a step, and a population of 64 LeNets. A part that ends early leaves its time to the next
ones; one that does not end in time is stopped, and what it has measured until then counts. Nothing
is downloaded. runs/gpu/TIME/ then holds report.json, report.txt and the output of each part.

The exit code is 0 if everything that ran is right, 1 if a test, a runner or a part failed, 2
without a GPU, 74 if the report cannot be written, 130 after Ctrl-C and 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.bench.client import ROOT, end_session

if TYPE_CHECKING:  # it imports torch, which may be absent
    from train.bench.gpu_parts import Part

__all__ = ["main", "measure", "run_part"]

NEEDS = ("torch", "torchvision", "numpy", "safetensors", "tyro", "pytest", "hypothesis")
SECONDS = 480.0
GRACE = 15.0  # seconds in which a part that was told to stop may write what it has
Record = dict[str, Any]


def measure(parts: list[Part], seconds: float, folder: Path, report: Record) -> int:
    """Run the parts, and write the report after each.

    Returns:
        0, or 1 if a part failed or something in it is wrong.
    """
    from train.bench.gpu_report import write

    began, entries = time.monotonic(), report["parts"]
    entries += [{"name": part.name, "status": "not run"} for part in parts]
    for i, (part, entry) in enumerate(zip(parts, entries, strict=True)):
        left = seconds - (time.monotonic() - began)
        limit = left * part.share / sum(later.share for later in parts[i:])
        try:
            if limit > 1:
                print(f"{part.name}: at most {limit:.0f} s", flush=True)
                run_part(part, limit, folder, entry)
        finally:
            report["took_s"] = time.monotonic() - began
            write(report, folder)
    return int(any(entry["status"] == "failed" or entry.get("wrong") for entry in entries))


def run_part(part: Part, limit: float, folder: Path, entry: Record) -> None:
    """Run one part, and fill in its entry: status, seconds, result, and what is wrong."""
    began, log = time.monotonic(), folder / f"{part.name}.log"
    entry |= {"status": "interrupted", "limit_s": limit, "log": log.name}
    process = start(part.command, log)
    try:
        code = process.wait(max(1.0, limit - GRACE))
        entry["status"] = "done" if code in part.codes else "failed"
    except subprocess.TimeoutExpired:
        entry["status"] = "out of time"
    finally:
        stop(process)
        entry["seconds"] = time.monotonic() - began
        try:
            entry |= part.read(folder)
        except (OSError, ValueError) as error:  # it wrote nothing, or was killed while it wrote
            if entry["status"] == "done":
                entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        if entry["status"] == "failed":
            entry.setdefault("reason", last_line(log))


def start(command: list[str], log: Path) -> subprocess.Popen[str]:
    """Start a part in a session of its own, with its output in a file."""
    with log.open("w") as out:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            text=True,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # In a shell's background SIGINT is ignored, which a child would inherit.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )


def stop(process: subprocess.Popen[str]) -> None:
    """End a part: tell it to, so that it writes what it has, then kill its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    end_session(process)


def last_line(log: Path) -> str:
    """Return the last line of a log, which is the exception if there was one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it printed nothing"


def obstacle(rehearse: bool) -> str | None:
    """Say in one line why nothing can be measured here; None if it can."""
    absent = [name for name in NEEDS if find_spec(name) is None]
    if absent:
        return f"{sys.executable} lacks {', '.join(absent)}: pip install -e '.[test]'"
    import torch

    if not rehearse and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU on this machine; "
            "--rehearse runs the same on the CPU"
        )
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for everything, 480 by default"
    )
    parser.add_argument("--out", type=Path, help="new folder; runs/gpu/TIME by default")
    parser.add_argument(
        "--rehearse", action="store_true", help="run the same on the CPU, with tiny sizes"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be finite and above 0, got {options.seconds}")
    if reason := obstacle(options.rehearse):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    from train.bench import gpu_parts, gpu_report

    folder = options.out or Path("runs/gpu") / f"{datetime.now():%Y-%m-%d-%H%M%S}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        print(f"error: --out {folder}: {error.strerror}; name a new folder", file=sys.stderr)
        return 2
    folder = folder.absolute()
    report = gpu_report.new_report(options.seconds, options.rehearse)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = measure(gpu_parts.parts(folder, options.rehearse), options.seconds, folder, report)
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        print(f"error: {folder} cannot be written: {error}", file=sys.stderr)
        return 74
    print(f"\n{(folder / 'report.txt').read_text()}\nwritten to {folder}")
    return code


if __name__ == "__main__":
    sys.exit(main())
