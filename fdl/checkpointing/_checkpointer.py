"""Checkpoints of a run: the newest few in a folder, each whole, and the newest intact one back.

with fdl.checkpointing.Checkpointer("run/checkpoints") as checkpointer:
    found = checkpointer.restore(like=state)      # None in a new folder
    state = found.state if found else state
    ...
    checkpointer.save(state, metrics={"loss": 0.1})
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fdl import tree
from fdl._dtensor import is_dtensor
from fdl._files import expanded
from fdl._training import TrainState
from fdl._version import __version__
from fdl.checkpointing._distributed import check_summed, save_shards
from fdl.checkpointing._folder import (
    Checkpoint,
    Mode,
    Restored,
    best_of,
    check_mode,
    files_in,
    readable,
    restore_newest,
    serial_of,
)
from fdl.checkpointing._lock import Lock
from fdl.io import _json, save
from fdl.io._schema import describe
from fdl.io._tree_file import check_storable
from fdl.metrics import Mean
from fdl.parallel._group import on_first
from fdl.tree import Tree


class Checkpointer:
    """Keep the newest checkpoints of a run in a folder, written while training goes on.

    A checkpoint is a file that appears whole or not at all, with a SHA-256 of all it holds. `save`
    copies the state to host memory and returns; a thread writes. What goes wrong there is raised by
    the next call, or by leaving the `with` block. Older checkpoints are removed once the new one is
    on the disk, so a full disk leaves them as they are.

    Args:
        folder: made if absent; locked, so that no other process saves there until `close`.
        keep: how many of the newest stay, at least 1.
        every: seconds between checkpoints, by which `due` answers.
        best: a metric and "min" or "max": its best checkpoint stays as well; NaN and the
            infinities are never the best.
        group: the processes that save one state together, `torch.distributed.group.WORLD` say: each
            of them makes this object and calls it alike. Leaves that are DTensors are written by
            all, each its part, everything else by the first.

    Raises:
        TypeError: `keep` is not an int, or `best` not a pair.
        ValueError: `keep`, `every` or `best` is out of range.
        BlockingIOError: another process, or another `Checkpointer`, has the folder.
        OSError: the folder cannot be made or written.

    >>> from fdl.checkpointing import checkpoints
    >>> import tempfile
    >>> from fdl import nn, optim, random
    >>> state = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, keep=2) as checkpointer:
    ...     for step in range(3):
    ...         state = state._replace(step=torch.tensor(step))
    ...         checkpointer.save(state, metrics={"loss": 1.0 / (step + 1)})
    ...     found = checkpointer.restore(like=state)
    ...     [checkpoint.step for checkpoint in checkpoints(folder)]
    [2, 1]
    >>> found.checkpoint.metrics, tree.diff(found.state, state)
    ({'loss': 0.3333333333333333}, [])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        every: float = 0.0,
        best: tuple[str, Mode] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(keep, int):
            raise TypeError(f"Checkpointer: keep must be an int, got {keep!r}")
        if keep < 1:
            raise ValueError(f"Checkpointer: keep must be at least 1, got {keep}")
        if not every >= 0:
            raise ValueError(f"Checkpointer: every must be at least 0 seconds, got {every}")
        if best is not None:
            if not isinstance(best, tuple) or len(best) != 2:
                raise TypeError(
                    f'Checkpointer: best must be a metric and a mode, ("loss", "min") say, '
                    f"got {best!r}"
                )
            check_mode("Checkpointer: best", best[1])
        self.folder = expanded(folder).absolute()  # the thread writes, wherever the process goes
        self._keep, self._every, self._best = keep, every, best
        self._group, self._writers = group, group and _another(group)
        self._lock: Lock | None = None
        self._closed = False
        on_first(group, self._take_folder)
        self._saved = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="Checkpointer")
        self._pending: Future[None] | None = None

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / "lock", f"Checkpointer: {self.folder}")
        for leftover in self.folder.glob(".*-step-*"):  # of a writer that was killed
            _remove(leftover)

    def due(self) -> bool:
        """Say whether `every` seconds have passed since the last checkpoint, or the beginning."""
        return on_first(self._group, lambda: time.monotonic() - self._saved >= self._every)

    def save(
        self,
        state: TrainState,
        *,
        metrics: Mapping[str, float] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a copy of the state, which may change or be donated at once, and begin to write it.

        Waits for the checkpoint before, if that is still being written.

        Args:
            state: what to save, whole, on any devices.
            metrics: numbers by name, for `best`: Python's, NumPy's, tensors of one element, or the
                `Mean`s that a step returns.
            config: what else is needed to go on from here: dicts, lists and what JSON has, NaN and
                the infinities.

        Raises:
            TypeError: something in `state`, `metrics` or `config` that cannot be saved (its path is
                named); a DTensor, and no `group` was given, or one whose parts are yet to be
                summed. Nothing is queued then.
            OSError: the checkpoint before could not be written; there is none of it.
            ValueError: this one is closed, or the state cannot be saved, see `fdl.io.save`.
        """
        if self._closed:
            raise ValueError(f"Checkpointer: {self.folder} is closed; make a new one")
        self.wait()
        if not isinstance(getattr(state, "step", None), Tensor):
            raise TypeError(
                f"Checkpointer.save: state must be a TrainState, got {type(state).__name__} "
                "without a tensor .step; fdl.io.save takes any tree"
            )
        metadata = {
            "step": int(state.step.max()),  # of a population they are one
            # As text, which has NaN and infinities, unlike JSON.
            "metrics": {name: str(_number(name, value)) for name, value in (metrics or {}).items()},
            "config": _config(config),
            "versions": _versions(),
        }
        # All that can be wrong is found here, not in the thread: there it would be raised late.
        _check(state)
        copied = _on_host(state, self._group)
        self._saved = time.monotonic()
        self._pending = self._pool.submit(self._write, copied, metadata)

    def _write(self, state: TrainState, metadata: dict[str, Any]) -> None:
        if self._writers is None:
            save(self._new(metadata, ".safetensors"), state, metadata=metadata)
        else:
            path = on_first(self._writers, lambda: self._new(metadata, ""))
            save_shards(path, state, metadata, self._writers)
        on_first(self._writers, self._remove_old)

    def _new(self, metadata: dict[str, Any], ending: str) -> Path:
        serial = max((serial_of(path) for path in files_in(self.folder)), default=0) + 1
        return self.folder / f"{serial:06d}-step-{metadata['step']}{ending}"

    def _remove_old(self) -> None:
        files = files_in(self.folder)
        best = best_of(readable(files), *self._best) if self._best else None
        for path in files[self._keep :]:
            if best is None or path != best.path:
                _remove(path)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Checkpoint | None:
        """Find the newest checkpoint, None where there is none; one that is unreadable is skipped.

        Only what it says of itself is read; `restore` reads and verifies it all.
        """
        self.wait()
        return next(readable(files_in(self.folder)), None)

    def best(self, metric: str, mode: Mode) -> Checkpoint | None:
        """Find, among the checkpoints that are there, the one where a metric is best.

        Args:
            metric: its name; a checkpoint without it, or where it is NaN or infinite, does not
                count.
            mode: "min" or "max".

        Raises:
            ValueError: another mode.
        """
        check_mode("best: mode", mode)
        self.wait()
        return best_of(readable(files_in(self.folder)), metric, mode)

    def restore(
        self,
        checkpoint: Checkpoint | None = None,
        *,
        like: Tree = None,
        device: torch.device | str | None = None,
    ) -> Restored | None:
        """Read the newest intact checkpoint, None where there is none at all; see `restore`.

        Args:
            checkpoint: this one instead of the newest, from `best` say.
            like: a state of the structure, shapes and dtypes to expect.
            device: where its tensors go.
        """
        self.wait()
        return restore_newest(self.folder, checkpoint, like, device, self._writers)

    def close(self) -> None:
        """Wait for the last checkpoint and let go of the folder; further calls do nothing.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            self._closed = True
            self._pool.shutdown()
            if self._lock is not None:
                self._lock.release()
            if self._writers is not None:
                dist.destroy_process_group(self._writers)
                self._writers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _remove(path: Path) -> None:
    """Remove a checkpoint; a folder under another name first, so that no half of one is seen."""
    if path.is_dir():
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def _another(group: ProcessGroup) -> ProcessGroup:
    """Make a group of the same processes for the thread that writes.

    Two threads must not use one group: each process would send in another order.
    """
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, ProcessGroup)  # this process is one of them
    return made


