"""Time one epoch against the loops everybody writes: `.venv/bin/python tests/speed.py`.

Every way takes the same batches in the same order from the same initial parameters, with the data
in memory. Rounds are interleaved, the first is not counted, and the ways must end at the same
parameters, or the table says so.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import twins

import fdl
from fdl import TrainState, data, random, tree
from fdl.tree import Tree
from train import config, loop, recipes

Way = Callable[[], Tree]  # trains an epoch, gives the parameters


def ways(recipe: config.Recipe, module: torch.nn.Module, loss: Callable) -> dict[str, Way]:
    state_key, data_key, problem_key = random.split(random.key(0), 3)
    problem = recipes.build(recipe, problem_key)
    start = TrainState.create(problem.model, problem.opt, key=state_key)
    order = data.epoch_indices(data_key, len(problem.train.x), recipe.batch_size)
    module = module.float()

    def imperative(model: Callable) -> Way:
        def epoch() -> Tree:
            twins.set_params(module, start.params)
            optimizer = torch.optim.SGD(module.parameters(), recipe.lr)
            for index, mask in zip(*order, strict=True):
                x, y, _ = data.gather(problem.train, (index[mask], mask))
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
            return twins.get_params(module)

        return epoch

    chunk = loop.run_chunk(problem)

    def functional() -> Tree:
        carry = (tree.map(torch.clone, start), torch.tensor(True))
        return chunk(carry, problem.train, order)[0][0].params

    return {
        "nn.Module, eager": imperative(module),
        "nn.Module, torch.compile(model)": imperative(torch.compile(module, dynamic=False)),
        "fdl, the epoch as one program": functional,
    }


def measure(name: str, ways: dict[str, Way], steps: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    ends: dict[str, Tree] = {}
    first: dict[str, float] = {}
    for turn in range(rounds + 1):
        for way, epoch in ways.items():
            began = time.perf_counter()
            ends[way] = epoch()
            taken = time.perf_counter() - began
            if turn:
                seconds[way].append(taken)
            else:
                first[way] = taken
    baseline = statistics.median(next(iter(seconds.values())))
    print(f"\n{name}: {steps} steps an epoch, {rounds} rounds")
    print(f"{'':33}{'µs a step':>20}{'times':>9}{'first':>9}{'largest':>11}")
    print(f"{'':33}{'min / median':>20}{'faster':>9}{'epoch':>9}{'difference':>11}")
    reference = next(iter(ends.values()))
    for way, taken in seconds.items():
        low, mid = min(taken) / steps * 1e6, statistics.median(taken) / steps * 1e6
        ratio = baseline / statistics.median(taken)
        gaps = tree.map(lambda a, b: (a - b).abs().max(), reference, ends[way])
        gap = max(leaf.item() for leaf in tree.leaves(gaps))
        print(f"{way:33}{f'{low:.1f} / {mid:.1f}':>20}{ratio:9.2f}{first[way]:7.1f} s{gap:11.1e}")


def main(names: Sequence[str], rounds: int) -> None:
    found = fdl.data.fashion_mnist()
    cases = {
        "linreg": (config.Linreg(), twins.linreg(), twins.half_mse, 1000),
        "softmax": (
            config.Softmax(),
            twins.softmax_regression(),
            torch.nn.functional.cross_entropy,
            len(found.x),
        ),
        "mlp": (config.Mlp(), twins.mlp(), torch.nn.functional.cross_entropy, len(found.x)),
        "lenet": (config.LeNet(), twins.lenet(), torch.nn.functional.cross_entropy, len(found.x)),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, CPU")
    for name in names:
        recipe, module, loss, n = cases[name]
        steps = -(-n // recipe.batch_size)
        measure(f"{name}, batch {recipe.batch_size}", ways(recipe, module, loss), steps, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["linreg", "softmax", "mlp", "lenet"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    main(options.names, options.rounds)
