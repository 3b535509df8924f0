"""The memory of intermediate results is not fetched from the system again at each call."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
import fdl
step = fdl.jit(lambda x: (x @ x.T).cumsum(0).cumsum(1).sum())
x = torch.ones(1500, 8)  # 9 MB for each result
for _ in range(5):  # the heap grows at first
    step(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**more: str) -> int:
    """Return how many pages twenty calls fetch."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    env.pop("GLIBC_TUNABLES", None)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env | more, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_calls_fetch_no_pages_unless_the_user_wants_it() -> None:
    pages = 9_000_000 // os.sysconf("SC_PAGESIZE")
    assert faults() < pages
    assert faults(MALLOC_MMAP_THRESHOLD_="1000000") > 20 * pages
