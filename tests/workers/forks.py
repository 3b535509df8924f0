"""Processes that train together: `python -m tests.workers.forks WORKER FOLDER SIZE DEVICE`.

One process imports torch and the worker, and forks the others: importing takes longer than what
most of them check. `main(folder, rank, size, device)` of the worker is what each runs.
"""

import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

import torch


def fork(worker, folder, rank, size, device):
    """Start process `rank`; return its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        worker.main(folder, rank, size, device)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(name, folder, size, device):
    """Run all of them; as soon as one fails the others, which would wait for it, are ended."""
    worker = importlib.import_module(f"tests.workers.{name}")
    torch.set_num_threads(1)
    running = {fork(worker, Path(folder), rank, int(size), device) for rank in range(int(size))}
    failed = False
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
