"""Paths of files and folders, as people write them."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """Make a path of what a user gave, with `~` as the home folder, as a shell does it.

    >>> expanded("~/run") == Path.home() / "run", expanded("a~/b")
    (True, PosixPath('a~/b'))
    """
    return Path(os.path.expanduser(path))
