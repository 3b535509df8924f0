"""Programs compile for processors without the newest vectors.

Oracle: eager torch, on the same processor.
"""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from torch.nn import functional as F
import fdl

g = torch.Generator().manual_seed(0)
params = {"c": torch.randn(4, 1, 3, 3, generator=g), "w": torch.randn(64, 3, generator=g)}
images = torch.randn(9, 1, 8, 8, generator=g)

def loss(params):
    h = F.max_pool2d(torch.tanh(F.conv2d(images, params["c"], padding=1)), 2).flatten(1)
    return torch.log_softmax(h @ params["w"], 1).square().mean()

step = fdl.jit(torch.func.grad(loss), strict=True)
got, expected = step(params), torch.func.grad(loss)(params)
for name in params:
    torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
key = fdl.random.key(1)
draws = fdl.jit(lambda key: fdl.random.bits(key, (3001,)), strict=True)
torch.testing.assert_close(draws(key), fdl.random.bits(key, (3001,)), rtol=0, atol=0)
(report,) = step.report()
print(report.regions, report.cached)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_a_program_for_another_processor(capability: str) -> None:
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "FDL_CACHE": "0"}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    regions, cached = run.stdout.split()[-2:]
    assert int(regions) > 0 and cached == "False"
