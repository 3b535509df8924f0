"""Time updates against torch.optim: `python -m train.bench.speed_optim`.

Compiled updates of a ResNet-50, 161 leaves with 25.6 million float32 parameters; or with `--eager`,
updates outside of `jit` of 200 small leaves, 100 times 32x32 and 32. Rounds are interleaved in one
process; the first, which compiles, is given apart. The table says how far fdl's parameters are from
torch's after the rounds, relative to how far they went, since a wrong update is not a fast one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torchvision

from fdl import jit, optim, tree
from fdl.tree import Tree

OPTIMIZERS: dict[str, tuple[optim.Optimizer, Callable[..., torch.optim.Optimizer]]] = {
    "sgd, momentum": (
        optim.sgd(1e-3, 0.9, weight_decay=1e-4),
        partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    ),
    "adam": (optim.adam(), torch.optim.Adam),
    "adamw": (optim.adamw(), torch.optim.AdamW),
}


class Ours:
    """fdl's update: compiled, in the memory of the tensors it is given, or eager."""

    def __init__(self, opt: optim.Optimizer, params: Tree, grads: Tree, eager: bool) -> None:
        def update(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
            updates, state = opt.update(grads, state, params)
            return optim.apply_updates(params, updates), state

        self.update = update if eager else jit(update, donate_argnums=(0, 1))
        self.grads = grads
        self.params = tree.map(torch.clone, params)
        self.state = opt.init(self.params)

    def step(self) -> None:
        """Update once."""
        self.params, self.state = self.update(self.params, self.state, self.grads)


class Theirs:
    """An optimizer of torch.optim in one of its implementations."""

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], params: Tree, grads: Tree
    ) -> None:
        self.params = tree.map(lambda p: p.clone().requires_grad_(), params)
        tree.map(lambda p, g: setattr(p, "grad", g.clone()), self.params, grads)
        self.optimizer = make(tree.leaves(self.params))

    def step(self) -> None:
        """Update once."""
        self.optimizer.step()


def measure(name: str, params: Tree, grads: Tree, rounds: int, eager: bool) -> None:
    """Print the times of one optimizer, by each way."""
    opt, make = OPTIMIZERS[name]
    ways: dict[str, Ours | Theirs] = {
        "loop": Theirs(partial(make, foreach=False), params, grads),
        "foreach": Theirs(partial(make, foreach=True), params, grads),
        "fused": Theirs(partial(make, fused=True), params, grads),
        "fdl": Ours(opt, params, grads, eager),
    }
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round in range(rounds + 2):
        for way, runner in ways.items():
            began = time.perf_counter()
            runner.step()
            took = time.perf_counter() - began
            first.setdefault(way, took)
            if round >= 2:  # after the compiler and the first touch of memory
                times[way].append(1e3 * took)
    median = {way: statistics.median(ts) for way, ts in times.items()}
    went = tree.map(lambda p, q: (p.detach() - q).norm(), ways["foreach"].params, params)
    apart = tree.map(
        lambda p, q: (p.detach() - q).norm(), ways["foreach"].params, ways["fdl"].params
    )
    off = max(a / w for a, w in zip(tree.leaves(apart), tree.leaves(went), strict=True))
    cells = [f"{median[way]:.3g} ({min(times[way]):.3g})" for way in ways]
    cells += [f"{median['fdl'] / median[way]:.2f}" for way in ("foreach", "fused")]
    print(f"| {name} | {' | '.join(cells)} | {first['fdl']:.2g} | {off:.0e} |", flush=True)


def resnet() -> Tree:
    """Return the parameters of a ResNet-50."""
    net = torchvision.models.resnet50()
    return tree.unflatten_dict({path: p.detach() for path, p in net.named_parameters()})


def small_leaves() -> Tree:
    """Return 200 small parameters."""
    return {
        f"layer{i}": {"weight": torch.randn(32, 32), "bias": torch.randn(32)} for i in range(100)
    }


def main() -> None:
    """Measure every optimizer, or those that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--eager", action="store_true", help="200 small leaves, outside of jit")
    parser.add_argument("optimizers", nargs="*", default=list(OPTIMIZERS), help="of these")
    args = parser.parse_args()
    params = small_leaves() if args.eager else resnet()
    grads = tree.map(lambda p: 1e-3 * torch.randn_like(p), params)
    print(
        f"{len(tree.leaves(params))} leaves, {tree.size(params):,} parameters, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads; milliseconds, median (least)\n\n"
        "| | loop | foreach | fused | fdl | fdl / foreach | fdl / fused | first call, s | apart |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name in args.optimizers:
        measure(name, params, grads, args.rounds, args.eager)


if __name__ == "__main__":
    main()
