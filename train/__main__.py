"""The command line: `python -m train RECIPE [options]`."""

import dataclasses
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tqdm import tqdm

import fdl
from fdl import Checkpointer, TrainState, data, parallel, random, tree
from fdl._sharded import on_all, on_first
from train import config as configs
from train import loop, processes, recipes, report, saved, sweep, using
from train.bench import measure

COMMANDS: dict[str, Any] = {
    **configs.RECIPES,
    "eval": configs.Eval,
    "predict": configs.Predict,
    "data": configs.Data,
    "bench": configs.Bench,
    "inspect": configs.Inspect,
    "sweep": configs.Sweep,
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
    checkpointer: Checkpointer
    mesh: Any  # the processes that train together, None where this is the only one
    first: bool  # is this the process that writes?
    progress: loop.Progress = loop.START
    records: Sequence[dict[str, Any]] = ()  # the lines of metrics.jsonl


def main() -> int:
    """Run one command.

    Returns:
        0 done; 1 diverged; 2 an option is wrong; 74 a result could not be written; 75 ended by
        SIGTERM, all saved: start it again with --resume; 130 interrupted.
    """
    choice: Any = None
    for name, kind in COMMANDS.items():
        command = Annotated[kind, tyro.conf.subcommand(name)]  # type: ignore[valid-type]
        choice = command if choice is None else choice | command
    config = tyro.cli(
        choice, prog="python -m train", description="The recipes of the course, in pure functions."
    )
    name = next(name for name, kind in COMMANDS.items() if type(config) is kind)
    try:
        if isinstance(config, configs.Recipe):
            return run_recipe(name, config)
        try:
            if isinstance(config, configs.Sweep):
                return sweep.run(config)
            configs.check(config)
            match config:
                case configs.Data():
                    return show_data(config)
                case configs.Inspect():
                    return show_file(config)
                case configs.Bench():
                    return measure.run(config)
                case configs.Eval():
                    return using.evaluate(config)
                case configs.Predict():
                    return using.predict(config)
            raise AssertionError(f"no command for {config!r}")
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_recipe(name: str, config: configs.Recipe) -> int:
    """Train, alone or with the processes that `torchrun` has started; give the exit code."""
    others = processes.started()
    with processes.joined(others, config.device) as mesh:
        past = None
        try:
            config = processes.after_restart(config, others)
            if config.resume is not None:
                past = saved.read_run(config.resume)
                config = saved.given_anew(name, config.resume, past, sys.argv[2:])
            configs.check(config)
            processes.check_shares(config, others)
            run = prepare(name, config, past, others, mesh)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            return train(run)
        except OSError as error:
            print(
                f"error: cannot write to {run.folder}: {error}\n"
                "what was saved before is intact; to continue, once there is room:\n"
                f"    python -m train {name} --resume {run.folder}",
                file=sys.stderr,
            )
            return os.EX_IOERR


def prepare(
    name: str,
    config: configs.Recipe,
    past: saved.Saved | None,
    others: processes.Processes,
    mesh: Any,
) -> Run:
    """Set up a run, `past` or new: everything that can be wrong with the options is found here."""
    device = processes.own_device(recipes.find_device(config.device), others)
    problem, state, data_key = recipes.set_up(config, device, mesh)
    group = mesh and mesh.get_group()
    options = dataclasses.asdict(config) | {"device": device.type}
    parallel.check_replicated({"option": options, "state": state, "data": problem.data}, mesh)
    folder = config.resume or on_first(group, lambda: report.open_run(config.out, name))
    print(f"{name}: {problem.data}; {device}, seed {config.seed}")
    if mesh is not None:
        print(
            f"{others.size} processes, {config.batch_size // others.size} examples of a batch each"
        )
    plan = past.plan if past else on_first(group, lambda: loop.plan(problem, config, state))
    here = report.environment(device) | {"processes": others.size}
    with ExitStack() as stack:  # lets go of the folder where something is wrong
        checkpointer = stack.enter_context(
            Checkpointer(folder / "checkpoints", every=config.save_every, group=group)
        )
        first = others.rank == 0
        run = Run(name, config, problem, state, data_key, plan, folder, checkpointer, mesh, first)
        if past is None and first:
            report.write_config(folder, name, config, problem.data, plan, here)
        if past is None:
            print(f"{'compiled' if plan.compile else 'not compiled'}: {plan.reason}")
        else:
            run = resume(run, past, here)
        stack.pop_all()
    return run


def resume(run: Run, past: saved.Saved, here: dict[str, Any]) -> Run:
    """Go to where the newest checkpoint of a run is, or to its start where it has none yet."""
    config, folder, state, progress = run.config, run.folder, run.state, run.progress
    if run.problem.data != past.data:
        raise ValueError(f"--data: {folder} was trained on {past.data}, got {run.problem.data}")
    device = state.key.device
    found = run.checkpointer.restore(like=state, device=device)
    if found is not None:
        state = found.state
        progress = saved.progress_from_json(found.checkpoint.config["progress"], device)
    begun = progress.epoch if progress.done else progress.epoch - 1
    if begun > config.epochs:
        raise ValueError(f"--epochs {config.epochs}: {folder} has begun epoch {begun} already")
    group, epochs = run.mesh and run.mesh.get_group(), progress.epoch - 1
    records = on_first(group, lambda: report.cut_metrics(folder, epochs))
    resumed = past.resumed
    if changes := saved.differences({"processes": 1} | past.environment, here):
        print(f"warning: {changes}: numbers may be rounded otherwise", file=sys.stderr)
        resumed = [*resumed, {"step": int(state.step), "environment": here}]
    if run.first:
        report.write_config(
            folder, run.name, config, past.data, past.plan, past.environment, resumed
        )
    print(f"continues after step {int(state.step)}")
    return run._replace(state=state, progress=progress, records=records)


def train(run: Run) -> int:
    """Train to the end, or to a signal or a loss that is not finite, and keep what was done."""
    config, folder = run.config, run.folder
    records, epoch = list(run.records), None
    group = run.mesh and run.mesh.get_group()
    with run.checkpointer as checkpointer, loop.noticed(signal.SIGTERM) as terminated:
        programs = make_programs(run)
        with (
            loop.noticed(signal.SIGINT) as interrupted,  # there is something to save from now on
            tqdm(unit="step", leave=False, disable=None, ncols=79) as bar,
        ):

            def stopped() -> bool:
                return any(on_all(group, lambda: interrupted() or terminated()))

            def save(state: TrainState, progress: loop.Progress, metrics: dict[str, float]) -> None:
                # Before a checkpoint that counts on its lines.
                on_first(group, lambda: report.sync_metrics(folder))
                config = {"progress": saved.progress_as_json(progress)}
                checkpointer.save(state, metrics=metrics, config=config)

            def on_chunk(
                state: TrainState, progress: loop.Progress, steps: int, loss: float
            ) -> None:
                bar.total, bar.n = steps, progress.done
                bar.set_description(f"epoch {progress.epoch}/{config.epochs}", refresh=False)
                bar.set_postfix_str("stopping" if stopped() else f"loss {loss:.4f}")
                if checkpointer.due() and not stopped():  # which saves anyway
                    save(state, progress, {})

            for epoch in loop.epochs(
                run.problem,
                config,
                run.plan,
                programs,
                run.state,
                run.data_key,
                run.progress,
                stopped=stopped,
                on_chunk=on_chunk,
            ):
                if epoch.examples:  # none where the first step of an epoch diverged
                    records.append(record_of(epoch))
                    if run.first:
                        report.append_metrics(folder, records[-1])
                    bar.write(line(records[-1], config.epochs))
                last = epoch.end == "interrupted" or epoch.progress.epoch == config.epochs
                if epoch.end != "diverged" and (last or checkpointer.due()):
                    save(epoch.state, epoch.next, epoch.metrics if epoch.end == "done" else {})
        checkpointer.wait()
        code = finish(run, epoch, records)
        return os.EX_TEMPFAIL if code == 130 and terminated() else code


def make_programs(run: Run) -> loop.Programs:
    """Compile, if the plan says so and something is left to do."""
    start, left = time.perf_counter(), run.progress.epoch <= run.config.epochs
    plan = run.plan._replace(compile=run.plan.compile and left)
    programs = loop.make_programs(run.problem, run.config, plan, run.state, run.mesh)
    if plan.compile:
        print(f"compiling took {time.perf_counter() - start:.1f} s")
    return programs


def record_of(epoch: loop.Epoch) -> dict[str, Any]:
    """Make the line of `metrics.jsonl`."""
    return {
        "epoch": epoch.progress.epoch,
        "step": int(epoch.state.step),
        **epoch.metrics,
        "seconds": epoch.progress.seconds,
        "examples_per_second": epoch.examples / epoch.progress.seconds,
    }


def finish(run: Run, epoch: loop.Epoch | None, records: Sequence[dict[str, Any]]) -> int:
    """Keep what a run came to, and say how it ended; no `epoch` where nothing was left to do."""
    folder, state = run.folder, epoch.state if epoch else run.state
    if run.first:
        # As in a state_dict, buffers lie among the parameters: evaluation needs both.
        fdl.save(folder / "params.safetensors", tree.merge(state.params, state.buffers))
    if records and run.first:
        report.draw_curves(folder, f"{run.name}, seed {run.config.seed}", records)
    if epoch and epoch.end == "diverged":
        print(
            f"step {int(state.step) + 1} (epoch {epoch.progress.epoch}): the loss is not finite; "
            f"the parameters before it are in {folder / 'params.safetensors'}. "
            "A smaller --lr may help.",
            file=sys.stderr,
        )
        return 1
    print(run.problem.verdict(state.params))
    if epoch and epoch.end == "interrupted":
        print(
            f"interrupted after step {int(state.step)}; to continue:\n"
            f"    python -m train {run.name} --resume {folder}"
        )
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
    train_set, _, found = recipes.load_images(config.data)
    train_set = tree.to(train_set, device)
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
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    sys.exit(main())
