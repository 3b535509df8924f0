"""States spread over processes, saved and restored by `Checkpointer`; a worker is one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fdl import tree
from fdl.checkpointing import Checkpointer, checkpoints, restore
from tests.workers import checkpoint_worker

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def together(action: str, folder: Path, size: int = 2, rcs: tuple[int, ...] | None = None) -> None:
    folder.with_name(f"store-{action}").unlink(missing_ok=True)
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:fdl",
        checkpoint_worker.__file__,
        action,
        str(folder),
    ]
    env = os.environ | {"PYTHONPATH": str(Path(checkpoint_worker.__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size)], stderr=subprocess.PIPE, text=True, env=env
        )
        for rank in range(size)
    ]
    texts = [process.communicate(timeout=120)[1] for process in processes]
    assert tuple(p.returncode for p in processes) == (rcs or (0,) * size), "\n".join(texts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread") / "run"
    together("save", folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """The saved checkpoints, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.slow
def test_the_newest_are_kept_and_nothing_else(saved):
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["000003-step-3", "000004-step-4", "lock"]
    assert [found.metrics for found in checkpoints(saved)] == [{"loss": 1 / 4}, {"loss": 1 / 3}]


def test_no_pickle_in_a_checkpoint(saved):
    files = [path for path in saved.glob("*/**/*") if path.is_file()]
    assert len(files) == 6  # of two checkpoints, by two processes
    assert {path.suffix for path in files} == {".safetensors"}


@pytest.mark.parametrize("like", [None, "plain", "meta"])
def test_one_process_reads_what_two_wrote(saved, like):
    state = checkpoint_worker.plain(4)
    target = {
        None: None,
        "plain": checkpoint_worker.plain(0),
        "meta": tree.map(lambda leaf: leaf.to("meta"), state),
    }[like]
    found = restore(saved, like=target)
    assert tree.diff(found.state, state) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_reads_it_spread_in_any_way(copied, size):
    together("restore", copied, size)


@pytest.mark.slow
def test_what_one_process_cannot_write_is_raised_in_all(copied):
    together("fail", copied)
    together("fail_late", copied)
    assert sorted(p.name for p in copied.iterdir()) == ["000003-step-3", "000004-step-4", "lock"]


@pytest.mark.slow
def test_a_killed_process_leaves_the_checkpoints_before(copied):
    together("killed", copied, rcs=(0, -9))
    assert [found.step for found in checkpoints(copied)] == [5, 4]
    with Checkpointer(copied) as checkpointer:  # removes what is left of the one never finished
        assert tree.diff(checkpointer.restore().state, checkpoint_worker.plain(5)) == []
    assert not list(copied.glob(".*"))


@pytest.mark.slow
def test_the_first_process_says_when_one_is_due(tmp_path):
    together("due", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bit", "missing", "more"])
def test_a_damaged_one_is_skipped_by_all(copied, damage):
    file = sorted((copied / "000004-step-4" / "shards").iterdir())[1]
    if damage == "bit":
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 4
        file.write_bytes(raw)
    elif damage == "missing":
        file.unlink()
    else:
        file.with_name("another.safetensors").write_bytes(file.read_bytes())
    with pytest.warns(RuntimeWarning, match="000004-step-4, which is damaged: .* damaged or missi"):
        assert restore(copied).checkpoint.step == 3
    if damage == "bit":
        together("damaged", copied)


def test_without_a_group_the_error_says_what_to_do(tmp_path):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        leaf = distribute_tensor(torch.ones(4), mesh)
        state = checkpoint_worker.plain(0)._replace(buffers={"x": leaf})
        with (
            Checkpointer(tmp_path) as checkpointer,
            pytest.raises(TypeError, match=r"a DTensor of shape \[4\].*make the Checkp.* group="),
        ):
            checkpointer.save(state)
    finally:
        dist.destroy_process_group()
