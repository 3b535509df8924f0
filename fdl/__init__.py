"""Functional deep learning in PyTorch: pure functions, explicit state, explicit keys."""

from __future__ import annotations

from fdl import (
    checkpointing,
    data,
    debug,
    interop,
    io,
    losses,
    metrics,
    nn,
    optim,
    parallel,
    population,
    random,
    transforms,
    tree,
)
from fdl._compiler import (
    Jitted,
    Report,
    associative_scan,
    cond,
    disable_jit,
    fori_loop,
    jit,
    map,
    scan,
    switch,
    while_loop,
)
from fdl._training import StatefulLoss, TrainState, eval_step, supervised, train_step, update_bn
from fdl._version import __version__ as __version__

__all__ = [
    "Jitted",
    "Report",
    "StatefulLoss",
    "TrainState",
    "associative_scan",
    "checkpointing",
    "cond",
    "data",
    "debug",
    "disable_jit",
    "eval_step",
    "fori_loop",
    "interop",
    "io",
    "jit",
    "losses",
    "map",
    "metrics",
    "nn",
    "optim",
    "parallel",
    "population",
    "random",
    "scan",
    "supervised",
    "switch",
    "train_step",
    "transforms",
    "tree",
    "update_bn",
    "while_loop",
]
