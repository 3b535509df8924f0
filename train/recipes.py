"""Make data, model, loss and optimizer of a recipe from its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import models
from fdl import (
    StatefulLoss,
    TrainState,
    data,
    losses,
    metrics,
    optim,
    parallel,
    random,
    supervised,
    tree,
)
from fdl.data import Dataset
from fdl.nn import Model, Policy, StatefulModel, with_policy
from fdl.optim import Optimizer
from fdl.tree import Tree
from train.config import (
    Cnn,
    Dropout,
    Images,
    LeNet,
    LeNetBN,
    Linreg,
    LinregDecay,
    Mlp,
    Recipe,
    ResnetSmall,
    Softmax,
    WeightDecay,
)
from train.image_sets import IMAGE_SETS, load_images

__all__ = [
    "Problem",
    "build",
    "find_device",
    "image_model",
    "image_problem",
    "notes",
    "set_precision",
    "set_up",
]


EXAMPLES = 60_000  # in an epoch of images: one pass over Fashion-MNIST, ten over the sample


class Problem(NamedTuple):
    """The training problem of a recipe, on one device."""

    model: Model | StatefulModel
    opt: Optimizer
    loss: Callable[..., Any] | StatefulLoss
    train: Dataset
    validation: Dataset | None  # held out from the training set
    test: Dataset | None
    data: str  # description of the data set
    summary: Callable[[Tree], str]  # describes the final parameters
    passes: int = 1  # over the training set in an epoch


def set_up(
    config: Recipe, device: torch.device, mesh: Any = None
) -> tuple[Problem, TrainState, Tensor]:
    """Make the problem of a recipe, its initial state, and the key of the order of the data.

    The processes of a mesh share one copy of the images on each host.

    >>> problem, state, data_key = set_up(Linreg(), torch.device("cpu"))
    >>> state.step, data_key.shape
    (tensor(0), torch.Size([2]))
    """
    set_precision(config, device)
    state_key, data_key, problem_key = random.split(random.key(config.seed, device), 3)
    problem = build(config, problem_key, mesh)
    return problem, TrainState.create(problem.model, problem.opt, key=state_key), data_key


def build(config: Recipe, key: Tensor, mesh: Any = None) -> Problem:
    """Make the problem of a recipe; random data are drawn from `key`, on its device.

    >>> build(Linreg(), random.key(0)).train.x.shape
    torch.Size([1000, 2])
    """
    match config:
        case LinregDecay():
            return _linreg_decay(config, key)
        case Linreg():
            return _linreg(config, key)
        case WeightDecay():
            return _weight_decay(config, key)
        case Images():
            return _images(config, key.device, mesh)
    raise TypeError(f"no recipe for {config!r}")


def _hold_out(config: Recipe, train: Dataset) -> tuple[Dataset, Dataset | None]:
    """Split off the validation set; its rows do not depend on the seed, which a sweep may vary."""
    if not config.validation:
        return train, None
    n = len(train.x)
    if not 0 < round(config.validation * n) < n:
        raise ValueError(f"--validation {config.validation} of {n} examples leaves one part empty")
    return data.split(random.key(0, train.x.device), train, config.validation)


def _sgd(config: Recipe) -> Optimizer:
    return optim.sgd(config.lr, config.momentum, weight_decay=config.weight_decay)


def _linreg(config: Linreg, key: Tensor) -> Problem:
    w, b = [2.0, -3.4], 4.2
    drawn = data.synthetic_linear(key, w, b, config.examples, config.noise)
    model = models.linreg(2)
    loss = supervised(model, losses.squared_loss)
    summary = _weights(("true", w, b))
    return Problem(
        model, _sgd(config), loss, *_hold_out(config, drawn), None, f"y = x · {w} + {b}", summary
    )


def _linreg_decay(config: LinregDecay, key: Tensor) -> Problem:
    w, b = [1.0, -1.0, 2.0], 5.0
    train, validation = _hold_out(
        config, data.synthetic_linear(key, w, b, config.examples, config.noise)
    )
    model = models.linreg(3)
    loss = supervised(model, losses.mse)
    *ridge_w, ridge_b = ridge(train, config.weight_decay).tolist()
    summary = _weights(("true", w, b), ("ridge", ridge_w, ridge_b))
    description = f"y = x · {w} + {b}"
    return Problem(model, _sgd(config), loss, train, validation, None, description, summary)


def ridge(train: Dataset, weight_decay: float) -> Tensor:
    """Minimise the mean of (x·w + b − y)² plus λ · ½ (Σ w² + b²), in closed form.

    A gradient of 0 means (2/n · XᵀX + λ I) [w, b] = 2/n · Xᵀy, where X has a column of ones.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> ridge(Dataset(x, 2 * x + 1), 0.0)
    tensor([2., 1.], dtype=torch.float64)
    """
    y = train.y.double()
    x = torch.cat([train.x.double(), torch.ones_like(y)], 1)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    n = len(x)
    solution = torch.linalg.solve(2 / n * x.T @ x + weight_decay * identity, 2 / n * x.T @ y)
    return solution[:, 0].round(decimals=9)


def _weights(*others: tuple[str, list[float], float]) -> Callable[[Tree], str]:
    """Make a summary that lists the learned w and b below others, a line each."""

    def summary(params: Tree) -> str:
        learned = ("learned", params["weight"].flatten().tolist(), params["bias"].item())
        return "\n".join(
            f"{name:8}w = [{', '.join(f'{x:.4f}' for x in w)}], b = {b:.4f}"
            for name, w, b in [*others, learned]
        )

    return summary


def _weight_decay(config: WeightDecay, key: Tensor) -> Problem:
    features, tests = 200, 100
    w = [0.01] * features
    drawn = data.synthetic_linear(key, w, 0.05, config.examples + tests, 0.01)
    train, test = (
        Dataset(drawn.x[rows], drawn.y[rows])
        for rows in (slice(config.examples), slice(config.examples, None))
    )
    model = models.linreg(features, std=1.0)
    # Only weights decay: a bias shifts the fit and cannot overfit.
    opt = optim.chain(
        optim.add_decayed_weights(config.weight_decay, mask="weight"),
        optim.sgd(config.lr, config.momentum),
    )
    loss = supervised(model, losses.squared_loss)
    return Problem(
        model,
        opt,
        loss,
        *_hold_out(config, train),
        test,
        "y = 0.05 + Σ 0.01 x",
        lambda params: f"‖w‖ = {params['weight'].norm().item():.4f}",
    )


def _images(config: Images, device: torch.device, mesh: Any) -> Problem:
    train, test, description = parallel.load_once(
        lambda: load_images(config.data, config.data_set), mesh
    )
    train, test = tree.to((train, test), device)
    passes = EXAMPLES // len(train.x) if config.data_set == "fashion-mnist" else 1
    return image_problem(config, train, test, description, passes)


def image_problem(
    config: Images, train: Dataset, test: Dataset | None, description: str, passes: int = 1
) -> Problem:
    """Make the problem of a recipe from loaded images.

    >>> x, y = torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    >>> image_problem(LeNet(), Dataset(x, y), None, "one black image").data
    'one black image'
    """
    model = image_model(config)
    train, validation = _hold_out(config, train)
    loss: Any = supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
    opt = _sgd(config)
    if isinstance(config, ResnetSmall):
        steps = config.epochs * passes * math.ceil(len(train.x) / config.batch_size)
        mirrored = IMAGE_SETS[config.data_set].mirrored
        loss, opt = _augmented(loss, mirrored), _adamw(config, steps)
    return Problem(model, opt, loss, train, validation, test, description, tree.summary, passes)


def _adamw(config: ResnetSmall, steps: int) -> Optimizer:
    """AdamW whose rate rises along a line for a tenth of the steps, then falls along a cosine.

    The peak is in the state, where a sweep sets it. Biases and norms do not decay: they are vectors
    that shift and scale, and cannot overfit.
    """
    share = optim.schedules.warmup_cosine(1.0, steps // 10, steps)

    def descend(g: Tensor, p: Tensor, t: Tensor, lr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -lr * share(t - 1) * g, {}

    return optim.chain(
        optim.scale_by_adam((config.momentum, 0.999)),
        optim.add_decayed_weights(config.weight_decay, mask=lambda path, leaf: leaf.ndim > 1),
        optim.leafwise("adamw", descend, {"lr": config.lr}),
    )


def _augmented(loss: StatefulLoss, mirrored: bool) -> StatefulLoss:
    """Shift and mirror the images of a batch at random before the loss, in training only.

    A shirt in a mirror is a shirt, but a 2 is no digit: not all data sets can be mirrored.
    """

    def augmented(
        params: Tree, buffers: Tree, batch: Any, *, train: bool = False, key: Tensor | None = None
    ) -> Any:
        if train and key is not None:
            key, crop_key, flip_key = random.split(key, 3)
            x = data.random_crop(crop_key, batch.x, padding=2)
            batch = batch._replace(x=data.random_flip(flip_key, x) if mirrored else x)
        return loss(params, buffers, batch, train=train, key=key)

    return StatefulLoss(augmented)


def image_model(config: Images) -> Model | StatefulModel:
    """Make the model of a recipe for the images of its data set, in its precision.

    >>> image_model(Softmax()).init(random.key(0))["1"]["weight"].shape
    torch.Size([10, 784])
    """
    images = IMAGE_SETS[config.data_set]
    channels, side, classes = images.channels, images.side, len(images.labels)
    features = channels * side * side
    model: Any
    match config:
        case Softmax():
            model = models.softmax_regression(features, classes)
        case Mlp():
            model = models.mlp(features, classes=classes)
        case Dropout():
            model = models.mlp(features, (256, 256), classes, rates=config.rates)
        case LeNet():
            model = models.lenet(classes, channels=channels, side=side)
        case LeNetBN():
            model = models.lenet_bn(classes, channels=channels, side=side)
        case ResnetSmall():
            model = models.resnet(classes=classes, channels=channels)
        case Cnn():
            model = models.cnn()
        case _:
            raise TypeError(f"no recipe for {config!r}")
    if config.precision == "bfloat16":
        model = with_policy(model, Policy(compute=torch.bfloat16))
    return model


def notes(problem: Problem) -> list[str]:
    """Describe what is special about the data of a problem, in lines.

    >>> notes(build(Linreg(validation=0.1), random.key(0)))
    ['100 of the training examples are held out for validation']
    """
    lines = []
    if problem.passes > 1:
        lines.append(
            f"an epoch is {problem.passes} passes over it, as many images as one over the whole set"
        )
    if problem.validation is not None:
        n = len(problem.validation.x)
        lines.append(f"{n:,} of the training examples are held out for validation")
    return lines


def set_precision(config: Recipe, device: torch.device) -> None:
    """Make this process compute float32 products in tf32, if the options say so.

    Raises:
        ValueError: `device` has no tf32.

    >>> set_precision(LeNet(precision="tf32"), torch.device("cpu"))
    Traceback (most recent call last):
    ValueError: --precision tf32 needs a CUDA device, got cpu; use bfloat16
    """
    if isinstance(config, Images) and config.precision == "tf32":
        if device.type != "cuda":
            raise ValueError(f"--precision tf32 needs a CUDA device, got {device}; use bfloat16")
        torch.set_float32_matmul_precision("high")


def find_device(name: str) -> torch.device:
    """Convert `--device` to a device of this machine.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu"
        )
    return device
