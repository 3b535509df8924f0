"""Time a step of three models of different sizes on one GPU, for the plans in docs/scaling.md.

`python -m train.bench.step_time` needs a GPU of 80 GB and writes docs/sizes.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fdl
import models
from fdl import TrainState, interop, losses, optim, random, scan, tree
from fdl._training._state import Metrics
from fdl.metrics import Mean
from fdl.nn import Model, Policy
from train import planning
from train.records import to_json

__all__ = ["IMAGES", "LENGTH", "RESULT", "SEQUENCES", "Transformer", "transformer"]

RESULT = Path(__file__).parents[2] / "docs/sizes.json"
IMAGES, SEQUENCES, LENGTH = 256, 8, 2048  # in a batch; tokens of a sequence
WARM_UP, REPEATS, LENET_STEPS = 3, 10, 200


class Transformer(NamedTuple):
    """Sizes of a transformer, by default with 0.97 billion parameters."""

    layers: int = 18
    width: int = 2048
    heads: int = 16
    vocabulary: int = 32_768


BILLION = Transformer()


def transformer(sizes: Transformer) -> Model:
    """Make a transformer that predicts the next token.

    Args:
        sizes: sizes of the model.

    Returns:
        The model, tokens int64 [batch, length] -> logits [batch, length, vocabulary]; the embedding
        is also the last layer.

    Source: Radford et al., Language models are unsupervised multitask learners, 2019, without
    positions and biases, whose cost is negligible.

    >>> model = transformer(Transformer(2, 8, 2, 11))
    >>> params = model.init(random.key(0))
    >>> model.apply(params, torch.zeros(3, 5, dtype=torch.int64)).shape
    torch.Size([3, 5, 11])
    """
    d = sizes.width
    shapes = {"qkv": (3 * d, d), "out": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}

    def draw(key: Tensor, shape: tuple[int, ...]) -> Tensor:
        return 0.02 * random.normal(key, shape)

    def layer(key: Tensor) -> dict[str, Tensor]:
        keys = random.split(key, len(shapes))
        return {name: draw(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}

    def init(key: Tensor) -> dict[str, Any]:
        keys = random.split(key, sizes.layers + 1)
        layers = {str(i): layer(keys[i]) for i in range(sizes.layers)}
        return {"embedding": draw(keys[-1], (sizes.vocabulary, d)), "layers": layers}

    def attend(params: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v = F.linear(x, params["qkv"]).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (sizes.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y.transpose(1, 2).flatten(2), params["out"])

    def apply(
        params: dict[str, Any], x: Tensor, *, train: bool = False, key: Tensor | None = None
    ) -> Tensor:
        x = F.embedding(x, params["embedding"])
        for i in range(sizes.layers):
            at = params["layers"][str(i)]
            x = x + attend(at, F.layer_norm(x, (d,)))
            x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (d,)), at["up"])), at["down"])
        return F.linear(F.layer_norm(x, (d,)), params["embedding"])

    return Model(init, apply)


def next_token(model: Model, params: Any, tokens: Tensor) -> tuple[Tensor, Metrics]:
    """Return the mean loss of predicting each token from those before it, and its metric."""
    logits = model.apply(params, tokens[:, :-1]).flatten(0, 1)
    mean = losses.cross_entropy(logits, tokens[:, 1:].flatten())
    count = torch.tensor(len(logits), dtype=torch.float64, device=tokens.device)
    return mean, {"loss": Mean(mean.detach() * count, count)}


def seconds_of(act: Callable[[], Any], device: str) -> float:
    """Return the median over repeats of a call, after some to warm up."""
    times = [planning.timed(act, torch.device(device)) for _ in range(WARM_UP + REPEATS)]
    return statistics.median(times[WARM_UP:])


def lenet(device: str, batch: int = IMAGES, steps: int = LENET_STEPS) -> tuple[float, int]:
    """Time a step of LeNet within a compiled program of many steps."""
    model, opt = models.lenet(), optim.sgd(0.1, momentum=0.9)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    state = TrainState.create(model, opt, key=random.key(0, device))
    x = random.normal(random.key(1, device), (batch, 1, 28, 28))
    y = random.randint(random.key(2, device), (batch,), 0, 10)
    run = fdl.jit(lambda s, b: scan(lambda s, _: step(s, b), s, length=steps))
    return seconds_of(lambda: run(state, (x, y)), device) / steps, tree.size(state.params)


def resnet(device: str, batch: int = IMAGES, pixels: int = 224) -> tuple[float, int]:
    """Time a step of torchvision's ResNet-50 that computes in bfloat16."""
    import torchvision

    full: Any = interop.from_module(torchvision.models.resnet50())[0]
    model = fdl.nn.with_policy(full, Policy(compute=torch.bfloat16))
    opt = optim.sgd(0.1, momentum=0.9)
    state = TrainState.create(model, opt, key=random.key(0, device))
    x = random.normal(random.key(1, device), (batch, 3, pixels, pixels))
    y = random.randint(random.key(2, device), (batch,), 0, 1000)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    return step_seconds(step, state, (x, y), device)


def billion(
    device: str, batch: int = SEQUENCES, length: int = LENGTH, sizes: Transformer = BILLION
) -> tuple[float, int]:
    """Time a step of a transformer with a billion parameters that computes in bfloat16."""
    full = transformer(sizes)
    model, opt = (
        fdl.nn.with_policy(full, Policy(compute=torch.bfloat16)),
        optim.sgd(0.1, momentum=0.9),
    )
    step = fdl.train_step(lambda params, tokens, **_: next_token(model, params, tokens), opt)
    state = TrainState.create(full, opt, key=random.key(0, device))
    tokens = random.randint(random.key(1, device), (batch, length + 1), 0, sizes.vocabulary)
    return step_seconds(step, state, tokens, device)


def step_seconds(
    step: Callable[..., Any], state: TrainState, batch: Any, device: str
) -> tuple[float, int]:
    """Time a compiled step that donates its state; return also the number of parameters."""
    run, size = fdl.jit(step, donate_argnums=0), tree.size(state.params)

    def act() -> None:
        nonlocal state
        state, _ = run(state, batch)

    return seconds_of(act, device), size


def main() -> None:
    """Measure and write the results."""
    steps: dict[str, Any] = {}
    document = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "steps": steps}
    for measure in (lenet, resnet, billion):
        torch.cuda.empty_cache()
        seconds, size = measure("cuda")
        steps[measure.__name__] = {"seconds": seconds, "params": size}
        print(f"{measure.__name__}: {seconds * 1e3:.3g} ms a step, {size:,} parameters", flush=True)
        RESULT.write_text(to_json(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
