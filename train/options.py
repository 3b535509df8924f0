"""Parse the command line into a configuration."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from train import config as configs
from train.bench.config import Bench

__all__ = ["parse", "read"]

PROGRAM = "python -m train"
COMMANDS: dict[str, Any] = {
    **configs.RECIPES,
    "eval": configs.Eval,
    "look": configs.Look,
    "predict": configs.Predict,
    "compare": configs.Compare,
    "data": configs.Data,
    "bench": Bench,
    "inspect": configs.Inspect,
    "sweep": configs.Sweep,
}


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """Parse a whole command line; return the name of the command and its configuration.

    Raises:
        SystemExit: after printing the help, or an error in the arguments.

    >>> parse(["linreg", "--epochs", "5"])[1].epochs
    5
    """
    match list(arguments):  # one command alone, so that errors name no other
        case ["sweep", recipe, *rest] if recipe in configs.SWEEPS:
            return "sweep", configs.Sweep(read(configs.SWEEPS[recipe], f"sweep {recipe}", rest))
        case [name, *rest] if name in COMMANDS and name != "sweep":
            return name, read(COMMANDS[name], name, rest)
        case [name, *_] if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, 1)
            print(
                f"error: {name} is no recipe and no other command"
                f"{f'; did you mean {near[0]}?' if near else ''}\n{PROGRAM} --help lists them",
                file=sys.stderr,
            )
            sys.exit(2)
    choice: Any = None
    for name, kind in COMMANDS.items():
        command = Annotated[kind, tyro.conf.subcommand(name)]  # type: ignore[valid-type]
        choice = command if choice is None else choice | command
    text = "Train recipes of deep learning as pure functions, and use the results."
    config: Any = tyro.cli(choice, prog=PROGRAM, description=text, args=arguments)
    return next(name for name, kind in COMMANDS.items() if type(config) is kind), config


def read(kind: Any, command: str, arguments: Sequence[str], default: Any = None) -> Any:
    """Parse the options of one command; `~` in paths is the home folder.

    >>> str(read(configs.Eval, "eval", ["~/it"]).run) == os.path.expanduser("~/it")
    True
    """
    defaults = {} if default is None else {"default": default}
    config = tyro.cli(kind, prog=f"{PROGRAM} {command}", args=arguments, **defaults)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: _at_home(name, v) for name, v in values.items()})


def _at_home(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_at_home(name, part) for part in value)
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if name == "data" and value else value
