"""Checkpoints of a run: the newest few in a folder, each whole, and the newest intact one back.

with fdl.Checkpointer("run/checkpoints") as checkpointer:
    found = checkpointer.restore(like=state)      # None in a new folder
    state = found.state if found else state
    ...
    checkpointer.save(state, metrics={"loss": 0.1})
"""

import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from fdl import tree
from fdl._lock import Lock
from fdl._safetensors import read_header, read_tensors
from fdl.checkpoint import inspect, load, save
from fdl.training import TrainState
from fdl.tree import Tree

__all__ = ["Checkpoint", "Checkpointer", "Restored", "checkpoints", "restore"]

Mode = Literal["min", "max"]

# Counted, and not only by step: a run that goes on from an earlier checkpoint does steps again.
_NAME = re.compile(r"(\d{6,})-step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    """A checkpoint in its folder, and what it says of itself.

    >>> checkpoint = Checkpoint(Path("000001-step-5.safetensors"), 5, {"loss": 0.1}, {}, {})
    >>> checkpoint.metrics["loss"]
    0.1
    """

    path: Path
    step: int
    metrics: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]  # of fdl and torch, that wrote it


class Restored(NamedTuple):
    """A state, and the checkpoint it was read from.

    >>> checkpoint = Checkpoint(Path("000001-step-5.safetensors"), 5, {}, {}, {})
    >>> state, (_, step, *_) = Restored({"w": torch.ones(1)}, checkpoint)
    >>> step
    5
    """

    state: Any
    checkpoint: Checkpoint


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
        best: a metric and "min" or "max": its best checkpoint stays as well.

    Raises:
        ValueError: `keep`, `every` or `best` is out of range.
        BlockingIOError: another process, or another `Checkpointer`, has the folder.
        OSError: the folder cannot be made or written.

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
    ) -> None:
        if keep < 1:
            raise ValueError(f"Checkpointer: keep must be at least 1, got {keep}")
        if not every >= 0:
            raise ValueError(f"Checkpointer: every must be at least 0 seconds, got {every}")
        if best is not None:
            _check_mode("Checkpointer: best", best[1])
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._every, self._best = keep, every, best
        self._lock = Lock(self.folder / "lock", f"Checkpointer: {self.folder}")
        for leftover in self.folder.glob(".*.safetensors.*"):  # of a writer that was killed
            leftover.unlink()
        self._saved = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="Checkpointer")
        self._pending: Future[None] | None = None

    def due(self) -> bool:
        """Say whether `every` seconds have passed since the last checkpoint, or the beginning."""
        return time.monotonic() - self._saved >= self._every

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
            metrics: numbers by name, for `best`.
            config: what else is needed to go on from here: anything that JSON can say.

        Raises:
            TypeError: a leaf that is distributed over processes.
            OSError: the checkpoint before could not be written; there is none of it.
            ValueError: this one is closed.
        """
        if self._lock.released:
            raise ValueError(f"Checkpointer: {self.folder} is closed; make a new one")
        self.wait()
        copy = _on_host(state)
        self._saved = time.monotonic()
        metadata = {
            "step": int(copy.step.max()),  # of a population they are one
            # As text, which has NaN and infinities, unlike JSON.
            "metrics": {name: str(float(value)) for name, value in (metrics or {}).items()},
            "config": dict(config or {}),
            "versions": _versions(),
        }
        self._pending = self._pool.submit(self._write, copy, metadata)

    def _write(self, state: TrainState, metadata: dict[str, Any]) -> None:
        serial = max((_serial(path) for path in _files(self.folder)), default=0) + 1
        path = self.folder / f"{serial:06d}-step-{metadata['step']}.safetensors"
        save(path, state, metadata=metadata)
        self._remove_old()

    def _remove_old(self) -> None:
        files = _files(self.folder)
        best = _best(_readable(files), *self._best) if self._best else None
        for path in files[self._keep :]:
            if best is None or path != best.path:
                path.unlink()

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
        return next(_readable(_files(self.folder)), None)

    def best(self, metric: str, mode: Mode) -> Checkpoint | None:
        """Find, among the checkpoints that are there, the one where a metric is best.

        Args:
            metric: its name; a checkpoint without it, or with NaN, does not count.
            mode: "min" or "max".

        Raises:
            ValueError: another mode.
        """
        _check_mode("best: mode", mode)
        self.wait()
        return _best(_readable(_files(self.folder)), metric, mode)

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
        return restore(self.folder, checkpoint, like=like, device=device)

    def close(self) -> None:
        """Wait for the last checkpoint and let go of the folder; further calls do nothing.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def checkpoints(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """List the readable checkpoints in a folder, the newest first, whoever is writing there.

    Args:
        folder: of a `Checkpointer`.

    Raises:
        FileNotFoundError: no such folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints(folder)
    []
    """
    return list(_readable(_files(Path(folder))))


def restore(
    folder: str | os.PathLike[str],
    checkpoint: Checkpoint | None = None,
    *,
    like: Tree = None,
    device: torch.device | str | None = None,
) -> Restored | None:
    """Read the newest checkpoint that is intact, None where there is none at all.

    A damaged one is skipped with a warning that names it.

    Args:
        folder: of a `Checkpointer`, which another process may be writing to.
        checkpoint: this one instead of the newest.
        like: a state of the structure, shapes and dtypes to expect; without it the file alone
            says what there is.
        device: where the tensors go, see `fdl.load`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there are checkpoints, and all are damaged; or one is intact and is not `like`
            this (each path is listed).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     restore(folder)
    """
    files = _files(Path(folder)) if checkpoint is None else [checkpoint.path]
    found = _readable(files) if checkpoint is None else iter([checkpoint])
    for candidate in found:
        try:
            return Restored(load(candidate.path, like=like, device=device), candidate)
        except (OSError, ValueError) as error:
            if checkpoint is not None or _is_intact(candidate.path):
                raise
            _warn(candidate.path, error)
    if not files or not any(path.exists() for path in files):
        return None
    raise ValueError(
        f"restore: none of the {len(files)} checkpoints in {folder} is intact; "
        "move them away to begin anew"
    )


def _files(folder: Path) -> list[Path]:
    """List the checkpoints, the newest first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_serial, reverse=True)


