"""Files that appear whole or not at all, whatever happens in between."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that after a crash, at any moment, there is the old one or the new one.

    The content goes to a temporary file in the same folder and to the disk before the name does:
    write, flush, fsync, rename, fsync of the folder. After an error nothing is left behind.

    Args:
        path: the file; an old one is replaced.
        write: puts the content into the open file, at which it may also seek.

    Raises:
        OSError: the folder cannot be written, or the disk is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(f"{folder}/note", lambda file: print(file.write(b"whole"), file.tell()))
    ...     Path(folder, "note").read_bytes()
    5 5
    b'whole'
    """
    target = Path(path)
    # Opened like any file, so that it gets the usual permissions (those of tempfile are private).
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder, new and removed ones, survive a power cut.

    >>> sync_folder(".")
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
