"""Files and folders: paths as people write them, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fdl._checks import describe


def expanded(
    path: str | os.PathLike[str], caller: str, name: str = "path", content: object = None
) -> Path:
    """Convert a user's path to a `Path`, with `~` as the home folder.

    Args:
        path: the path.
        caller: function to name in an error message.
        name: name of the argument.
        content: the argument behind the path, with which it may have been exchanged.

    >>> expanded("~/run", "load") == Path.home() / "run", expanded("a~/b", "load")
    (True, PosixPath('a~/b'))
    """
    if not isinstance(path, str | os.PathLike):
        exchanged = isinstance(content, str | os.PathLike)
        hint = f"; the {name} is the first argument" if exchanged else ""
        raise TypeError(f"{caller}: {name} must be a str or a Path, got {describe(path)}{hint}")
    return Path(os.path.expanduser(path))


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that a crash at any time leaves either the old or the new one.

    The content is written to a temporary file in the same folder: write, flush, fsync, rename,
    fsync of the folder. After an error the temporary file is removed.

    The new file gets the permissions of the old one, and its owner if possible. Symbolic links are
    followed; a hard link to the old file keeps the old content.

    Args:
        path: the file; an old one is replaced.
        write: function that writes the content to the open file; it may seek.

    Raises:
        OSError: the folder or the old file cannot be written, `path` is a folder or a device, or
            the disk is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(f"{folder}/note", lambda file: print(file.write(b"whole"), file.tell()))
    ...     Path(folder, "note").read_bytes()
    5 5
    b'whole'
    """
    target, old = _target(Path(path))
    # Short enough for the file system, and recognisable by the name of the file.
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(8)}")
    try:
        # Opened normally, so that a new file gets the usual permissions.
        file = temporary.open("xb")
    except OSError as error:
        reason = f"{error.strerror}: cannot create a file in {target.parent}"
        raise OSError(error.errno, reason, os.fspath(target)) from error
    try:
        with file:
            if old is not None:
                _take_over(file.fileno(), old)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _target(path: Path) -> tuple[Path, os.stat_result | None]:
    """Resolve symbolic links; return the target and its `stat`, None if it does not exist."""
    target = Path(os.path.realpath(path))
    try:
        old = target.stat()  # raises for a link to itself
    except FileNotFoundError:
        return target, None
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", os.fspath(path))
    if not stat.S_ISREG(old.st_mode):  # a file would replace a device or a pipe
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", os.fspath(path))
    return target, old


def _take_over(descriptor: int, old: os.stat_result) -> None:
    """Give an open file the permissions of an old one, and its owner if possible."""
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush the entries of a folder to the disk, so that they survive a power failure.

    >>> sync_folder(".")
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
