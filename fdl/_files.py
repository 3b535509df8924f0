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


def expanded(path: str | os.PathLike[str]) -> Path:
    """Make a path of what a user gave, with `~` as the home folder, as a shell does it.

    >>> expanded("~/run") == Path.home() / "run", expanded("a~/b")
    (True, PosixPath('a~/b'))
    """
    return Path(os.path.expanduser(path))


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that after a crash, at any moment, there is the old one or the new one.

    The content goes to a temporary file in the same folder and to the disk before the name does:
    write, flush, fsync, rename, fsync of the folder. After an error nothing is left behind.

    An old file gives the new one its permissions, and its owner where that is allowed. Symbolic
    links stay, and the file they lead to is written; a hard link to the old file keeps that one.

    Args:
        path: the file; an old one is replaced.
        write: puts the content into the open file, at which it may also seek.

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
    target, old = _target(expanded(path))
    # Short, so that it fits where the name does; still that of the file, to be recognised by.
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(8)}")
    try:
        # Opened like any file, so that a new one gets the usual permissions.
        file = temporary.open("xb")
    except OSError as error:
        reason = f"{error.strerror}: cannot make a file in {target.parent}"
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
    """Follow symbolic links to the file that is meant; return what is there already as well."""
    target = Path(os.path.realpath(path))
    try:
        old = target.stat()  # raises for a link that leads back to itself
    except FileNotFoundError:
        return target, None
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", os.fspath(path))
    if not stat.S_ISREG(old.st_mode):  # a device or a pipe would be replaced by a file
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", os.fspath(path))
    return target, old


def _take_over(descriptor: int, old: os.stat_result) -> None:
    """Give an open file the owner, where that is allowed, and the permissions of an old one."""
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder, new and removed ones, survive a power cut.

    >>> sync_folder(".")
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
