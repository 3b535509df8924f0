"""Training on several processes equals training on one; …_run.py is one of the processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
TESTS = Path(__file__).parent


def together(script, folder, size, device="cpu"):
    """All checks of a script, in one group of processes: each would start torch anew."""
    path = os.pathsep.join(map(str, [TESTS.parent, TESTS, os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, TESTS / script, str(folder), str(rank), str(size), device],
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
    together("parallel_run.py", tmp_path, size)


def test_a_state_that_is_shared_out_is_the_same_state(tmp_path):
    for size in (4, 2):  # each reads what the one before has saved
        together("sharded_run.py", tmp_path, size)


def test_dicts_filled_in_another_order_and_processes_that_count_nothing_change_nothing(tmp_path):
    together("order_run.py", tmp_path, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script", ["parallel_run.py", "sharded_run.py"])
def test_by_nccl_with_a_process_for_each_gpu(script, tmp_path):
    together(script, tmp_path, torch.cuda.device_count(), "cuda")
