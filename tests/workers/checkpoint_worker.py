"""One process of a group that saves or restores a state spread over it: see test_sharded.py.

`python tests/workers/checkpoint_worker.py ACTION FOLDER RANK SIZE`, each with the same FOLDER.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import (
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import fdl
from fdl import TrainState, nn, optim, random, tree
from fdl.checkpointing import Checkpointer

WAYS = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()]}


def plain(step: int) -> TrainState:
    """A state like any other; 5 × 3 and 2 × 5 do not divide by the number of processes."""
    model = nn.sequential(nn.linear(3, 5), nn.relu, nn.linear(5, 2))
    state = TrainState.create(model, optim.sgd(0.1, momentum=0.9), key=random.key(step))
    dtypes = {"half": torch.bfloat16, "double": torch.float64, "count": torch.int64}
    more = {
        name: random.randint(random.key(step + 1), (7,), -9, 9).to(dtype)
        for name, dtype in dtypes.items()
    }
    return state._replace(buffers=more, step=torch.tensor(step))


def spread(state: TrainState, way: str) -> TrainState:
    """Every matrix as a DTensor in that way, every vector by rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def distribute(leaf):
        if leaf.ndim == 0:
            return leaf
        return distribute_tensor(leaf, mesh, WAYS[way] if leaf.ndim == 2 else WAYS["rows"])

    return state._replace(
        params=tree.map(distribute, state.params),
        opt_state=tree.map(distribute, state.opt_state),
        buffers=tree.map(distribute, state.buffers),
    )


def whole(state: TrainState) -> TrainState:
    return tree.map(lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x, state)


def save(checkpointer: Checkpointer, folder: Path, rank: int) -> None:
    for step, way in enumerate(["rows", "columns", "whole", "rows"], start=1):
        checkpointer.save(spread(plain(step), way), metrics={"loss": 1 / step})
    with pytest.raises(TypeError, match=r"with the placement Partial: params\.0\.weight"):
        state = spread(plain(5), "rows")
        mesh = state.params["0"]["weight"].device_mesh
        part = torch.distributed.tensor.DTensor.from_local(torch.ones(5, 3), mesh, [Partial()])
        params = state.params | {"0": state.params["0"] | {"weight": part}}
        checkpointer.save(state._replace(params=params))
        checkpointer.wait()


def restore(checkpointer: Checkpointer, folder: Path, rank: int) -> None:
    for way in WAYS:
        like = spread(plain(0), way)
        found = checkpointer.restore(like=like)
        assert tree.diff(whole(found.state), plain(4)) == []
        for leaf, expected in zip(tree.leaves(found.state), tree.leaves(like), strict=True):
            assert type(leaf) is type(expected)
            if hasattr(expected, "placements"):
                assert leaf.placements == expected.placements
    assert tree.diff(checkpointer.restore().state, plain(4)) == []
    assert checkpointer.restore(checkpointer.best("loss", "max")).checkpoint.step == 3
    wrong = spread(plain(0)._replace(buffers={}), "rows")
    with pytest.raises(ValueError, match=r"buffers.*expected (empty dict|nothing), got"):
        checkpointer.restore(like=wrong)


def fail(checkpointer: Checkpointer, folder: Path, rank: int) -> None:
    """Process 1 cannot write its part: all of them hear of it."""
    if rank == 1:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        def write_data(*_):
            raise OSError("No space left on device")

        HuggingFaceStorageWriter.write_data = write_data
    checkpointer.save(spread(plain(5), "rows"))
    with pytest.raises(OSError, match="No space left on device"):
        checkpointer.wait()
    found = checkpointer.restore(like=spread(plain(0), "rows"))
    assert found.checkpoint.step == 4


def fail_late(checkpointer: Checkpointer, folder: Path, rank: int) -> None:
    """Process 1 cannot read its part back."""
    if rank == 1:
        fdl.checkpointing._distributed._digests = lambda files: (_ for _ in ()).throw(
            OSError("Input/output error")
        )
    checkpointer.save(spread(plain(5), "rows"))
    with pytest.raises(OSError, match="Input/output error"):
        checkpointer.wait()


def damaged(checkpointer: Checkpointer, folder: Path, rank: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpointer.restore(like=spread(plain(0), "rows"))
    assert found.checkpoint.step == 3
    assert any("000004-step-4, which is damaged" in str(w.message) for w in caught)


def killed(checkpointer: Checkpointer, folder: Path, rank: int) -> None:
    """Process 1 is gone when the next checkpoint is to be written."""
    checkpointer.save(spread(plain(5), "rows"))
    checkpointer.wait()
    state = spread(plain(6), "rows")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    checkpointer.save(state)
    with pytest.raises((OSError, RuntimeError)):
        checkpointer.wait()
    os._exit(0)  # the group is broken: nothing can be closed in order


def due(checkpointer: Checkpointer, folder: Path, rank: int) -> None:
    checkpointer._saved -= 100 * rank  # clocks may differ: the first one's counts
    assert not checkpointer.due()
    checkpointer._saved -= 100 * (1 - rank)
    assert checkpointer.due()


if __name__ == "__main__":
    action, folder, rank, size = sys.argv[1:]
    store = Path(folder).with_name(f"store-{action}")
    dist.init_process_group("gloo", f"file://{store}", rank=int(rank), world_size=int(size))
    with Checkpointer(folder, keep=2, every=50, group=dist.group.WORLD) as checkpointer:
        globals()[action](checkpointer, Path(folder), int(rank))
    dist.destroy_process_group()
    os._exit(0)  # what was asked has held; gloo's threads may abort a process that ends in order
