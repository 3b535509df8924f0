"""What can be set from the command line: one frozen dataclass for each command."""

import math
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import tyro

__all__ = [
    "RECIPES",
    "SWEEPS",
    "Bench",
    "Data",
    "Dropout",
    "Eval",
    "Images",
    "Inspect",
    "LeNet",
    "LeNetBN",
    "Linreg",
    "LinregDecay",
    "Mlp",
    "Predict",
    "Recipe",
    "Softmax",
    "Sweep",
    "WayName",
    "WeightDecay",
    "WorkloadName",
    "check",
]


@dataclass(frozen=True)
class Recipe:
    """What every recipe has."""

    epochs: int = 10
    """Passes over the training set."""
    batch_size: int = 256
    """Examples in a step; the last, smaller batch of an epoch is padded and masked."""
    lr: float = 0.1
    """Learning rate."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """λ of the penalty λ · ½ Σ w²."""
    parts: int | None = None
    """Cut each batch into so many parts, each with its own dropout and batch statistics: the
    parameters are then the same to the bit on one process and, under torchrun, on several."""
    seed: int = 0
    """Of parameters, data order and dropout."""
    device: str = "auto"
    """auto (CUDA if present), cpu, cuda, cuda:1 …"""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto compiles where the run is long enough to win back the time."""
    out: Path | None = None
    """Folder for the results, which must not hold a run yet; runs/RECIPE/TIME by default."""
    resume: Path | None = None
    """Folder of a run to continue with its options, as if it had never ended; given anew may be
    --epochs, --device, --data and --save-every."""
    save_every: float = 30.0
    """Seconds between checkpoints; one more is made at the end, by Ctrl-C and by SIGTERM."""


@dataclass(frozen=True)
class Linreg(Recipe):
    """Linear regression, y = 2 x₁ − 3.4 x₂ + 4.2 + noise, on ½ (ŷ − y)²."""

    epochs: int = 3
    batch_size: int = 10
    lr: float = 0.03
    examples: int = 1000
    """Examples to draw."""
    noise: float = 0.01
    """Standard deviation of the noise."""


@dataclass(frozen=True)
class LinregDecay(Linreg):
    """Linear regression with weight decay, y = x₁ − x₂ + 2 x₃ + 5 + noise, on (ŷ − y)²."""

    epochs: int = 30
    batch_size: int = 50
    weight_decay: float = 0.1


@dataclass(frozen=True)
class WeightDecay(Recipe):
    """200 features, 20 training examples: what decay of the weights does to overfitting."""

    epochs: int = 100
    batch_size: int = 1
    lr: float = 0.003
    weight_decay: float = 3.0
    examples: int = 20
    """Training examples; 100 more are drawn for testing."""


