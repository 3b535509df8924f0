"""The options of the command line: a frozen dataclass for each command."""

import math
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from train.image_sets import DataSet

__all__ = [
    "ELSEWHERE",
    "RECIPES",
    "SWEEPS",
    "Cnn",
    "Compare",
    "Data",
    "Dropout",
    "Eval",
    "Images",
    "Inspect",
    "LeNet",
    "LeNetBN",
    "Linreg",
    "LinregDecay",
    "Look",
    "Mlp",
    "Predict",
    "Recipe",
    "ResnetSmall",
    "Softmax",
    "Sweep",
    "WeightDecay",
    "check",
]


@dataclass(frozen=True)
class Recipe:
    """Options of every recipe."""

    epochs: int = 10
    """Passes over the training set."""
    batch_size: int = 256
    """Examples in a step; a smaller last batch of an epoch is padded and masked."""
    lr: float = 0.1
    """Learning rate."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """λ of the penalty λ · ½ Σ w²."""
    parts: int | None = None
    """Number of parts to cut batches into; equal parts give equal bits with torchrun."""
    validation: float = 0.0
    """Fraction of the training examples to hold out, and to evaluate on after each epoch."""
    patience: int | None = None
    """Epochs without a lower validation loss that end a run; it keeps the best weights."""
    seed: int = 0
    """Seed of the initial parameters, the order of the data, and dropout."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 …"""
    compile: Literal["auto", "on", "off"] = "auto"
    """on, off, or auto, which compiles runs that are long enough to pay for it."""
    out: Path | None = None
    """Folder for the results, not that of another run; runs/RECIPE/TIME by default."""
    resume: Path | None = None
    """Folder of a run to continue with its options, or runs/RECIPE for the newest run there."""
    log: Literal["off", "tensorboard"] = "off"
    """tensorboard writes the numbers of each epoch for TensorBoard too, into the folder."""
    save_every: float = 30.0
    """Seconds between checkpoints; the end, Ctrl-C and SIGTERM save one more."""


@dataclass(frozen=True)
class Linreg(Recipe):
    """Linear regression, y = 2 x₁ − 3.4 x₂ + 4.2 + noise, on ½ (ŷ − y)²."""

    epochs: int = 3
    batch_size: int = 10
    lr: float = 0.03
    examples: int = 1000
    """Number of examples to draw."""
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
    """Weight decay against overfitting: 200 features, 20 training examples."""

    epochs: int = 100
    batch_size: int = 1
    lr: float = 0.003
    weight_decay: float = 3.0
    examples: int = 20
    """Number of training examples; 100 more are drawn for testing."""


@dataclass(frozen=True)
class Images(Recipe):
    """Options of every recipe on images."""

    epochs: int = 10
    """Passes over the training images; ten passes over the sample count as one."""
    data_set: DataSet = "fashion-mnist"
    """What to classify: clothes, digits, kana, letters and digits (EMNIST, balanced) or objects."""
    data: str = "auto"
    """Where it is: a folder, auto (find or download it), or sample (a tenth of Fashion-MNIST)."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of the model; tf32 is for GPUs. Parameters and loss stay in float32."""


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

    epochs: int = 10
    lr: float = 0.1
    rates: tuple[float, float] = (0.2, 0.5)
    """Fraction of units dropped after each hidden layer."""


@dataclass(frozen=True)
class LeNet(Images):
    """LeNet with sigmoids and Xavier initialisation."""

    lr: float = 0.9


@dataclass(frozen=True)
class LeNetBN(Images):
    """LeNet with batch normalisation."""

    lr: float = 0.9


@dataclass(frozen=True)
class ResnetSmall(Images):
    """A small residual network, on images shifted and mirrored at random, with AdamW."""

    epochs: int = 15
    """Passes over the images (ten over the sample are one), and the length of the cosine."""
    lr: float = 0.005
    """Learning rate at its peak, after a warm-up of a tenth; it falls to 0 along a cosine."""
    momentum: float = 0.9
    """β₁ of AdamW."""
    weight_decay: float = 0.05
    """λ of AdamW: each step subtracts lr · λ · w from kernels and weights."""


@dataclass(frozen=True)
class Cnn(Images):
    """Three convolutions with ReLU, which only the benchmark trains."""


RECIPES: dict[str, type[Recipe]] = {
    "linreg": Linreg,
    "linreg-decay": LinregDecay,
    "softmax": Softmax,
    "mlp": Mlp,
    "dropout": Dropout,
    "weight-decay": WeightDecay,
    "lenet": LeNet,
    "lenet-bn": LeNetBN,
    "resnet-small": ResnetSmall,
}


