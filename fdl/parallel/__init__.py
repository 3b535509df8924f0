"""Data parallelism: each process computes a part of a batch, and all take the same update.

Under `torchrun`, every process runs the same program on the same state, from the same files with
the same key. Processes communicate by the functional collectives of `torch.distributed`, which
`fdl.jit` compiles with everything else: an epoch with its communication is still one program.
"""

from __future__ import annotations

from fdl.parallel._load_once import load_once
from fdl.parallel._replicated import check_replicated
from fdl.parallel._rows import own_rows
from fdl.parallel._shard import gather, shard
from fdl.parallel._step import eval_step, train_step

__all__ = [
    "check_replicated",
    "eval_step",
    "gather",
    "load_once",
    "own_rows",
    "shard",
    "train_step",
]
