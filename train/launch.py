"""Train one model with several processes, started by `torchrun`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from train.config import Recipe

__all__ = [
    "Processes",
    "after_restart",
    "check_shares",
    "local_device",
    "process_group",
    "read_torchrun_env",
]


class Processes(NamedTuple):
    """The place of this process among all that `torchrun` started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1
    restarts: int = 0  # so far
    max_restarts: int = 0


ALONE = Processes()


def read_torchrun_env(environ: Mapping[str, str] = os.environ) -> Processes:
    """Read the environment variables that `torchrun` sets, if it started this process.

    >>> read_torchrun_env({})
    Processes(rank=0, size=1, local_rank=0, local_size=1, restarts=0, max_restarts=0)
    >>> torchrun = {"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "WORLD_SIZE": "2"}
    >>> read_torchrun_env(torchrun | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    Processes(rank=1, size=2, local_rank=1, local_size=2, restarts=0, max_restarts=0)
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elastic = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    return Processes(*(int(environ.get(name, 0)) for name in names + elastic))


@contextmanager
def process_group(
    processes: Processes, device: str, patience: timedelta | None = None
) -> Iterator[Any]:
    """Yield the mesh of all processes, None for a single one; only the first process prints.

    Exceptions that leave the block are shown whichever process raises them.

    Args:
        processes: the result of `read_torchrun_env`.
        device: the option `--device`; `local_device` raises if there are too few GPUs.
        patience: how long one process may wait for another; None for torch's default.
    """
    if processes == ALONE:
        yield None
        return
    gpus = device != "cpu" and torch.cuda.device_count() >= processes.local_size
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    if processes.local_size == processes.size:
        # torchrun keeps one store over its restarts, with the addresses of processes that have
        # ended: https://github.com/pytorch/pytorch/issues/135712
        store = next(rendezvous("env://"))[0]
        store = PrefixStore(f"restart {processes.restarts}", store)
        dist.init_process_group(backend, None, patience, processes.size, processes.rank, store)
    else:  # each machine counts its own restarts
        dist.init_process_group(backend, timeout=patience)
    try:
        with ExitStack() as stack:
            if processes.rank:
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield init_device_mesh("cuda" if gpus else "cpu", (processes.size,))
        # torchrun ends all others once one has ended with an error: let all print theirs first.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device, processes: Processes) -> torch.device:
    """Return the device of this process: each process of a machine gets its own GPU.

    Raises:
        ValueError: there are more processes than GPUs.

    >>> local_device(torch.device("cpu"), ALONE._replace(local_size=2))
    device(type='cpu')
    """
    if processes == ALONE or device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if processes.local_size > count:
        raise ValueError(
            f"--nproc-per-node {processes.local_size}: each process needs a GPU of its own, and "
            f"this machine has {count}; start fewer, or use --device cpu"
        )
    return torch.device("cuda", processes.local_rank)


def after_restart(config: Recipe, processes: Processes) -> Recipe:
    """Resume the run if `torchrun` repeats the command because a process was lost.

    Raises:
        ValueError: `--max-restarts` without a folder for the repeated command to find its run in.

    >>> after_restart(Recipe(), ALONE._replace(max_restarts=3))
    Traceback (most recent call last):
    ValueError: --out or --resume is needed with torchrun --max-restarts 3: a restart repeats the \
command, and must find its run
    """
    if not processes.max_restarts or config.resume is not None:
        return config
    if config.out is None:
        raise ValueError(
            f"--out or --resume is needed with torchrun --max-restarts {processes.max_restarts}: a "
            "restart repeats the command, and must find its run"
        )
    marks = [config.out / mark for mark in ("config.json", "sweep.json")]
    begun = processes.restarts > 0 and any(mark.exists() for mark in marks)
    return dataclasses.replace(config, resume=config.out) if begun else config


def check_shares(config: Recipe, processes: Processes) -> None:
    """Check that a batch can be divided into parts and among processes.

    Raises:
        ValueError: the batch size is not divisible.

    >>> check_shares(Recipe(batch_size=10), ALONE._replace(size=4))
    Traceback (most recent call last):
    ValueError: --batch-size must be divisible by 4, the number of processes, got 10
    """
    count, what = (
        (processes.size, "the number of processes")
        if config.parts is None
        else (config.parts, "--parts")
    )
    if config.batch_size % count:
        raise ValueError(
            f"--batch-size must be divisible by {count}, {what}, got {config.batch_size}"
        )
