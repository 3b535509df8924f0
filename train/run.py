"""One run of a recipe: set it up, train it, save and summarise it."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import fdl
from fdl import TrainState, parallel, random, tree
from fdl.checkpointing import Checkpointer
from fdl.parallel._group import on_all, on_first
from train import config as configs
from train import event_log, launch, loop, planning, plots, recipes, resume, run_folder, usual
from train.compiling import announced
from train.records import LABELS, MONITORED, best_epoch

__all__ = ["line", "next_commands", "run"]

WIDTH = 80  # columns of a terminal
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"


class Run(NamedTuple):
    """A run that is set up; errors in its options have been raised by now."""

    name: str
    config: configs.Recipe
    problem: recipes.Problem
    state: TrainState
    data_key: random.Key
    plan: planning.Plan
    folder: Path
    checkpointer: Checkpointer
    mesh: Any  # of the processes that train together; None for a single one
    first: bool  # this process writes the files
    progress: loop.Progress = loop.START
    records: Sequence[dict[str, Any]] = ()  # the lines of metrics.jsonl


def run(name: str, config: configs.Recipe) -> int:
    """Train, alone or with the processes started by `torchrun`; return the exit code."""
    processes = launch.read_torchrun_env()
    with launch.process_group(processes, config.device) as mesh:
        past = None
        try:
            config = launch.after_restart(config, processes)
            if config.resume is not None:
                given, group = config.resume, mesh and mesh.get_group()
                folder = on_first(group, lambda: run_folder.newest(given))
                past = run_folder.read_run(folder)
                config = resume.resumed_options(name, folder, past, sys.argv[2:])
            configs.check(config)
            launch.check_shares(config, processes)
            event_log.check(config)
            prepared = prepare(name, config, past, processes, mesh)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            return train(prepared)
        except BrokenPipeError:
            raise
        except OSError as error:
            print(
                f"error: cannot write to {prepared.folder}: {error}\n"
                "what was saved before is intact; to continue, once there is room:\n"
                f"{command(name, '--resume', prepared.folder)}",
                file=sys.stderr,
            )
            return os.EX_IOERR


def prepare(
    name: str,
    config: configs.Recipe,
    past: run_folder.Saved | None,
    processes: launch.Processes,
    mesh: Any,
) -> Run:
    """Set up a run, new or `past`; all errors in the options are raised here."""
    device = launch.local_device(recipes.find_device(config.device), processes)
    problem, state, data_key = recipes.set_up(config, device, mesh)
    if past is not None:
        problem = problem._replace(passes=past.passes)
    group = mesh and mesh.get_group()
    options = dataclasses.asdict(config) | {"device": device.type}
    parallel.check_replicated({"option": options, "state": state, "data": problem.data}, mesh)
    folder = config.resume or on_first(group, lambda: run_folder.make(config.out, name))
    print(
        f"{name}: {problem.data}; {device}, seed {config.seed}", *recipes.notes(problem), sep="\n"
    )
    if mesh is not None:
        print(
            f"{processes.size} processes, "
            f"each with {config.batch_size // processes.size} examples of a batch"
        )
    plan = (
        past.plan if past else on_first(group, lambda: planning.make_plan(problem, config, state))
    )
    environment = resume.environment(device) | {"processes": processes.size}
    with ExitStack() as stack:  # releases the folder after an error
        checkpointer = stack.enter_context(
            Checkpointer(
                folder / "checkpoints",
                every=config.save_every,
                best=(MONITORED, "min") if config.patience else None,
                group=group,
            )
        )
        first = processes.rank == 0
        run = Run(name, config, problem, state, data_key, plan, folder, checkpointer, mesh, first)
        if past is None and first:
            run_folder.write_config(folder, name, config, problem, plan, environment)
        if past is not None:
            run = restore(run, past, environment)
        stack.pop_all()
    return run


def restore(run: Run, past: run_folder.Saved, environment: dict[str, Any]) -> Run:
    """Restore the newest checkpoint of a run; without one, begin at its start."""
    config, folder, state, progress = run.config, run.folder, run.state, run.progress
    if run.problem.data != past.data:
        raise ValueError(f"--data: {folder} was trained on {past.data}, got {run.problem.data}")
    device = state.key.device
    restored = run.checkpointer.restore(like=state, device=device)
    if restored is not None:
        state = restored.state
        progress = resume.progress_from_json(restored.checkpoint.config["progress"], device)
    begun = progress.epoch if progress.done else progress.epoch - 1
    if begun > config.epochs:
        raise ValueError(f"--epochs {config.epochs}: {folder} has begun epoch {begun} already")
    group, epochs = run.mesh and run.mesh.get_group(), progress.epoch - 1
    records = on_first(group, lambda: run_folder.cut_metrics(folder, epochs))
    check_best_is_kept(run, records)
    resumed = past.resumed
    if changes := resume.differences({"processes": 1} | past.environment, environment):
        print(f"warning: {changes}: numbers may be rounded differently", file=sys.stderr)
        resumed = [*resumed, {"step": int(state.step), "environment": environment}]
    if run.first:
        run_folder.write_config(
            folder, run.name, config, run.problem, past.plan, past.environment, resumed
        )
    print(f"continues after step {int(state.step)}")
    return run._replace(state=state, progress=progress, records=records)


def check_best_is_kept(run: Run, records: Sequence[dict[str, Any]]) -> None:
    """Raise if `--patience` would keep weights that were not saved, as a run without it saves few.

    Among equal losses the newest checkpoint stays, so that losses are compared, not epochs.
    """
    if run.config.patience is None or not (epoch := best_epoch(records)):
        return
    best = run.checkpointer.best(MONITORED, "min")
    if best is None or best.metrics[MONITORED] > records[epoch - 1][MONITORED]:
        raise ValueError(
            f"--patience {run.config.patience}: {run.folder} has no checkpoint of epoch {epoch}, "
            "whose validation loss is the lowest; leave --patience out, or start another run"
        )


def train(run: Run) -> int:
    """Train to the end, a signal or a loss that is not finite, and save the result."""
    config, folder = run.config, run.folder
    records, epoch = list(run.records), None
    logged = folder if run.first and config.log == "tensorboard" else None
    group = run.mesh and run.mesh.get_group()
    with run.checkpointer as checkpointer, loop.signal_flag(signal.SIGTERM) as terminated:
        programs = make_programs(run)
        if run.problem.test is not None and run.progress.epoch <= config.epochs:
            print("train: mean over the epoch, while the model learns; test: after the epoch")
        with (
            loop.signal_flag(signal.SIGINT) as interrupted,  # from now on there is a state to save
            tqdm(
                leave=False, disable=sys.stderr is None or None, ncols=WIDTH - 1, bar_format=BAR
            ) as bar,
            event_log.event_log(logged, records) as log,
        ):

            def stopped() -> bool:
                return any(on_all(group, lambda: interrupted() or terminated()))

            def save(state: TrainState, progress: loop.Progress, metrics: dict[str, float]) -> None:
                # Before the checkpoint, which needs the lines of its epochs.
                on_first(group, lambda: run_folder.sync_metrics(folder))
                config = {"progress": resume.progress_to_json(progress)}
                checkpointer.save(state, metrics=metrics, config=config)

            def on_chunk(
                state: TrainState, progress: loop.Progress, steps: int, loss: float
            ) -> None:
                bar.total, bar.n = steps, progress.done
                bar.set_description(f"epoch {progress.epoch}/{config.epochs}", refresh=False)
                left = progress.seconds * (steps / progress.done - 1)
                bar.set_postfix_str(
                    "stopping" if stopped() else f"loss {loss:.4f}, {left:.0f} s left"
                )
                if checkpointer.due() and not stopped():  # a stopped run saves anyway
                    save(state, progress, {})

            epochs = loop.epochs(
                run.problem,
                config,
                run.plan,
                programs,
                run.state,
                run.data_key,
                run.progress,
                stopped=stopped,
                on_chunk=on_chunk,
            )
            with closing(epochs):  # which may be left before its end
                for epoch in () if out_of_patience(config, records) else epochs:
                    if epoch.examples:  # 0 if the first step of an epoch diverged
                        records.append(record_of(epoch))
                        if run.first:
                            run_folder.append_metrics(folder, records[-1])
                            log(records[-1])
                        bar.write(line(records[-1], config.epochs))
                    early = out_of_patience(config, records)
                    ended = epoch.end == "interrupted" or epoch.progress.epoch == config.epochs
                    better = config.patience and best_epoch(records) == epoch.progress.epoch
                    if epoch.end != "diverged" and (early or ended or better or checkpointer.due()):
                        save(epoch.state, epoch.next, epoch.metrics if epoch.end == "done" else {})
                    if early:
                        break
        checkpointer.wait()
        code = finish(run, epoch, records)
        return os.EX_TEMPFAIL if code == 130 and terminated() else code


def out_of_patience(config: configs.Recipe, records: Sequence[dict[str, Any]]) -> bool:
    """Return True if the validation loss has not been lower for `--patience` epochs.

    >>> records = [{"epoch": 1, "validation_loss": 0.3}, {"epoch": 2, "validation_loss": 0.4}]
    >>> out_of_patience(configs.Mlp(validation=0.1, patience=1), records)
    True
    """
    if config.patience is None or not records:
        return False
    return bool(records[-1]["epoch"] - best_epoch(records) >= config.patience)


def make_programs(run: Run) -> loop.Programs:
    """Make the programs; compile them if the plan says so and steps are left to do."""
    left = run.progress.epoch <= run.config.epochs and not out_of_patience(run.config, run.records)
    start = time.perf_counter()
    plan = run.plan._replace(compile=run.plan.compile and left)
    if left:
        print(planning.describe(plan), flush=True)
    with announced() as compiled:
        programs = loop.make_programs(run.problem, run.config, plan, run.state, run.mesh)
    if plan.compile:
        how = "compiled" if compiled() else "taken from the cache"
        print(f"{how} in {time.perf_counter() - start:.1f} s")
    return programs


def record_of(epoch: loop.Epoch) -> dict[str, Any]:
    """Make the line of an epoch in `metrics.jsonl`."""
    return {
        "epoch": epoch.progress.epoch,
        "step": int(epoch.state.step),
        **epoch.metrics,
        "seconds": epoch.progress.seconds,
        "examples_per_second": epoch.examples / epoch.progress.seconds,
    }


def finish(run: Run, epoch: loop.Epoch | None, records: Sequence[dict[str, Any]]) -> int:
    """Save the results of a run and print how it ended; `epoch` is None if no step was left."""
    folder, state = run.folder, epoch.state if epoch else run.state
    kept = None
    if run.config.patience and (epoch is None or epoch.end == "done"):
        best = run.checkpointer.best(MONITORED, "min")
        kept = best and run.checkpointer.restore(best, like=state, device=state.key.device)
        state = kept.state if kept else state
    if run.first:
        # As in a state_dict, buffers lie among the parameters: evaluation needs both.
        fdl.io.save(folder / "params.safetensors", tree.merge(state.params, state.buffers))
    if records and run.first:
        plots.draw_curves(folder / "curves.png", f"{run.name}, seed {run.config.seed}", records)
    if epoch and epoch.end == "diverged":
        print(
            f"step {int(state.step) + 1} (epoch {epoch.progress.epoch}): the loss is not finite; "
            "a smaller --lr may help\n"
            f"the parameters from before that step are in\n    {folder / 'params.safetensors'}",
            file=sys.stderr,
        )
        return 1
    if kept:
        number = next(r["epoch"] for r in records if r["step"] == kept.checkpoint.step)
        print(f"epoch {number} has the lowest validation loss; its weights are kept")
    print(run.problem.summary(state.params))
    if epoch and epoch.end == "interrupted":
        print(f"interrupted after step {int(state.step)}; to continue:")
        print(command(run.name, "--resume", folder))
        return 130
    if records and (compared := usual.compare(run.name, run.config, run.problem, records[-1])):
        print(compared)
    print(f"config.json, metrics.jsonl, curves.png and params.safetensors are in\n    {folder}")
    early = out_of_patience(run.config, records)
    print("next, for example:", *next_commands(run.name, run.config, folder, early), sep="\n")
    return 0


def next_commands(
    name: str, config: configs.Recipe, folder: Path, early: bool = False
) -> list[str]:
    """List commands that continue from a finished run, or one that `--patience` ended early."""
    commands = [command("eval", folder)]
    if isinstance(config, configs.Images):
        commands += [command("look", folder), command("predict", folder, "IMAGE.png")]
    option = "patience" if early else "epochs"
    return [
        *commands,
        command(name, f"--{option}", 2 * getattr(config, option), "--resume", folder),
    ]


def command(*arguments: Any) -> str:
    """Write a command to be copied, on two lines if it is too long for one.

    >>> print(command("eval", Path("runs/my lenet")))
        python -m train eval 'runs/my lenet'
    """
    words = ["    python -m train", *(shlex.quote(str(argument)) for argument in arguments)]
    text = " ".join(words)
    if len(text) <= WIDTH:
        return text
    return f"{' '.join(words[:-2])} \\\n        {' '.join(words[-2:])}"


def line(record: dict[str, Any], epochs: int) -> str:
    """Summarise an epoch in one line, with the training speed at its end if there is room.

    >>> line({"epoch": 1, "loss": 0.5, "examples_per_second": 1e4}, 10)
    'epoch  1/10  loss       0.5  10,000/s'
    """
    parts = [f"epoch {record['epoch']:{len(str(epochs))}}/{epochs}", f"loss {record['loss']:9.4g}"]
    kind, form = ("accuracy", "f") if "accuracy" in record else ("loss", "g")
    for name, label in LABELS.items():
        if name in record and name.endswith(kind) and name != "loss":
            parts.append(f"{label} {record[name]:.4{form}}")
    speed = f"{record['examples_per_second']:,.0f}/s"
    room = WIDTH - len("  ".join([*parts, ""]))
    return "  ".join([*parts, speed] if len(speed) <= room else parts)
