"""Look for cyclic garbage less often while a program is traced and compiled.

Python's collector runs after each 700 new objects that stay, and now and then walks through all
objects of the process. Torch's compiler makes half a million of them that stay: its modules. To
walk through these again and again takes a third of the time of their import.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

OBJECTS = 200_000  # new ones that start a collection; garbage of so many fills some 50 MB

_lock = Lock()
_users = 0  # contexts that are entered, in all threads
_threshold = gc.get_threshold()  # before the first of them


@contextmanager
def fewer_collections() -> Iterator[None]:
    """Let the collector of the process start later, unless it is turned off."""
    global _users, _threshold
    with _lock:
        if _users == 0:
            _threshold = gc.get_threshold()
            gc.set_threshold(_later(_threshold[0]), *_threshold[1:])
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and gc.get_threshold()[0] == _later(_threshold[0]):  # else somebody's
                gc.set_threshold(*_threshold)
                if not gc.get_freeze_count():  # by somebody else
                    gc.freeze()
                    gc.unfreeze()  # now all objects are old, without a walk through them


def _later(objects: int) -> int:
    return max(OBJECTS, objects) if objects else 0  # 0 turns it off, like `gc.disable()`
