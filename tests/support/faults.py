"""Faults planted in a port of a small module, and which check of `fdl.testing` finds them.

`python -m tests.support.faults` writes the table of docs/prove-your-port.md.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn as oo

import fdl
from fdl import losses, nn, optim, random, testing, tree
from fdl._compiler import _inductor
from tests.support.asserts import draw

PAGE = Path(__file__).parents[2] / "docs" / "prove-your-port.md"
BATCH = draw(1, 6, 2, 4, 4), torch.tensor([0, 2, 1, 1, 0, 2])
STEPS = 3


class Pool(oo.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Mix(oo.Linear):
    """A residual block."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x).tanh()


class Original(oo.Sequential):
    def __init__(self) -> None:
        super().__init__(
            oo.Conv2d(2, 3, 3, padding=1), oo.BatchNorm2d(3), oo.GELU(), Pool(), Mix(3, 3)
        )  # fmt: skip


class Shared(oo.Sequential):
    """Two layers with the same weights."""

    def __init__(self) -> None:
        layer = oo.Linear(4, 4)
        super().__init__(layer, oo.Tanh(), layer)


def mix(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> nn.Model:
    """A block f(x, weight, bias) with the parameters of a linear layer."""
    return nn.linear(3, 3)._replace(
        apply=lambda p, x, *, train=False, key=None: f(x, p["weight"], p["bias"])
    )


def pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


LAYERS: dict[str, Any] = {
    "0": nn.conv2d(2, 3, 3, padding=1),
    "1": nn.batch_norm(3),
    "2": nn.gelu,
    "3": pool,
    "4": mix(lambda x, w, b: x + F.linear(x, w, b).tanh()),
}


def port(**layers: Any) -> Any:
    """The port, some of its layers replaced: `port(_2=nn.relu)`."""
    return nn.sequential(**{**LAYERS, **{name[1:]: layer for name, layer in layers.items()}})


# ---------------------------------------------------------------- layers with a fault


def with_own(layer: nn.StatefulModel, **fixed: Any) -> nn.StatefulModel:
    """A layer that is always called with these options."""
    return layer._replace(
        apply=lambda p, b, x, **options: layer.apply(p, b, x, **{**options, **fixed})
    )


def biased(layer: nn.StatefulModel) -> nn.StatefulModel:
    """Batch normalisation that keeps the biased variance: n instead of n − 1 below the sum."""

    def apply(params: Any, buffers: Any, x: Tensor, **options: Any) -> Any:
        y, new = layer.apply(params, buffers, x, **options)
        n = x.numel() // x.shape[1] if options["train"] else torch.inf
        var = 0.9 * buffers["running_var"]
        return y, {**new, "running_var": var + (new["running_var"] - var) * (1 - 1 / n)}

    return layer._replace(apply=apply)


def circular() -> nn.Model:
    return LAYERS["0"]._replace(
        apply=lambda p, x, *, train=False, key=None: F.conv2d(
            F.pad(x, (1, 1, 1, 1), mode="circular"), p["weight"], p["bias"]
        )
    )


def then(layer: nn.Model, f: Callable[[Tensor], Tensor]) -> nn.Model:
    return layer._replace(apply=lambda *args, **options: f(layer.apply(*args, **options)))


def before(f: Callable[[Tensor], Tensor]) -> nn.Model:
    """The convolution of f(x)."""
    layer = LAYERS["0"]
    return layer._replace(apply=lambda p, x, **options: layer.apply(p, f(x), **options))


def counted() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def scale(x: Tensor) -> Tensor:
        calls.append(1)
        return pool(x) * (1 + 1e-3 * len(calls))

    return scale


def own_tanh(
    backward: Callable[[Tensor], Tensor], forward: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """tanh with derivatives of one's own, from its value, in reverse and forward mode."""

    class Tanh(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.tanh()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
            ctx.save_for_backward(output)
            ctx.save_for_forward(output)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * backward(*ctx.saved_tensors)

        @staticmethod
        def jvp(ctx: Any, v: Tensor) -> Tensor:
            return v * forward(*ctx.saved_tensors)

    return Tanh.apply


def with_tanh(*derivatives: Callable[[Tensor], Tensor]) -> nn.StatefulModel:
    tanh = own_tanh(*derivatives)
    return port(_4=mix(lambda x, w, b: x + tanh(F.linear(x, w, b))))


def right(y: Tensor) -> Tensor:
    return 1 - y * y


# ------------------------------------------------------------------------------- faults


class Case(NamedTuple):
    model: Any
    module: Callable[[], oo.Module] = Original
    batch: tuple[Tensor, Tensor] = BATCH
    loss: Any = losses.cross_entropy
    opt: optim.Optimizer = optim.sgd(0.5, momentum=0.9, nesterov=True, weight_decay=0.01)
    anew: bool = False  # whether `jit` is called anew in each step


RIGHT = Case(port())
TIED = nn.sequential(nn.linear(4, 4), nn.tanh, nn.linear(4, 4))
ROWS = draw(2, 6, 4), BATCH[1]
WITHOUT_FAULT = {
    "the port": RIGHT,
    "tied weights": Case(nn.tied(TIED, {"2": "0"}), Shared, ROWS),
}
FAULTS = {
    "weight transposed": Case(port(_4=mix(lambda x, w, b: x + F.linear(x, w.T, b).tanh()))),
    "bias forgotten": Case(port(_4=mix(lambda x, w, b: x + F.linear(x, w).tanh()))),
    "sign of the branch": Case(port(_4=mix(lambda x, w, b: x - F.linear(x, w, b).tanh()))),
    "activation forgotten": Case(port(_2=nn.flatten(0, 0))),
    "GELU by tanh": Case(port(_2=lambda x: F.gelu(x, approximate="tanh"))),
    "channels swapped": Case(port(_0=before(lambda x: x.flip(1)))),
    "other padding": Case(port(_0=circular())),
    "sum for mean in the pool": Case(port(_3=lambda x: x.sum((2, 3)))),
    "ε of the norm": Case(port(_1=nn.batch_norm(3, eps=1e-3))),
    "float32 in between": Case(port(_3=lambda x: pool(x).float().double())),
    "train for eval": Case(port(_1=with_own(LAYERS["1"], train=True))),
    "momentum of the statistics": Case(port(_1=nn.batch_norm(3, momentum=0.9))),
    "biased variance": Case(port(_1=biased(LAYERS["1"]))),
    "branch detached": Case(port(_4=mix(lambda x, w, b: x + F.linear(x.detach(), w, b).tanh()))),
    "wrong backward": Case(with_tanh(lambda y: 1 - y, right)),
    "wrong jvp": Case(with_tanh(right, lambda y: 1 - y)),
    "second derivative lost": Case(with_tanh(*[lambda y: right(y).detach()] * 2)),
    "tied weights split": Case(TIED, Shared, ROWS),
    "sum for mean in the loss": Case(
        port(),
        loss=(lambda z, y: F.cross_entropy(z, y, reduction="sum"), F.cross_entropy),
    ),
    "other momentum": Case(
        port(), opt=optim.sgd(0.5, momentum=0.8, nesterov=True, weight_decay=0.01)
    ),
    "nesterov forgotten": Case(port(), opt=optim.sgd(0.5, momentum=0.9, weight_decay=0.01)),
    "weight decay forgotten": Case(port(), opt=optim.sgd(0.5, momentum=0.9, nesterov=True)),
    "random without a key": Case(port(_2=lambda x: F.gelu(x + 0.01 * torch.randn_like(x)))),
    "state between calls": Case(port(_3=counted())),
    "written input": Case(port(_0=before(lambda x: x.mul_(2).div(2)))),
    "branch on a value": Case(port(_3=lambda x: pool(x) if x.abs().max() < 99 else x[:, :, 0, 0])),
    "jit anew in each step": Case(port(), anew=True),
}


# ------------------------------------------------------------------------------- checks


def equals_module(case: Case) -> None:
    torch.manual_seed(0)
    module = case.module()
    pair = (
        case.opt,
        lambda module: torch.optim.SGD(
            module.parameters(), 0.5, 0.9, nesterov=True, weight_decay=0.01
        ),
    )
    testing.check_equals_module(
        case.model, module, case.batch, case.loss, optimizers=pair, steps=STEPS
    )


def start(case: Case) -> tuple[Any, ...]:
    """Parameters, and buffers if there are any, of the model."""
    initial = tree.cast(case.model.init(random.key(3)), torch.float64)
    return initial if isinstance(case.model, nn.StatefulModel) else (initial,)


def apply_of(case: Case, x: Tensor) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    params, *buffers = start(case)
    return lambda params, x: case.model.apply(params, *buffers, x, train=True), (params, x)


def trees_close(case: Case) -> None:
    """Compare the outputs in training alone."""
    torch.manual_seed(0)
    module, x = case.module().double(), case.batch[0]
    values = tree.unflatten_dict({p: leaf.detach() for p, leaf in module.named_parameters()})
    _, *buffers = start(case)
    y = case.model.apply(values, *buffers, x.clone(), train=True)
    testing.assert_trees_close(y[0] if buffers else y, module(x))


def grads(case: Case) -> None:
    """Differentiate the outputs: buffers are constants to derivatives."""
    f, args = apply_of(case, case.batch[0].clone())
    stateful = isinstance(case.model, nn.StatefulModel)
    testing.check_grads(lambda *args: f(*args)[0] if stateful else f(*args), *args)


def laws(case: Case) -> None:
    f, args = apply_of(case, case.batch[0].clone())
    with fdl.disable_jit():  # compiling takes long, and finds no more of these faults
        testing.check_laws(f, *args)


def programs(case: Case) -> None:
    """Count the programs of some calls."""
    f, args = apply_of(case, case.batch[0].clone())
    jitted = fdl.jit(f)
    with testing.count_programs() as found:
        for _ in range(STEPS):
            (fdl.jit(f) if case.anew else jitted)(*args)
    assert found.count == 1, f"{found.count} programs"


CHECKS: dict[str, Callable[[Case], None]] = {
    "`check_equals_module`": equals_module,
    "`assert_trees_close`": trees_close,
    "`check_grads`": grads,
    "`check_laws`": laws,
    "`count_programs`": programs,
}


def finding(check: Callable[[Case], None], case: Case) -> str:
    """What a check says first, in a few words; nothing if it does not find a fault."""
    try:
        check(case)
    except AssertionError as error:
        text = str(error)
        differing = re.findall(r"^  (?:\d+ steps of )?(.+): differ$", text, re.M)
        law = re.findall(r"^  (\S.+):$", text, re.M)
        mode = re.findall(r"^  ((?:fwd|rev)(?: of (?:fwd|rev))?) ", text, re.M)
        return (differing + law + mode + (["paths"] if "paths or" in text else []) + ["✓"])[0]
    except (ValueError, RuntimeError):
        return "raises"
    return ""


def row(name: str, case: Case) -> str:
    return f"| {name} | " + " | ".join(finding(check, case) for check in CHECKS.values()) + " |"


def table() -> str:
    head = f"| fault | {' | '.join(CHECKS)} |\n|{'---|' * (1 + len(CHECKS))}"
    return "\n".join([head, *(row(name, case) for name, case in FAULTS.items())])


if __name__ == "__main__":
    _inductor.lower = lambda graph, *_: lambda leaves: graph(*leaves)  # as plain_backend
    pattern = r"^\| fault \|.*\n(\|.*\n)*"
    PAGE.write_text(re.sub(pattern, lambda _: table() + "\n", PAGE.read_text(), flags=re.M))
