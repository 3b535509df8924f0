#!/usr/bin/env bash
# torch 2.15.0, torch.compile on a CPU with vectors of 256 bits (AVX2): a kernel that writes bools takes some thirty
# times as long as one that writes the same comparison as floats, and twenty times as long as eager torch. Each
# vector of 8 masks is spread over 32 bools through memory, one by one. What a ReLU or a dropout keeps for the
# backward pass is such a mask. With AVX-512 there are instructions for it. Keep masks as floats or bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import time
import timeit

import torch
import torch._inductor.config as config

config.cpp.simdlen = 256  # what AVX2 has; processors with AVX-512 can be told so, too
torch.set_num_threads(1)
x = torch.rand(1 << 16)


def seconds(fn):
    """The least time of a call of the compiled function."""
    fn = torch.compile(fn)
    best = float("inf")
    for _ in range(300):
        start = time.perf_counter()
        fn(x)
        best = min(best, time.perf_counter() - start)
    return best


print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
as_bools = seconds(lambda x: x > 0.5)
as_floats = seconds(lambda x: (x > 0.5).float())
print(f"65,536 comparisons, one thread: written as bools {as_bools * 1e6:.0f} µs, as floats {as_floats * 1e6:.0f} µs")
assert as_bools > 5 * as_floats, "torch has changed"
eager = min(timeit.repeat(lambda: x > 0.5, number=20, repeat=20)) / 20
print(f"eagerly, as bools {eager * 1e6:.0f} µs")
assert as_bools > 5 * eager
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
