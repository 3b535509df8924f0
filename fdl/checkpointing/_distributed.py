"""Checkpoints of a state sharded over processes: a folder each, which appears atomically.

    000007-step-500/
      about.safetensors     the structure, the leaves not sharded, the SHA-256 of each file below
      shards/*.safetensors  the sharded leaves: each process writes its part

Every process of a group calls these functions. An error in one of them is raised in all, so that
none waits forever for another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fdl._dtensor import is_dtensor
from fdl._files import sync_folder
from fdl.io import inspect, load, save
from fdl.io._compare import describe_paths, differences
from fdl.io._schema import describe
from fdl.parallel._group import on_all, on_first
from fdl.tree import Tree, flatten_dict, unflatten_dict

ABOUT, SHARDS = "about.safetensors", "shards"


def save_shards(
    path: Path, state: Tree, metadata: Mapping[str, Any], group: ProcessGroup | None
) -> None:
    """Write a state: each process its part of the sharded leaves, the first one all other leaves.

    Args:
        path: the folder, which appears once everything is on the disk; equal in all processes.
        state: the state; leaves that are not sharded are equal in all processes.
        metadata: further data that JSON can represent.
        group: the processes; None for this one alone.

    Raises:
        OSError: a process could not write; then there is no folder.
        TypeError: a DTensor has a pending reduction.
    """
    leaves = flatten_dict(state)
    sharded = {at: leaf for at, leaf in leaves.items() if is_dtensor(leaf)}
    check_reduced(sharded)
    temporary = path.with_name(f".{path.name}")
    shards = temporary / SHARDS

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        shards.mkdir(parents=True)

    def finish() -> None:
        shapes = {at: [str(leaf.dtype), list(leaf.shape)] for at, leaf in sharded.items()}
        rest = unflatten_dict(leaves | dict.fromkeys(sharded), like=state)
        files = {name: digest for part in digests for name, digest in part.items()}
        about = {**metadata, "sharded": {"leaves": shapes, "files": files}}
        save(temporary / ABOUT, rest, metadata=about)
        sync_folder(shards)
        os.rename(temporary, path)
        sync_folder(path.parent)

    try:
        on_first(group, prepare)
        if sharded:
            _dcp_save(sharded, shards, group)
        digests = on_all(group, lambda: _digests(_share(shards, group)))
        on_first(group, finish)
    except BaseException:
        if group is None or group.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_shards(
    path: Path, like: Tree, device: torch.device | str | None, group: ProcessGroup | None
) -> Tree:
    """Read a folder of `save_shards` with any number of processes, sharded like `like`.

    Args:
        path: the folder.
        like: a state with the expected structure, shapes and dtypes. Its DTensors come back as
            DTensors with the same placements; all other leaves come back as full tensors.
        device: where the full tensors go, see `fdl.io.load`.
        group: the processes, each of which verifies a share of the files; None for this one alone.

    Raises:
        OSError: the folder cannot be read.
        ValueError: the checkpoint is damaged, or does not match `like` (each path is listed).
    """
    check_shards(path, group)
    shapes = inspect(path / ABOUT).metadata["sharded"]["leaves"]
    saved = load(path / ABOUT)
    templates = {
        at: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for at, (dtype, shape) in shapes.items()
    }
    full = unflatten_dict(flatten_dict(saved) | templates, like=saved)
    if like is None:
        wanted: dict[str, Any] = dict.fromkeys(flatten_dict(full))
        like = full
    else:
        expected = describe_paths(*describe(like, "load: like"))
        lines = differences(expected, describe_paths(*describe(full, "load")))
        if lines:
            raise ValueError(f"load: {path} does not match `like`:\n  " + "\n  ".join(lines))
        wanted = flatten_dict(like)
    sharded = {at: _allocate(templates[at], wanted[at], device) for at in templates}
    if sharded:
        _dcp_load(sharded, path / SHARDS, group)
    others = {at: leaf for at, leaf in flatten_dict(saved).items() if at not in templates}
    moved = {at: _moved(leaf, wanted[at], device) for at, leaf in others.items()}
    return unflatten_dict(moved | sharded, like=like)


def check_shards(path: Path, group: ProcessGroup | None) -> None:
    """Verify the SHA-256 of every file of the shards.

    Args:
        path: the folder.
        group: the processes, each of which verifies a share of the files.

    Raises:
        ValueError: a file is damaged, missing or unexpected.
    """
    expected = inspect(path / ABOUT).metadata["sharded"]["files"]
    digests = {
        name: digest
        for part in on_all(group, lambda: _digests(_share(path / SHARDS, group)))
        for name, digest in part.items()
    }
    names = expected.keys() | digests
    wrong = [name for name in names if expected.get(name) != digests.get(name)]
    if wrong:
        raise ValueError(
            f"load: cannot read {path}: damaged or missing: {', '.join(sorted(wrong))}"
        )


def _share(folder: Path, group: ProcessGroup | None) -> list[Path]:
    """Return the share of this process: each file belongs to one process."""
    first, stride = (0, 1) if group is None else (group.rank(), group.size())
    return sorted(folder.iterdir())[first::stride]


def _digests(files: list[Path]) -> dict[str, str]:
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _allocate(template: Tensor, like: Any, device: torch.device | str | None) -> Tensor:
    """Make the tensor to read into."""
    if is_dtensor(like):
        target = like.device_mesh.device_type if like.device.type == "meta" else like.device
        return torch.empty_like(like.detach(), device=target)
    return torch.empty_like(template, device=_place(like, device))


def _moved(leaf: Any, like: Any, device: torch.device | str | None) -> Any:
    return leaf.to(_place(like, device)) if isinstance(leaf, Tensor) else leaf


def _place(like: Any, device: torch.device | str | None) -> torch.device | str:
    if device is not None:
        return device
    return like.device if isinstance(like, Tensor) and like.device.type != "meta" else "cpu"


def check_reduced(sharded: Mapping[str, Any]) -> None:
    """Raise if DTensors have a pending reduction.

    Args:
        sharded: leaves by path.

    Raises:
        TypeError: there are such leaves (each path is listed).
    """
    partial = [at for at, leaf in sharded.items() if any(p.is_partial() for p in leaf.placements)]
    if partial:
        raise TypeError(
            f"Checkpointer: leaves with the placement Partial: {', '.join(partial)}; "
            "redistribute them to Shard or Replicate"
        )


# Of the formats of torch.distributed.checkpoint, the one of Hugging Face consists of safetensors;
# the default one stores its metadata as a pickle. The imports take half a second.


def _dcp_save(sharded: dict[str, Any], folder: Path, group: ProcessGroup | None) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save_parts(sharded, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # a BaseException
        raise OSError(f"Checkpointer: cannot write {folder}: {error}") from error


def _dcp_load(sharded: dict[str, Any], folder: Path, group: ProcessGroup | None) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():  # it warns if there is a single process
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load_parts(sharded, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # a BaseException
        raise OSError(f"Checkpointer: cannot read {folder}: {error}") from error