Grid = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        metavar="NAME=VALUES",
        help="An option and the values to try, such as lr=0.1:1.6:8log, momentum=0:0.9:4lin, "
        "seed=0:8 or weight-decay=0,0.001. Repeat it for each axis of the grid.",
    ),
]
Gigabytes = Annotated[
    float | None,
    tyro.conf.arg(help="Most gigabytes of memory to use; by default half of the free memory."),
]
Validation = Annotated[
    float,
    tyro.conf.arg(
        help="Fraction of the training examples to hold out and to choose by, the same examples "
        "for every point. 0 chooses by the test set, which flatters the winner."
    ),
]
SWEEPS: dict[str, Any] = {
    name: make_dataclass(
        f"Sweep{kind.__name__}",
        [  # type: ignore[list-item]
            ("grid", Grid, ()),
            ("memory", Gigabytes, None),
            ("validation", Validation, 0.1),
            ("patience", Annotated[None, tyro.conf.Suppress], None),  # all points train to the end
            ("log", Annotated[Literal["off"], tyro.conf.Suppress], "off"),
        ],
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
    """Evaluate a saved run."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, runs/RECIPE/TIME, or runs/RECIPE for the newest run there."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 …"""
    data: str | None = None
    """Where the data set is: auto, sample or a folder; by default as in the run."""


@dataclass(frozen=True)
class Look(Eval):
    """Draw the confusion matrix of a saved run on images, and the images with the largest loss."""

    out: Path | None = None
    """Picture to write; look.png in the folder of the run by default."""


@dataclass(frozen=True)
class Predict:
    """Classify images with a saved run."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, runs/RECIPE/TIME, or runs/RECIPE for the newest run there."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")]
    """PNG, JPEG or WebP files; other sizes are cropped, made square and resized."""
    invert: Literal["auto", "on", "off"] = "auto"
    """Swap light and dark, as grey data sets are light on black; auto looks at the corners."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 …"""


@dataclass(frozen=True)
class Compare:
    """Print a table of saved runs, and draw their curves into one picture."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs, runs/RECIPE/TIME, or runs/RECIPE for the newest run there."""
    out: Path = Path("runs/compare.png")
    """Picture to write; an earlier one is replaced."""


@dataclass(frozen=True)
class Data:
    """Draw ten images with their labels and time one pass over the training set."""

    batch_size: int = 256
    """Number of examples in a batch."""
    seed: int = 0
    """Seed of the shuffle."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 …"""
    data_set: DataSet = "fashion-mnist"
    """What to draw."""
    data: str = "auto"
    """Where it is: auto (find or download it), a folder, or sample (of Fashion-MNIST)."""
    out: Path = Path("runs/data")
    """Folder for images.png."""


@dataclass(frozen=True)
class Inspect:
    """List the leaves of a saved file (path, shape, dtype, bytes) without loading them."""

    file: tyro.conf.Positional[Path]
    """A .safetensors file, or the folder of a run for its params.safetensors."""


# Options of a run that say where and how it is computed, not what.
ELSEWHERE = ("out", "resume", "device", "compile", "log", "save_every")
AT_LEAST_ONE = ("parts", "patience", "epochs", "batch_size", "examples", "rounds", "steps")
NOT_NEGATIVE = ("lr", "momentum", "weight_decay", "noise", "seconds", "save_every")


def check(config: Any) -> None:
    """Raise ValueError for the first option of a command that is out of its range.

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
        if field.name == "validation" and not 0 <= value < 1:
            raise ValueError(f"{option} must be at least 0 and below 1, got {value}")
        if field.name == "patience" and value is not None and not config.validation:
            raise ValueError(f"{option} {value} needs --validation, such as --validation 0.1")
        if field.name == "rates" and not all(0 <= rate < 1 for rate in value):
            raise ValueError(f"{option} must be in [0, 1), got {value}")
        if field.name == "images" and not value:
            raise ValueError("predict needs at least one image")
        if field.name == "runs" and len(value) < 2:
            raise ValueError(f"compare needs at least two runs, got {len(value)}")
        if field.name in ("workloads", "batch_sizes") and not value:
            raise ValueError(f"{option} must name at least one")
        if field.name == "batch_sizes" and min(value) < 1:
            raise ValueError(f"{option} must be at least 1, got {min(value)}")
        if field.name == "seed" and not 0 <= value < 2**64:
            raise ValueError(f"{option} must be in [0, 2**64), got {value}")
