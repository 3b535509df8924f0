"""Several processes that train one model together, as `torchrun` starts them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
    """What `torchrun` tells a process of itself and the others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1
    restarts: int = 0  # so far
    max_restarts: int = 0


ALONE = Processes()


def read_torchrun_env(environ: Mapping[str, str] = os.environ) -> Processes:
    """Read what `torchrun` has set, if it has started this process.

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
def process_group(here: Processes, device: str, patience: timedelta | None = None) -> Iterator[Any]:
    """Give the mesh of all processes, None for one alone; only the first of them says anything.

    An error that is nobody's expectation is still shown, by whichever process it befalls.

    Args:
        here: what `torchrun` says.
        device: the option; where there are too few GPUs, `local_device` is to say so.
        patience: how long one may wait for another, torch's default if None.
    """
    if here == ALONE:
        yield None
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    gpus = device != "cpu" and torch.cuda.device_count() >= here.local_size
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    if here.local_size == here.size:
        # torchrun keeps one store over its restarts, in which the addresses of processes that are
        # gone would be found: https://github.com/pytorch/pytorch/issues/135712
        store = next(rendezvous("env://"))[0]
        store = PrefixStore(f"restart {here.restarts}", store)
        dist.init_process_group(backend, None, patience, here.size, here.rank, store)
    else:  # machines count their restarts apart
        dist.init_process_group(backend, timeout=patience)
    try:
        with ExitStack() as stack:
            if here.rank:
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield init_device_mesh("cuda" if gpus else "cpu", (here.size,))
        # torchrun ends the others as soon as one has ended with an error: let all say theirs.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device, here: Processes) -> torch.device:
    """Give each process of a machine a GPU of its own.

    Raises:
        ValueError: there are more processes than GPUs.

    >>> local_device(torch.device("cpu"), ALONE._replace(local_size=2))
    device(type='cpu')
    """
    if here == ALONE or device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if here.local_size > count:
        raise ValueError(
            f"--nproc-per-node {here.local_size}: each process needs a GPU of its own, and this "
            f"machine has {count}; start fewer, or use --device cpu"
        )
    return torch.device("cuda", here.local_rank)


def after_restart(config: Recipe, here: Processes) -> Recipe:
    """Let a command that `torchrun` repeats, after a process was lost, go on with its run.

    Raises:
        ValueError: `--max-restarts` without a folder in which the repeated command finds its run.

    >>> after_restart(Recipe(), ALONE._replace(max_restarts=3))
    Traceback (most recent call last):
    ValueError: --out or --resume is needed with torchrun --max-restarts 3: a restart repeats the \
command, and must find the run that it began
    """
    if not here.max_restarts or config.resume is not None:
        return config
    if config.out is None:
        raise ValueError(
            f"--out or --resume is needed with torchrun --max-restarts {here.max_restarts}: a "
            "restart repeats the command, and must find the run that it began"
        )
    marks = [config.out / mark for mark in ("config.json", "sweep.json")]
    begun = here.restarts > 0 and any(mark.exists() for mark in marks)
    return dataclasses.replace(config, resume=config.out) if begun else config


def check_shares(config: Recipe, here: Processes) -> None:
    """Check that a batch can be cut into parts, and shared out.

    Raises:
        ValueError: it cannot.

    >>> check_shares(Recipe(batch_size=10), ALONE._replace(size=4))
    Traceback (most recent call last):
    ValueError: --batch-size must be divisible by 4, the number of processes, got 10
    """
    count, what = (
        (here.size, "the number of processes")
        if config.parts is None
        else (config.parts, "--parts")
    )
    if config.batch_size % count:
        raise ValueError(
            f"--batch-size must be divisible by {count}, {what}, got {config.batch_size}"
        )
