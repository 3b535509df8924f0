"""The cache of compiled programs on disk: docs/cache.md describes it.

An entry is one file: a library, and behind it a description and a checksum of both, which loaders
of libraries ignore. It is written under another name and then renamed, so that no process sees a
part of it; a damaged entry is removed and compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EPERM
from functools import cache
from io import BufferedWriter
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import Any

LIMIT = 2**30  # bytes of all entries; then those that were used longest ago are removed
FOOTER = struct.Struct("<Q32s8s")  # size of the description, checksum, mark
MARK = b"fdl-prog"
# Suffixes of files: users may have others in a chosen folder.
ENTRY, UNFINISHED, HEADER = ".fdl", ".fdl-new", ".gch"
ABANDONED = 3600  # seconds after which a file that was being written is removed


def folder() -> Path | None:
    """Return the folder of the cache, or None for `FDL_CACHE=0` or a user without a home.

    It is `$FDL_CACHE`, else `fdl` in `$XDG_CACHE_HOME` or `~/.cache`.
    """
    chosen = os.environ.get("FDL_CACHE", "")
    if chosen == "0":
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else "~/.cache"  # as its specification demands
    try:
        # Absolute: a file without a folder in its name would be looked for among the libraries.
        return Path(chosen or f"{base}/fdl").expanduser().absolute()
    except (RuntimeError, OSError):  # there is no home, or no working directory
        return None


def find(name: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the file of an entry and its description, or None if there is none that is whole."""
    place = folder()
    if place is None or not _is_ours(place):
        return None
    path = place / name
    try:
        data = path.read_bytes()
    except OSError:
        return None
    about = _description(data)
    if about is None:
        with suppress(OSError):
            path.unlink()
        return None
    with suppress(OSError):
        os.utime(path)  # it was used now
    return path, about


def keep(name: str, library: Path, about: dict[str, Any]) -> Path | None:
    """Write an entry, and return its file; warn once and return None if that is not possible."""
    place = folder()
    if place is None:
        return None
    text = json.dumps(about, allow_nan=False).encode()
    try:
        data = library.read_bytes() + text
        data += FOOTER.pack(len(text), _checksum(data, len(text)), MARK)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(place):
            raise PermissionError(EPERM, "other users can write to it")
        _write(place / name, data)
        _remove_oldest(place)
    except OSError as error:
        _warn_once(f"{place}: {error.strerror or error}")
        return None
    return place / name


def count_entries(most: int) -> int:
    """Count the entries, up to a number."""
    place = folder()
    if place is None or not place.is_dir():
        return 0
    return sum(1 for _ in islice(place.glob(f"*{ENTRY}"), most))


def is_writable() -> bool:
    """Check that entries can be kept, unless the disk is full."""
    place = folder()
    if place is None:
        return False
    with suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _is_ours(place) and os.access(place, os.W_OK | os.X_OK)


@contextmanager
def lock(name: str) -> Iterator[BufferedWriter | None]:
    """Let one process compile an entry, and others wait for it; without a folder, do nothing.

    If the process is killed, the lock ends, unless another one has inherited the file. Entries
    share a lock if the first two characters of their names are equal.
    """
    place = folder()
    file: BufferedWriter | None = None
    if place is not None:
        with suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_ours(place):
                file = open(place / f"{name[:2]}.lock", "ab")  # noqa: SIM115
                fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield file
    finally:
        if file is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # also if a process forked meanwhile has it open
            file.close()


def _description(data: bytes) -> dict[str, Any] | None:
    """Return the description in an entry, or None if it is damaged."""
    if len(data) < FOOTER.size:
        return None
    size, checksum, mark = FOOTER.unpack(data[-FOOTER.size :])
    content = data[: -FOOTER.size]
    if mark != MARK or size > len(content) or _checksum(content, size) != checksum:
        return None
    about: dict[str, Any] = json.loads(content[len(content) - size :])
    return about


def _checksum(content: bytes, size: int) -> bytes:
    return hashlib.sha256(content + size.to_bytes(8, "little")).digest()


def _write(path: Path, data: bytes) -> None:
    """Write a file as a whole, or not at all."""
    temporary = path.with_name(token_hex(16) + UNFINISHED)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _remove_oldest(place: Path) -> None:
    """Remove what was used longest ago until the cache is half full, if it is full."""
    entries = []
    for path in place.iterdir():
        with suppress(OSError):  # another process has removed it
            status = path.stat()
            if path.suffix == UNFINISHED:
                remove_abandoned(path)
            elif path.suffix in (ENTRY, HEADER):
                entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    if total <= LIMIT:
        return
    for _, size, path in sorted(entries):
        if total <= LIMIT // 2:
            break
        with suppress(OSError):
            path.unlink()
        total -= size


def remove_abandoned(path: Path) -> None:
    """Remove a file that was being written by a process that has been killed."""
    with suppress(OSError):  # there is none, or another process has removed it
        if time.time() - path.stat().st_mtime > ABANDONED:
            path.unlink()


def script_to_write(command: Sequence[str]) -> str:
    """Return a script of the shell in which a command writes file $0, which is then named $1."""
    return f'{shlex.join(command)} && mv "$0" "$1" || {{ rm -f "$0"; exit 1; }}'


def _is_ours(place: Path) -> bool:
    """Check that no other user can put programs into the folder, unless it was chosen."""
    if os.environ.get("FDL_CACHE"):
        return True
    try:
        status = place.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"jit: compiled programs cannot be kept for the next process ({reason}); "
        "FDL_CACHE=FOLDER names another folder, FDL_CACHE=0 turns this off",
        stacklevel=2,
    )
