"""Training on several processes equals training on one; parallel_run.py is one of them."""

import os
import subprocess
import sys
from pathlib import Path

import parallel_run
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_train_as_one(size, tmp_path):
    """All checks of parallel_run.py, in one group of processes: each would start torch anew."""
    tests = Path(parallel_run.__file__).parent
    env = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, parallel_run.__file__, str(tmp_path), str(rank), str(size)],
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(size)
    ]
    texts = [process.communicate(timeout=300)[1] for process in processes]
    assert [p.returncode for p in processes] == [0] * size, "\n".join(texts)
