"""Checkpoints of a state that is spread over processes: a folder each, whole or not there.

    000007-step-500/
      about.safetensors     what is not spread, the structure, a SHA-256 of each file below
      shards/*.safetensors  what is: by torch.distributed.checkpoint, each process its part

Every process of a group calls these functions. What fails in one of them is raised in all, so that
none waits for ever for another.
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
from fdl.io._compare import differences, places
from fdl.io._schema import describe
from fdl.parallel._group import on_all, on_first
from fdl.tree import Tree, flatten_dict, unflatten_dict

ABOUT, SHARDS = "about.safetensors", "shards"


def save_shards(
    path: Path, state: Tree, metadata: Mapping[str, Any], group: ProcessGroup | None
) -> None:
    """Write a state, each process what it has of the spread leaves, the first one all else.

    Args:
        path: the folder that appears once all is on the disk; the same in each process.
        state: the state; what is not spread is equal in all processes.
        metadata: what else to keep: anything that JSON can say.
        group: the processes.

    Raises:
        OSError: one of them could not write; there is no such folder then.
        TypeError: a DTensor with sums that are still to be made.
    """
    leaves = flatten_dict(state)
    spread = {at: leaf for at, leaf in leaves.items() if is_dtensor(leaf)}
    check_summed(spread)
    temporary = path.with_name(f".{path.name}")
    shards = temporary / SHARDS

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        shards.mkdir(parents=True)

    def finish() -> None:
        forms = {at: [str(leaf.dtype), list(leaf.shape)] for at, leaf in spread.items()}
        rest = unflatten_dict(leaves | dict.fromkeys(spread), like=state)
        files = {name: digest for part in digests for name, digest in part.items()}
        about = {**metadata, "sharded": {"leaves": forms, "files": files}}
        save(temporary / ABOUT, rest, metadata=about)
        sync_folder(shards)
        os.rename(temporary, path)
        sync_folder(path.parent)

    try:
        on_first(group, prepare)
        if spread:
            _dcp_save(spread, shards, group)
        digests = on_all(group, lambda: _digests(_share(shards, group)))
        on_first(group, finish)
    except BaseException:
        if group is None or group.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_shards(
    path: Path, like: Tree, device: torch.device | str | None, group: ProcessGroup | None
) -> Tree:
    """Read what `save_shards` wrote, by any number of processes, spread as `like` is.

    Args:
        path: the folder.
        like: a state of the structure, shapes and dtypes to expect. Leaves that are DTensors there
            come back so, with the same placements; all others, and all without it, are whole.
        device: where the whole ones go, see `fdl.io.load`.
        group: the processes, which verify a share of the files each; None is this one alone.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or does not fit `like` (each path is listed).
    """
    check_shards(path, group)
    forms = inspect(path / ABOUT).metadata["sharded"]["leaves"]
    saved = load(path / ABOUT)
    whole = {
        at: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for at, (dtype, shape) in forms.items()
    }
    full = unflatten_dict(flatten_dict(saved) | whole, like=saved)
    if like is None:
        wanted: dict[str, Any] = dict.fromkeys(flatten_dict(full))
        like = full
    else:
        lines = differences(places(*describe(like, "load: like")), places(*describe(full, "load")))
        if lines:
            raise ValueError(f"load: {path} does not fit `like`:\n  " + "\n  ".join(lines))
        wanted = flatten_dict(like)
    spread = {at: _room(whole[at], wanted[at], device) for at in whole}
    if spread:
        _dcp_load(spread, path / SHARDS, group)
    kept = {at: leaf for at, leaf in flatten_dict(saved).items() if at not in whole}
    moved = {at: _moved(leaf, wanted[at], device) for at, leaf in kept.items()}
    return unflatten_dict(moved | spread, like=like)


def check_shards(path: Path, group: ProcessGroup | None) -> None:
    """Verify the SHA-256 of every file of the shards.

    Args:
        path: the folder.
        group: the processes that verify a share each.

    Raises:
        ValueError: a file is damaged, missing, or one too many.
    """
    expected = inspect(path / ABOUT).metadata["sharded"]["files"]
    found = {
        name: digest
        for part in on_all(group, lambda: _digests(_share(path / SHARDS, group)))
        for name, digest in part.items()
    }
    wrong = [name for name in expected.keys() | found if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"load: cannot read {path}: damaged or missing: {', '.join(sorted(wrong))}"
        )


def _share(folder: Path, group: ProcessGroup | None) -> list[Path]:
    """Give the files of which this process takes care, each to one of them."""
    first, stride = (0, 1) if group is None else (group.rank(), group.size())
    return sorted(folder.iterdir())[first::stride]


def _digests(files: list[Path]) -> dict[str, str]:
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _room(form: Tensor, like: Any, device: torch.device | str | None) -> Tensor:
    """Make the tensor to read into."""
    if is_dtensor(like):
        kind = like.device_mesh.device_type if like.device.type == "meta" else like.device
        return torch.empty_like(like.detach(), device=kind)
    return torch.empty_like(form, device=_place(like, device))


def _moved(leaf: Any, like: Any, device: torch.device | str | None) -> Any:
    return leaf.to(_place(like, device)) if isinstance(leaf, Tensor) else leaf


def _place(like: Any, device: torch.device | str | None) -> torch.device | str:
    if device is not None:
        return device
    return like.device if isinstance(like, Tensor) and like.device.type != "meta" else "cpu"


def check_summed(spread: Mapping[str, Any]) -> None:
    """Refuse DTensors with sums that are still to be made.

    Args:
        spread: leaves by path.

    Raises:
        TypeError: there are some (each path is listed).
    """
    partial = [at for at, leaf in spread.items() if any(p.is_partial() for p in leaf.placements)]
    if partial:
        raise TypeError(
            "Checkpointer: leaves whose parts are still to be summed: "
            f"{', '.join(partial)}; redistribute them to Shard or Replicate"
        )


# Of the formats that torch.distributed.checkpoint has, that of Hugging Face: it is safetensors all
# through, where the usual one keeps its table of contents as a pickle.


def _dcp_save(spread: dict[str, Any], folder: Path, group: ProcessGroup | None) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save_parts(spread, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # a BaseException
        raise OSError(f"Checkpointer: cannot write {folder}: {error}") from error


def _dcp_load(spread: dict[str, Any], folder: Path, group: ProcessGroup | None) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():  # it warns of being alone, which is as we want it
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load_parts(spread, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # a BaseException
        raise OSError(f"Checkpointer: cannot read {folder}: {error}") from error