@dataclass(frozen=True)
class Images(Recipe):
    """What every recipe on Fashion-MNIST has."""

    data: str = "auto"
    """A folder that holds Fashion-MNIST; `sample` for the embedded tenth of it; auto looks in the
    usual places, downloads, and offline takes the sample."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """What the model computes in: tf32 rounds the factors of products to 10 bits (CUDA only);
    with bfloat16 parameters, loss and optimizer stay in float32."""


@dataclass(frozen=True)
class Softmax(Images):
    """Softmax regression, 784–10."""

    epochs: int = 5


@dataclass(frozen=True)
class Mlp(Images):
    """Multilayer perceptron, 784–256–10."""

    epochs: int = 5
    lr: float = 0.5


@dataclass(frozen=True)
class Dropout(Images):
    """Multilayer perceptron with dropout, 784–256–256–10."""

    epochs: int = 5
    lr: float = 0.5
    rates: tuple[float, float] = (0.2, 0.5)
    """Fraction dropped after each hidden layer."""


@dataclass(frozen=True)
class LeNet(Images):
    """LeNet with sigmoids and Xavier initialisation."""

    lr: float = 0.9


@dataclass(frozen=True)
class LeNetBN(Images):
    """LeNet with batch normalisation."""

    lr: float = 0.9


RECIPES: dict[str, type[Recipe]] = {
    "linreg": Linreg,
    "linreg-decay": LinregDecay,
    "softmax": Softmax,
    "mlp": Mlp,
    "dropout": Dropout,
    "weight-decay": WeightDecay,
    "lenet": LeNet,
    "lenet-bn": LeNetBN,
}


Grid = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        metavar="NAME=VALUES",
        help="An option and its values, once for each axis of the grid: lr=0.1:1.6:8log, "
        "momentum=0:0.9:4lin, seed=0:8, weight-decay=0,0.001.",
    ),
]
Gigabytes = Annotated[
    float | None,
    tyro.conf.arg(help="Gigabytes that a sweep may take; half of what is free by default."),
]
SWEEPS: dict[str, Any] = {
    name: make_dataclass(
        f"Sweep{kind.__name__}",
        [("grid", Grid, ()), ("memory", Gigabytes, None)],  # type: ignore[list-item]
        bases=(kind,),
        frozen=True,
        namespace={"__doc__": f"Sweep over: {kind.__doc__}"},
    )
    for name, kind in RECIPES.items()
}
"""The recipes, each with a grid."""


@dataclass(frozen=True)
class Sweep:
    """Train every point of a grid of options, many models at once."""

    recipe: tyro.conf.OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            Union[  # noqa: UP007
                tuple(  # type: ignore[valid-type]  # known only now
                    Annotated[kind, tyro.conf.subcommand(name)] for name, kind in SWEEPS.items()
                )
            ]
        ]
    ]


@dataclass(frozen=True)
class Eval:
    """Evaluate what a run has saved."""

    run: tyro.conf.Positional[Path]
    """Its folder."""
    device: str = "auto"
    """auto (CUDA if present), cpu, cuda, cuda:1 …"""
    data: str | None = None
    """As for the recipes; that of the run by default."""


@dataclass(frozen=True)
class Predict:
    """Say what is on images, by what a run has saved."""

    run: tyro.conf.Positional[Path]
    """Its folder."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """PNG files, light on black as in Fashion-MNIST; colours become grey, other sizes 28 × 28."""


@dataclass(frozen=True)
class Data:
    """Draw ten images with their labels and time one pass over the training set."""

    batch_size: int = 256
    """Examples in a batch."""
    seed: int = 0
    """Of the order."""
    device: str = "auto"
    """auto (CUDA if present), cpu, cuda, cuda:1 …"""
    data: str = "auto"
    """As for the recipes."""
    out: Path = Path("runs/data")
    """Folder for images.png."""


WorkloadName = Literal[
    "linreg", "softmax", "mlp", "dropout", "lenet", "lenet-momentum", "lenet-scaling"
]
WayName = Literal[
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
    """Time fdl against every peer on the same work, and check that all train alike."""

    workloads: tuple[WorkloadName, ...] = get_args(WorkloadName)
    """What to train; lenet-scaling is LeNet with each of the batch sizes."""
    ways: tuple[WayName, ...] = ()
    """Only these ways; all by default."""
    batch_sizes: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """Of lenet-scaling."""
    rounds: int = 5
    """In a round every way is timed once."""
    steps: int = 100
    """Steps in one call of a way, fewer where an epoch or a scaled batch has fewer."""
    seconds: float = 0.3
    """A round repeats the call for at least so long."""
    seed: int = 0
    """Of parameters, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is CUDA if present."""
    data: str = "auto"
    """As for the recipes."""
    out: Path | None = None
    """The JSON file to write, which must not exist; runs/bench/TIME.json by default."""
    render: bool = False
    """Measure nothing: remake the tables of the README and the charts from docs/bench/*.json."""


@dataclass(frozen=True)
class Inspect:
    """Show what a saved file holds, path, shape, dtype and bytes, without loading it."""

    file: tyro.conf.Positional[Path]
    """A .safetensors file, of fdl or of another writer."""


AT_LEAST_ONE = ("parts", "epochs", "batch_size", "examples", "rounds", "steps")
NOT_NEGATIVE = ("lr", "momentum", "weight_decay", "noise", "seconds", "save_every")


def check(config: Recipe | Data | Bench | Inspect | Eval | Predict) -> None:
    """Raise ValueError for the first option out of its range, as the command line names it.

    >>> check(Linreg(lr=float("nan")))
    Traceback (most recent call last):
    ValueError: --lr must be finite and at least 0, got nan
    """
    for field in fields(config):
        value, option = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if field.name in AT_LEAST_ONE and value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
        if field.name in NOT_NEGATIVE and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{option} must be finite and at least 0, got {value}")
        if field.name == "rates" and not all(0 <= rate < 1 for rate in value):
            raise ValueError(f"{option} must be in [0, 1), got {value}")
        if field.name == "images" and not value:
            raise ValueError("predict needs at least one image")
        if field.name in ("workloads", "batch_sizes") and not value:
            raise ValueError(f"{option} must name at least one")
        if field.name == "batch_sizes" and min(value) < 1:
            raise ValueError(f"{option} must be at least 1, got {min(value)}")
        if field.name == "seed" and not 0 <= value < 2**64:
            raise ValueError(f"{option} must be in [0, 2**64), got {value}")
