"""Save the newest checkpoints of a run in a folder, and restore the newest intact one.

with fdl.checkpointing.Checkpointer("run/checkpoints") as checkpointer:
    restored = checkpointer.restore(like=state)  # None in a new folder
    state = restored.state if restored else state
    ...
    checkpointer.save(state, metrics={"loss": 0.1})
"""

from __future__ import annotations

import copy
import os
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
from fdl._checks import check_dict, check_number, check_positive
from fdl._dtensor import is_dtensor
from fdl._files import expanded
from fdl._training import TrainState
from fdl._version import __version__
from fdl.checkpointing._distributed import check_reduced, save_shards
from fdl.checkpointing._folder import (
    Checkpoint,
    Mode,
    Restored,
    best_of,
    check_checkpoint,
    check_mode,
    files_in,
    readable,
    restore_newest,
    serial_of,
)
from fdl.checkpointing._lock import Lock
from fdl.checkpointing._retention import remove, remove_old
from fdl.io import _json, save
from fdl.io._schema import describe
from fdl.io._tree_file import check_storable
from fdl.metrics import Mean
from fdl.parallel._group import on_first
from fdl.tree import Tree


class Checkpointer:
    """Keep the newest checkpoints of a run in a folder, written while training goes on.

    A checkpoint is a file that is written atomically and verified by SHA-256. `save` copies the
    state to host memory and returns; a thread writes the file. Its errors are raised by the next
    call, or on leaving the `with` block. Older checkpoints are removed once the new one is on the
    disk, so a full disk leaves them as they are.

    Args:
        folder: folder of the checkpoints, created if absent and locked until `close`.
        keep: number of newest checkpoints to keep, at least 1.
        every: seconds between checkpoints, used by `due`.
        best: a metric and "min" or "max": the best checkpoint is kept as well; NaN and the
            infinities are never the best.
        group: processes that save one state together, such as `torch.distributed.group.WORLD`.
            Each process constructs a `Checkpointer` and makes the same calls. Of DTensors each
            writes its part; the first writes everything else.

    Raises:
        TypeError: `keep` is not an int, `every` no number, `best` no pair, or `group` no group.
        ValueError: `keep`, `every` or `best` is out of range.
        BlockingIOError: another process, or another `Checkpointer`, uses the folder.
        OSError: the folder cannot be created or written.

    >>> from fdl.checkpointing import checkpoints
    >>> import tempfile
    >>> from fdl import nn, optim, random
    >>> state = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, keep=2) as checkpointer:
    ...     for step in range(3):
    ...         state = state._replace(step=torch.tensor(step))
    ...         checkpointer.save(state, metrics={"loss": 1.0 / (step + 1)})
    ...     restored = checkpointer.restore(like=state)
    ...     [checkpoint.step for checkpoint in checkpoints(folder)]
    [2, 1]
    >>> restored.checkpoint.metrics, tree.diff(restored.state, state)
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
        check_positive("Checkpointer", "keep", keep)
        check_number("Checkpointer", "every", every, "at least 0 seconds", lambda x: x >= 0)
        if best is not None:
            if not isinstance(best, tuple) or len(best) != 2:
                raise TypeError(
                    'Checkpointer: best must be a metric and a mode, such as ("loss", "min"), '
                    f"got {best!r}"
                )
            check_mode("Checkpointer: best", best[1])
        # Absolute, since the working directory may change.
        self.folder = expanded(folder, "Checkpointer", "folder").absolute()
        if group is not None and not isinstance(group, ProcessGroup):
            raise TypeError(f"Checkpointer: group must be a process group, got {group!r}")
        self._keep, self._every, self._best = keep, every, best
        self._group, self._writers = group, group and _duplicate(group)
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
            remove(leftover)

    def due(self) -> bool:
        """Return True if `every` seconds have passed since the last checkpoint, or the start."""
        return on_first(self._group, lambda: time.monotonic() - self._saved >= self._every)

    def save(
        self,
        state: TrainState,
        *,
        metrics: Mapping[str, float] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy the state, which may then change or be donated, and start to write it.

        Waits until the previous checkpoint is written.

        Args:
            state: the state to save, on any devices.
            metrics: numbers by name, for `best`: of Python or NumPy, tensors of one element, or the
                `Mean`s that a step returns.
            config: further data needed to resume: dicts and lists of JSON values, NaN and the
                infinities included.

        Raises:
            TypeError: something in `state`, `metrics` or `config` cannot be saved (its path is
                named), or there is a DTensor without a `group` or with a pending reduction. Nothing
                is written then.
            OSError: the previous checkpoint could not be written.
            ValueError: the `Checkpointer` is closed, or the state cannot be saved, see
                `fdl.io.save`.
        """
        if self._closed:
            raise ValueError(f"Checkpointer: {self.folder} is closed; make a new one")
        self.wait()
        if not isinstance(getattr(state, "step", None), Tensor):
            raise TypeError(
                f"Checkpointer.save: state must be a TrainState, got {type(state).__name__} "
                "without a tensor .step; fdl.io.save takes any tree"
            )
        if metrics is not None:
            check_dict("Checkpointer.save", "metrics", metrics, "a dict from names to numbers")
        metadata = {
            "step": int(state.step.max()),  # equal for all members of a population
            # As strings, because JSON has no NaN and infinities.
            "metrics": {name: str(_number(name, value)) for name, value in (metrics or {}).items()},
            "config": _config(config),
            "versions": _versions(),
        }
        # Errors are raised here, because those of the thread come late.
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
        on_first(self._writers, lambda: remove_old(self.folder, self._keep, self._best))

    def _new(self, metadata: dict[str, Any], ending: str) -> Path:
        serial = max((serial_of(path) for path in files_in(self.folder)), default=0) + 1
        return self.folder / f"{serial:06d}-step-{metadata['step']}{ending}"

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            OSError: the checkpoint could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint, None if there is none.

        Only its metadata is read; `restore` reads and verifies everything.
        """
        self.wait()
        return next(readable(files_in(self.folder)), None)

    def best(self, metric: str, mode: Mode) -> Checkpoint | None:
        """Return the checkpoint with the best value of a metric, None if there is none.

        Args:
            metric: name of the metric; checkpoints where it is missing or not finite are ignored.
            mode: "min" or "max".

        Raises:
            ValueError: the mode is neither.
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
        """Read the newest intact checkpoint; return None if there are no checkpoints.

        Damaged checkpoints are skipped as by `restore`.

        Args:
            checkpoint: read this one instead of the newest, such as the result of `best`.
            like: a state with the expected structure, shapes and dtypes.
            device: where the tensors go.

        Raises:
            TypeError: `checkpoint` is not one.
        """
        check_checkpoint("Checkpointer.restore", checkpoint)
        self.wait()
        return restore_newest(self.folder, checkpoint, like, device, self._writers)

    def close(self) -> None:
        """Wait for the last checkpoint and release the folder; further calls do nothing.

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


def _duplicate(group: ProcessGroup) -> ProcessGroup:
    """Make a group of the same processes for the thread that writes.

    Two threads must not share a group, because processes would send in different orders.
    """
    ranks = dist.get_process_group_ranks(group)
    duplicate = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    assert isinstance(duplicate, ProcessGroup)  # this process is one of them
    return duplicate


def _number(name: str, value: Any) -> float:
    """Convert a metric to a float."""
    if type(name) is not str:
        raise TypeError(f"Checkpointer.save: names of metrics must be str, got {name!r}")
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
    """Copy a config; raise if JSON cannot represent it."""
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(
            f"Checkpointer.save: config must be a dict, got {type(config).__name__}; "
            "for a dataclass use dataclasses.asdict"
        )
    copied = dict(config or {})
    _json.check(copied, "config", "Checkpointer.save")
    return copy.deepcopy(copied)


def _check(state: Tree) -> None:
    """Raise if a state cannot be written, in all processes of a group alike."""
    _, tensors = describe(state, "Checkpointer.save")
    sharded = {at: leaf for at, leaf in tensors.items() if is_dtensor(leaf)}
    check_reduced(sharded)
    others = {at: leaf for at, leaf in tensors.items() if at not in sharded}
    check_storable(others, "Checkpointer.save")


def _on_host(state: Tree, group: ProcessGroup | None) -> Tree:
    """Copy a tree to host memory; tied leaves stay tied."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if is_dtensor(leaf) and group is None:
            raise TypeError(
                f"Checkpointer: a leaf is a {type(leaf).__name__} of shape {list(leaf.shape)}, "
                "sharded over processes; make the Checkpointer with group=, in each process"
            )
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.detach().to("cpu", copy=True)
        return copies[id(leaf)]

    return tree.map(copy, state)


def _versions() -> dict[str, str]:
    return {"fdl": __version__, "torch": str(torch.__version__)}
