"""The list of all runners, which imports neither torch nor JAX."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from train.bench.config import RunnerName
from train.bench.runner import Runner
from train.bench.task import Task

__all__ = ["RUNNERS", "SCALING", "Entry", "build", "missing", "runners_for"]


class Entry(NamedTuple):
    """A runner in the list."""

    make: str  # module:function
    label: str  # its name in tables
    needs: tuple[str, ...] = ()  # packages
    device: str | None = None  # None: runs on every device
    compiles: bool = True
    own_masks: bool = False  # dropout draws other masks than fdl


RUNNERS: dict[RunnerName, Entry] = {
    "fdl-scan": Entry("fdl_runners:Scan", "fdl.jit(fdl.scan(step))"),
    "fdl-chunk": Entry("fdl_runners:Chunk", "the same, as `train` runs it"),
    "fdl-step": Entry("fdl_runners:Step", "fdl.jit(step), Python loop"),
    "fdl-eager": Entry("fdl_runners:Eager", "fdl, eager", compiles=False),
    "learner": Entry(
        "torch_peers:Learner", "DataLoader, 4 workers", compiles=False, own_masks=True
    ),
    "eager": Entry("torch_peers:Eager", "nn.Module, eager", compiles=False, own_masks=True),
    "compile-model": Entry("torch_peers:CompiledModel", "torch.compile(model)", own_masks=True),
    "compile-step": Entry("torch_peers:CompiledStep", "torch.compile(step)", own_masks=True),
    "compile-step-cpp": Entry(
        "torch_peers:compiled_step_cpp",
        "torch.compile(step), C++ wrapper",
        device="cpu",
        own_masks=True,
    ),
    "compile-step-graphs": Entry(
        "torch_peers:CudaGraphs",
        "torch.compile(step), reduce-overhead",
        device="cuda",  # on the CPU that mode is the default one
        own_masks=True,
    ),
    "jax-step": Entry("jax_peers:Step", "jax.jit(step), optax", needs=("jax", "optax")),
    "jax-scan": Entry("jax_peers:Scan", "jax.jit(lax.scan(step))", needs=("jax", "optax")),
}

# For scaled batches: the best of each kind. On a CPU JAX's scan of convolutions takes ten times as
# long as its step, as the workload `lenet` shows.
SCALING: dict[str, tuple[RunnerName, ...]] = {
    "cpu": ("fdl-scan", "eager", "compile-step", "compile-step-cpp", "jax-step"),
    "cuda": ("fdl-scan", "eager", "compile-step", "compile-step-graphs", "jax-step", "jax-scan"),
}


def build(name: RunnerName, task: Task) -> Runner:
    """Import a runner and construct it with a task."""
    module, function = RUNNERS[name].make.split(":")
    runner: Runner = getattr(import_module(f"train.bench.{module}"), function)(task)
    return runner


def missing(name: RunnerName) -> list[str]:
    """List the packages that a runner needs and that are not installed."""
    return [package for package in RUNNERS[name].needs if find_spec(package) is None]


def runners_for(device: str, asked: tuple[RunnerName, ...], scaling: bool) -> list[RunnerName]:
    """Choose the runners of a workload, in the order of the list."""
    return [
        name
        for name, entry in RUNNERS.items()
        if entry.device in (None, device)
        and (name in asked if asked else not scaling or name in SCALING[device])
    ]
