"""What several test files share."""

from collections.abc import Iterator

import pytest
import torch

import fdl.compile


@pytest.fixture
def plain_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `jit` trace as always, and run the graph without Inductor: breadth at a low price."""
    monkeypatch.setattr(fdl.compile, "_backend", lambda: {"backend": "aot_eager"})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Give torch one thread: on small tensors several mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
