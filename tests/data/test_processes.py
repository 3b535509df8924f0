"""Data in processes of their own: parts of a batch, and a run that is killed in mid-epoch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fdl import io, tree
from tests.workers.stream_worker import N, augmented, trained

ROOT = Path(__file__).parents[2]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.workers.stream_worker", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_augment_as_one(tmp_path):
    files = [tmp_path / f"{rank}.safetensors" for rank in range(2)]
    workers = [start("augment", rank, file) for rank, file in enumerate(files)]
    for worker in workers:
        with worker:
            assert worker.wait() == 0
    whole = augmented(None)
    parts = [io.load(file, like=[x[:4] for x in whole]) for file in files]
    assert tree.diff(whole, tree.map(lambda *x: torch.cat(x), *parts)) == []


@pytest.mark.slow
def test_a_stream_that_is_killed_in_mid_epoch_goes_on_with_the_same_bits(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.arange(3.0 * N, dtype=np.float32).reshape(N, 3) / N)
        np.save(tmp_path / name / "y.npy", np.ones((N, 1), np.float32))
    whole = trained(tmp_path / "whole")
    for step in ("4", "19"):  # in either epoch, which has 15 steps, two in a chunk
        with start("train", tmp_path / "cut") as worker:
            assert f"{step}\n" in worker.stdout  # reads up to it
            worker.kill()
        assert worker.returncode < 0
    assert tree.diff(trained(tmp_path / "cut"), whole) == []
