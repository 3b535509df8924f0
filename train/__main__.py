"""The command line: `python -m train RECIPE [options]`."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tqdm import tqdm

import fdl
from fdl import TrainState, data, random
from train import config as configs
from train import loop, recipes, report
from train.bench import measure

COMMANDS: dict[str, Any] = {
    "linreg": configs.Linreg,
    "linreg-decay": configs.LinregDecay,
    "softmax": configs.Softmax,
    "mlp": configs.Mlp,
    "dropout": configs.Dropout,
    "weight-decay": configs.WeightDecay,
    "lenet": configs.LeNet,
    "data": configs.Data,
    "bench": configs.Bench,
    "inspect": configs.Inspect,
}


class Run(NamedTuple):
    """A run that is set up: whatever was wrong with the options has been said by now."""

    name: str
    config: configs.Recipe
    problem: recipes.Problem
    state: TrainState
    data_key: random.Key
    plan: loop.Plan
    folder: Path


def main() -> int:
    """Run one command: 0 done, 1 diverged, 2 an option is wrong, 130 interrupted."""
    choice: Any = None
    for name, kind in COMMANDS.items():
        command = Annotated[kind, tyro.conf.subcommand(name)]  # type: ignore[valid-type]
        choice = command if choice is None else choice | command
    config = tyro.cli(
        choice, prog="python -m train", description="The recipes of the course, in pure functions."
    )
    name = next(name for name, kind in COMMANDS.items() if type(config) is kind)
    try:
        try:
            configs.check(config)
            if isinstance(config, configs.Data):
                return show_data(config)
            if isinstance(config, configs.Bench):
                return measure.run(config)
            if isinstance(config, configs.Inspect):
                return show_file(config)
            prepared = prepare(name, config)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return train(prepared)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def prepare(name: str, config: configs.Recipe) -> Run:
    """Set up a run: everything that can be wrong with the options is found here."""
    device = recipes.find_device(config.device)
    recipes.set_precision(config, device)
    state_key, data_key, problem_key = random.split(random.key(config.seed, device), 3)
    problem = recipes.build(config, problem_key)
    state = TrainState.create(problem.model, problem.opt, key=state_key)
    folder = report.open_run(config.out, name)
    print(f"{name}: {problem.data}; {device}, seed {config.seed}")
    plan = loop.plan(problem, config, state)
    report.write_config(
        folder, name, config, data=problem.data, device=str(device), compiled=plan.compile
    )
    print(f"{'compiled' if plan.compile else 'not compiled'}: {plan.reason}")
    return Run(name, config, problem, state, data_key, plan, folder)


def train(run: Run) -> int:
    """Train to the end, or to Ctrl-C or a loss that is not finite, and keep what was done."""
    config, folder = run.config, run.folder
    records: list[dict[str, Any]] = []
    start = time.perf_counter()
    programs = loop.make_programs(run.problem, config, run.plan, run.state)
    if run.plan.compile:
        print(f"compiling took {time.perf_counter() - start:.1f} s")
    with (
        loop.stops_on_interrupt() as stopped,
        tqdm(unit="step", leave=False, disable=None, ncols=79) as bar,
    ):

        def on_chunk(done: int, steps: int, loss: float) -> None:
            bar.total, bar.n = steps, done
            bar.set_description(f"epoch {len(records) + 1}/{config.epochs}", refresh=False)
            bar.set_postfix_str("stopping" if stopped() else f"loss {loss:.4f}")

        for epoch in loop.epochs(
            run.problem,
            config,
            run.plan,
            programs,
            run.state,
            run.data_key,
            stopped=stopped,
            on_chunk=on_chunk,
        ):
            record = {
                "epoch": epoch.number,
                "step": int(epoch.state.step),
                **epoch.metrics,
                "seconds": epoch.seconds,
                "examples_per_second": epoch.examples / epoch.seconds,
            }
            if epoch.examples:  # none where the first step of an epoch diverged
                records.append(record)
                report.append_metrics(folder, record)
                bar.write(line(record, config.epochs))
    fdl.save(folder / "params.safetensors", epoch.state.params)
    if records:
        report.draw_curves(folder, f"{run.name}, seed {config.seed}", records)
    if epoch.end == "diverged":
        print(
            f"step {int(epoch.state.step) + 1} (epoch {epoch.number}): the loss is not finite; "
            f"the parameters before it are in {folder / 'params.safetensors'}. "
            "A smaller --lr may help.",
            file=sys.stderr,
        )
        return 1
    print(run.problem.verdict(epoch.state.params))
    if epoch.end == "interrupted":
        print(f"interrupted after step {int(epoch.state.step)}; what was done is in {folder}")
        return 130
    print(f"config.json, metrics.jsonl, curves.png, params.safetensors in {folder}")
    return 0


def line(record: dict[str, Any], epochs: int) -> str:
    """Say an epoch in one line of at most 80 columns.

    >>> line({"epoch": 1, "loss": 0.5, "examples_per_second": 1e4}, 10)
    'epoch  1/10  loss       0.5      10,000 examples/s'
    """
    parts = [f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}", f"loss {record['loss']:9.4g}"]
    for name, label in [("accuracy", "train"), ("test_accuracy", "test")]:
        if name in record:
            parts.append(f"{label} acc {record[name]:.4f}")
    if "test_loss" in record and "accuracy" not in record:
        parts.append(f"test loss {record['test_loss']:9.4g}")
    return "  ".join([*parts, f"{record['examples_per_second']:10,.0f} examples/s"])


def show_data(config: configs.Data) -> int:
    """Draw ten images with their labels, and time one pass over the training set."""
    device = recipes.find_device(config.device)
    train_set, _, found = recipes.load_images(config.data, device)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "images.png"
    report.draw_images(path, train_set)
    print(f"{found}; {device}\nten images with their labels: {path}")
    start = time.perf_counter()
    n = len(train_set.x)
    order = data.epoch_indices(random.key(config.seed, device), n, config.batch_size)
    for row in zip(*order, strict=True):
        batch = data.gather(train_set, row)
    float(batch.x.sum())  # on CUDA, wait for the last one
    seconds = time.perf_counter() - start
    print(
        f"one pass, shuffled, in {len(order.index)} batches of {config.batch_size}: "
        f"{seconds:.3f} s, {n / seconds:,.0f} images/s"
    )
    return 0


def show_file(config: configs.Inspect) -> int:
    """Print the table of a saved tree, and what was saved beside it."""
    contents = fdl.inspect(config.file)
    print(contents)
    if contents.metadata:
        print("metadata", json.dumps(contents.metadata, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
