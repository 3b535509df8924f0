"""What all test files share."""

import pytest
import torch

import fdl._inductor

# On tensors this small several threads mostly wait for each other, the more so with `pytest -n`.
torch.set_num_threads(1)


@pytest.fixture
def plain_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `jit` trace as always, and run the graph without Inductor: breadth at a low price."""
    monkeypatch.setattr(fdl._inductor, "lower", lambda graph, *_: lambda leaves: graph(*leaves))