def _number(name: str, value: Any) -> float:
    """Take a metric as a number of the host."""
    if type(name) is not str:
        raise TypeError(f"Checkpointer.save: a name of metrics must be a str, got {name!r}")
    try:
        if isinstance(value, str):  # float would parse it
            raise TypeError
        number = value.value if isinstance(value, Mean) else value
        return float(number.item() if hasattr(number, "item") else number)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"Checkpointer.save: metrics[{name!r}] must be one number, or a tensor or Mean of one, "
            f"got {type(value).__name__}"
        ) from error


def _config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Copy what JSON can say, and refuse everything else."""
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(
            f"Checkpointer.save: config must be a dict, got {type(config).__name__}; "
            "of a dataclass take dataclasses.asdict"
        )
    copied = dict(config or {})
    _json.check(copied, "config", "Checkpointer.save")
    return copy.deepcopy(copied)


def _check(state: Tree) -> None:
    """Refuse a state that could not be written; all processes of a group find the same."""
    _, tensors = describe(state, "Checkpointer.save")
    spread = {at: leaf for at, leaf in tensors.items() if is_dtensor(leaf)}
    check_summed(spread)
    whole = {at: leaf for at, leaf in tensors.items() if at not in spread}
    check_storable(whole, "Checkpointer.save")


def _on_host(state: Tree, group: ProcessGroup | None) -> Tree:
    """Copy a tree to host memory; leaves that were one tensor stay one."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if is_dtensor(leaf) and group is None:
            raise TypeError(
                f"Checkpointer: a leaf is a {type(leaf).__name__} of shape {list(leaf.shape)}, "
                "spread over processes; make the Checkpointer with group=, in each of them"
            )
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.detach().to("cpu", copy=True)
        return copies[id(leaf)]

    return tree.map(copy, state)


def _versions() -> dict[str, str]:
    return {"fdl": __version__, "torch": str(torch.__version__)}
