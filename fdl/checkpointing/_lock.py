"""A file lock, which lets one process at a time use a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Lock:
    """Lock a file until `release`, or until the process ends in any way.

    Args:
        path: the lock file, which is created and stays; it names the process that holds it.
        what: name of the locked thing, used in the error message.

    Raises:
        BlockingIOError: another process, or this one, holds the lock.
        OSError: the file cannot be opened.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lock = Lock(Path(folder, "lock"), "it")
    ...     lock.release()
    ...     lock.released
    True
    """

    def __init__(self, path: Path, what: str) -> None:
        self.released = True
        # Not inherited by programs that this process starts, which may outlive it.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 100, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise BlockingIOError(
                f"{what} is in use by process {holder or 'unknown'}; "
                "wait until it has ended, or choose another folder"
            ) from None
        self.released = False
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock; further calls do nothing."""
        if not self.released:
            self.released = True
            os.close(self._descriptor)
