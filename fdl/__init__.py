"""Functional deep learning in PyTorch: pure functions, explicit state, explicit keys."""

from fdl import (
    data,
    interop,
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
from fdl.checkpoint import inspect, load, load_torch, save, save_torch
from fdl.checkpointer import Checkpointer
from fdl.compile import disable_jit, jit, scan
from fdl.precision import Policy, with_policy
from fdl.training import TrainState, eval_step, supervised, train_step

__version__ = "0.1.0"

__all__ = [
    "Checkpointer",
    "Policy",
    "TrainState",
    "data",
    "disable_jit",
    "eval_step",
    "inspect",
    "interop",
    "jit",
    "load",
    "load_torch",
    "losses",
    "metrics",
    "nn",
    "optim",
    "parallel",
    "population",
    "random",
    "save",
    "save_torch",
    "scan",
    "supervised",
    "train_step",
    "transforms",
    "tree",
    "with_policy",
]
