"""Time of saving and loading a tree, beside PyTorch's and safetensors' own functions.

`python -m train.bench.speed_checkpoint --size 1.0` (GB) runs every way in a process of its own, in
interleaved rounds, and prints medians. Files are in the page cache when they are loaded. A way that
maps the file has not read it when it returns, so "and touched" adds up every tensor afterwards;
"synced" asks the disk to have it, as fdl does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import fdl
from train.records import to_json


def make_tree(gigabytes: float) -> dict[str, Tensor]:
    """Eight tensors that hold most of it, and a hundred small ones."""
    large = int(gigabytes * 1e9 / 4 / 8)
    flat = {f"large{i}": torch.full((large // 1000, 1000), float(i)) for i in range(8)}
    return flat | {f"small{i}": torch.full((100,), float(i)) for i in range(100)}


def synced(path: Path) -> int:
    """Sync a file to the disk; return its size."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path.stat().st_size


def touched(tree: dict[str, Tensor]) -> None:
    """Read every byte of a tree."""
    for leaf in tree.values():
        leaf.sum()


SAVE: dict[str, Callable[[Path, Any], Any]] = {
    "fdl.io.save": fdl.io.save,
    "safetensors save_file": lambda path, tree: safetensors.torch.save_file(tree, path),
    "torch.save": lambda path, tree: torch.save(tree, path),
}


def then_synced(save: Callable[[Path, Any], Any]) -> Callable[[Path, Any], Any]:
    """Follow a way of saving by a sync to the disk."""
    return lambda path, tree: (save(path, tree), synced(path))


SAVE |= {f"{way}, synced": then_synced(save) for way, save in [*SAVE.items()][1:]}
LOAD: dict[str, Callable[[Path], Any]] = {
    "fdl.io.load": lambda path: fdl.io.load(path),
    "fdl.io.load and touched": lambda path: touched(fdl.io.load(path)),
    "safetensors load_file": lambda path: safetensors.torch.load_file(path),
    "safetensors load_file and touched": lambda path: touched(safetensors.torch.load_file(path)),
    "torch.load": lambda path: torch.load(path, weights_only=True),
    "torch.load and touched": lambda path: touched(torch.load(path, weights_only=True)),
    "torch.load(mmap) and touched": lambda path: touched(
        torch.load(path, weights_only=True, mmap=True)
    ),
}


def memory(name: str) -> int:
    """Bytes that the process holds (VmRSS), or held at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name} in /proc/self/status")


def file_of(folder: Path, way: str) -> Path:
    """Name the file that a way of saving writes."""
    return folder / (
        "torch.pt" if way.startswith("torch") else f"{way.split()[0].split('.')[0]}.st"
    )


def measure(way: str, folder: Path, gigabytes: float) -> dict[str, float]:
    """Run one way, here."""
    path = file_of(folder, way)
    arguments = (path, make_tree(gigabytes)) if way in SAVE else (path,)
    (SAVE | LOAD)[way](  # the code is there, and torch awake
        *(
            (folder / "warm", {"w": torch.ones(1)})
            if way in SAVE
            else (folder / f"small-{path.name}",)
        )
    )
    if way in SAVE:
        path.unlink(missing_ok=True)  # to truncate an old file would be faster than to replace it
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    start = time.perf_counter()
    kept = (SAVE | LOAD)[way](*arguments)
    seconds = time.perf_counter() - start
    del kept
    return {"seconds": seconds, "peak": memory("VmHWM") - before}


def main() -> None:
    """Measure every way in turn, in processes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.0, help="GB of tensors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if absent")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(to_json(measure(options.way, options.folder, options.size)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        found: dict[str, list[Any]] = {way: [] for way in [*SAVE, *LOAD]}
        for way in ["fdl.io.save", "safetensors save_file", "torch.save"]:
            SAVE[way](folder / f"small-{file_of(folder, way).name}", {"w": torch.ones(1)})
        for turn in range(options.rounds):
            # Another one begins each time, since what was written before is still on its way.
            save, load = (
                [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)] for ways in (SAVE, LOAD)
            )
            for way in [*save, *load]:
                call = ["--size", str(options.size), "--folder", name, "--way", way]
                done = subprocess.run(
                    [sys.executable, __file__, *call], capture_output=True, text=True, check=True
                )
                found[way].append(json.loads(done.stdout))
    print(
        f"{options.size} GB, {options.rounds} rounds, torch {torch.__version__}, "
        f"safetensors {safetensors.__version__}, {os.cpu_count()} cores"
    )
    print(f"{'':36}{'median s':>10}{'least s':>10}{'peak GB':>10}")
    for way, rows in found.items():
        seconds = [row["seconds"] for row in rows]
        peak = max(row["peak"] for row in rows) / 1e9
        print(f"{way:36}{statistics.median(seconds):10.3f}{min(seconds):10.3f}{peak:10.2f}")


if __name__ == "__main__":
    main()
