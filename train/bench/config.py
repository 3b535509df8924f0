"""The options of `python -m train bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

__all__ = ["Bench", "RunnerName", "WorkloadName"]

WorkloadName = Literal[
    "linreg",
    "softmax",
    "mlp",
    "dropout",
    "lenet",
    "lenet-momentum",
    "lenet-adam",
    "lenet-bn",
    "cnn",
    "lenet-scaling",
]
RunnerName = Literal[
    "fdl-scan",
    "fdl-chunk",
    "fdl-step",
    "fdl-eager",
    "learner",
    "eager",
    "compile-model",
    "compile-step",
    "compile-step-cpp",
    "compile-step-graphs",
    "jax-step",
    "jax-scan",
]


@dataclass(frozen=True)
class Bench:
    """Time fdl and its peers on the same work, and check that all train alike."""

    workloads: tuple[WorkloadName, ...] = get_args(WorkloadName)
    """Workloads to train; lenet-scaling is LeNet with each of the batch sizes."""
    runners: tuple[RunnerName, ...] = ()
    """Runners to time, each one way to train; all by default."""
    batch_sizes: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """Batch sizes of lenet-scaling."""
    rounds: int = 5
    """Number of rounds; each times every runner once."""
    steps: int = 100
    """Steps in one call of a runner, at most an epoch."""
    warm_starts: bool = True
    """Start every runner once more, to time its first call with what the first left on disk."""
    seconds: float = 0.3
    """Seconds that a round takes at least; it repeats the call."""
    seed: int = 0
    """Seed of the initial parameters, the order of the data, and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto (a GPU if there is one), cpu or cuda."""
    data: str = "auto"
    """Where Fashion-MNIST is: auto, sample or a folder."""
    out: Path | None = None
    """JSON file to write, which must not exist; runs/bench/TIME.json by default."""
    render: bool = False
    """Do not measure; rewrite docs/benchmark.md and its charts from docs/bench/*.json."""
