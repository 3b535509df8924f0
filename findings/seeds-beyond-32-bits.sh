#!/usr/bin/env bash
# torch 2.15.0: on the CPU only the low 32 bits of a seed count, without a word. `manual_seed` takes 64 bits and
# `initial_seed` shows them all, yet 0, 2**32, 2**63 and -2**63 draw the same numbers, and so do -1 and 2**32 - 1:
# the Mersenne Twister is seeded by 32 bits. Seeds that carry a rank or a job in their high half, as in
# `rank << 32 | seed`, or 64 bits of a hash, give every rank the same stream, or collide after 77,000 hashes (even
# odds). `torch.func._random.key`, JAX with x64 and NumPy use all 64 bits. Hash what you have down to 32 bits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch


def drawn(seed):
    """Four draws of the global generator, and the seed that it says it has."""
    torch.manual_seed(seed)
    return torch.rand(4).tolist(), torch.initial_seed()


print("torch", torch.__version__)
for seeds in ((0, 2**32, 2**63, -(2**63)), (-1, 2**32 - 1), (7, *(rank << 32 | 7 for rank in (1, 2)))):
    draws, names = zip(*map(drawn, seeds))
    assert len(set(names)) >= len(seeds) - 1, "torch shows other seeds"
    assert all(draw == draws[0] for draw in draws), "torch has changed"
    print(f"seeds {', '.join(map(str, seeds))}: all draw {draws[0][0]:.6f}, {draws[0][1]:.6f}, …")
other = torch.rand(4, generator=torch.Generator().manual_seed(1 << 31)).tolist()
assert other != drawn(0)[0]
print("seeds 0 and 2**31 draw others")
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
