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


def together(worker, folder, size, device="cpu"):
    """All checks of a worker, in one group of processes."""
    # A device counted by NVML, since one that CUDA was asked for cannot be used after a fork.
    environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    command = [sys.executable, "-m", "tests.workers.forks", worker, str(folder), str(size), device]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_train_as_one(size, tmp_path):
    together("train_worker", tmp_path, size)


@pytest.mark.slow
def test_a_state_that_is_shared_out_is_the_same_state(tmp_path):
    for size in (4, 2):  # each reads what the one before has saved
        together("shard_worker", tmp_path, size)


@pytest.mark.slow
def test_dicts_filled_in_another_order_and_processes_that_count_nothing_change_nothing(tmp_path):
    together("order_worker", tmp_path, 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script", ["train_worker", "shard_worker"])
def test_by_nccl_with_a_process_for_each_gpu(script, tmp_path):
    together(script, tmp_path, torch.cuda.device_count(), "cuda")
