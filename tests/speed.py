"""Time one epoch against the loops everybody writes: `.venv/bin/python tests/speed.py`.

Every way takes the same batches in the same order from the same initial parameters, with the data
in memory: as floats for the imperative loops, as bytes for fdl. Rounds are interleaved, the first
is given apart since it compiles, and the table says by how much the parameters differ after the
first steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import twins

from fdl import TrainState, data, jit, random, scan, train_step, tree
from fdl.data import Dataset, Indices
from fdl.tree import Tree
from train import config, loop, recipes

Way = Callable[[Indices], Tree]  # trains on batches, gives the parameters
CHECKED = 20  # steps after which parameters are compared: later on, rounding is amplified


def ways(recipe: config.Recipe, module: torch.nn.Module, loss: Callable) -> tuple[Indices, dict]:
    state_key, data_key, problem_key = random.split(random.key(0), 3)
    problem = recipes.build(recipe, problem_key)
    start = TrainState.create(problem.model, problem.opt, key=state_key)
    order = data.epoch_indices(data_key, len(problem.train.x), recipe.batch_size)
    module = module.float()
    images, labels, _ = data.gather(problem.train, (torch.arange(len(problem.train.x)), ()))

    def imperative(model: Callable) -> Way:
        def epoch(order: Indices) -> Tree:
            twins.set_params(module, start.params)
            optimizer = torch.optim.SGD(
                module.parameters(), recipe.lr, weight_decay=recipe.weight_decay
            )
            for rows in order.index.flatten()[order.mask.flatten()].split(recipe.batch_size):
                optimizer.zero_grad()
                loss(model(images[rows]), labels[rows]).backward()
                optimizer.step()
            return twins.get_params(module)

        return epoch

    step = train_step(problem.loss, problem.opt)

    def whole(state: TrainState, dataset: Dataset, order: Indices) -> TrainState:
        def body(state: TrainState, row: Indices) -> tuple:
            return step(state, data.gather(dataset, row))

        return scan(body, state, order)[0]

    program, chunk = jit(whole), loop.run_chunk(problem)

    def guarded(order: Indices) -> Tree:
        carry = (tree.map(torch.clone, start), torch.tensor(True))
        return chunk(carry, problem.train, order)[0][0].params

    return order, {
        "nn.Module, eager": imperative(module),
        "nn.Module, torch.compile(model)": imperative(torch.compile(module, dynamic=False)),
        "fdl.jit(fdl.scan(step))": lambda order: program(start, problem.train, order).params,
        "the same, as `train` runs it": guarded,
    }


def measure(name: str, order: Indices, ways: dict[str, Way], rounds: int) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    first: dict[str, float] = {}
    for turn in range(rounds + 1):
        for way, epoch in ways.items():
            began = time.perf_counter()
            epoch(order)
            taken = time.perf_counter() - began
            if turn:
                seconds[way].append(taken)
            else:
                first[way] = taken
    few = Indices(order.index[:CHECKED], order.mask[:CHECKED])
    ends = {way: epoch(few) for way, epoch in ways.items()}
    reference, steps = ends["nn.Module, eager"], len(order.index)
    baseline = statistics.median(seconds["nn.Module, eager"])
    print(f"\n{name}: {steps} steps an epoch, {rounds} rounds")
    print(f"{'':33}{'µs a step':>20}{'times':>8}{'first':>8}{'difference':>11}")
    print(f"{'':33}{'min / median':>20}{'faster':>8}{'epoch':>8}{f'at {CHECKED}':>11}")
    for way, taken in seconds.items():
        low, mid = min(taken) / steps * 1e6, statistics.median(taken) / steps * 1e6
        ratio = baseline / statistics.median(taken)
        gaps = tree.map(lambda a, b: (a - b).abs().max(), reference, ends[way])
        gap = max(leaf.item() for leaf in tree.leaves(gaps))
        print(f"{way:33}{f'{low:.1f} / {mid:.1f}':>20}{ratio:8.2f}{first[way]:6.1f} s{gap:11.1e}")


def main(names: Sequence[str], rounds: int) -> None:
    cross_entropy = torch.nn.functional.cross_entropy
    cases = {
        "linreg": (config.Linreg(), twins.linreg(), twins.half_mse),
        "softmax": (config.Softmax(), twins.softmax_regression(), cross_entropy),
        "mlp": (config.Mlp(), twins.mlp(), cross_entropy),
        "lenet": (config.LeNet(), twins.lenet(), cross_entropy),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, CPU")
    for name in names:
        recipe, module, loss = cases[name]
        measure(f"{name}, batch {recipe.batch_size}", *ways(recipe, module, loss), rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["linreg", "softmax", "mlp", "lenet"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    main(options.names, options.rounds)
