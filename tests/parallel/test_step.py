"""Training on several processes equals training on one; a worker is one of the processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
ROOT = Path(__file__).parents[2]


def together(script, folder, size, device="cpu"):
    """All checks of a script, in one group of processes: each would start torch anew."""
    path = os.pathsep.join(map(str, [ROOT, os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, ROOT / "tests/workers" / script, str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), device],
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(size)
    ]
    texts = [process.communicate(timeout=300)[1] for process in processes]
    assert [p.returncode for p in processes] == [0] * size, "\n".join(texts)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_train_as_one(size, tmp_path):
    together("train_worker.py", tmp_path, size)


def test_a_state_that_is_shared_out_is_the_same_state(tmp_path):
    for size in (4, 2):  # each reads what the one before has saved
        together("shard_worker.py", tmp_path, size)


def test_dicts_filled_in_another_order_and_processes_that_count_nothing_change_nothing(tmp_path):
    together("order_worker.py", tmp_path, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script", ["train_worker.py", "shard_worker.py"])
def test_by_nccl_with_a_process_for_each_gpu(script, tmp_path):
    together(script, tmp_path, torch.cuda.device_count(), "cuda")
