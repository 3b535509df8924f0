"""Replace attributes of torch while a function is traced; outside of that nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any

from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.func import functionalize

Hook = tuple[Any, str, Callable[[Any], Any]]  # owner, name, what makes a replacement
_lock = Lock()


def patching(*hooks: Hook) -> Callable[[], AbstractContextManager[None]]:
    """Make a context manager that several threads may be inside of at a time."""
    originals = [vars(owner)[name] for owner, name, _ in hooks]
    users = 0

    @contextmanager
    def patched() -> Iterator[None]:
        nonlocal users
        with _lock:
            users += 1
            if users == 1:
                for (owner, name, replacement), original in zip(hooks, originals, strict=True):
                    setattr(owner, name, replacement(original))
        try:
            yield
        finally:
            with _lock:
                users -= 1
                if users == 0:
                    for (owner, name, _), original in zip(hooks, originals, strict=True):
                        setattr(owner, name, original)

    return patched


def _functionalize_body(_: Any) -> Callable[..., Any]:
    def functionalize_body(self: Any, body: Callable[..., Any]) -> Callable[..., Any]:
        views = self.interpreter.functionalize_add_back_views()
        return functionalize(body, remove="mutations" if views else "mutations_and_views")

    return functionalize_body


# Under `functionalize(remove="mutations")`, the views in the bodies of loops stay views; torch's
# method mixes the two cases up, and makes copies of them.
views_in_bodies = patching((FunctorchFunctionalizeAPI, "functionalize", _functionalize_body))