def _serial(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _readable(files: list[Path]) -> Iterator[Checkpoint]:
    for path in files:
        try:
            about = inspect(path).metadata
            metrics = {name: float(text) for name, text in about["metrics"].items()}
            yield Checkpoint(path, about["step"], metrics, about["config"], about["versions"])
        except (OSError, ValueError, KeyError) as error:
            _warn(path, error)


def _warn(path: Path, error: Exception) -> None:
    if path.exists():  # a writer may have removed it meanwhile, as one too old
        warnings.warn(
            f"Checkpointer: skipped {path}, which is damaged: {error}", RuntimeWarning, stacklevel=4
        )


def _is_intact(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            header = read_header(file.fileno(), "")
            for name in header.entries:
                read_tensors(file.fileno(), header, [name], "")
    except (OSError, ValueError):
        return False
    return True


def _best(found: Iterator[Checkpoint], metric: str, mode: Mode) -> Checkpoint | None:
    """Of equal ones, the newest."""
    with_it = [c for c in found if c.metrics.get(metric, float("nan")) == c.metrics.get(metric)]
    choose = min if mode == "min" else max
    return choose(with_it, key=lambda c: c.metrics[metric], default=None)


def _check_mode(what: str, mode: str) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f'{what} must be "min" or "max", got {mode!r}')


def _on_host(state: Tree) -> Tree:
    """Copy a tree to host memory; leaves that were one tensor stay one."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if type(leaf).__module__.startswith("torch.distributed"):
            raise TypeError(
                f"Checkpointer: a leaf is a {type(leaf).__name__} of shape {list(leaf.shape)}, "
                "distributed over processes, which cannot be saved yet; pass leaf.full_tensor() "
                "in its place, and save in one of the processes"
            )
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.detach().to("cpu", copy=True)
        return copies[id(leaf)]

    return tree.map(copy, state)


def _versions() -> dict[str, str]:
    from fdl import __version__  # not yet there while fdl is being imported

    return {"fdl": __version__, "torch": str(torch.__version__)}
