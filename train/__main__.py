"""The command line: `python -m train RECIPE [options]`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import MutableMapping

SPINS = "3000"  # about 0.1 ms, a hundredth of the default of GNU's OpenMP
WAIT_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def wait_without_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's waiting threads sleep soon, unless the user has set how they wait.

    By default they spin for milliseconds. This is free for a single run, and very slow if two runs
    share the cores of a machine. OpenMP reads the variable when torch is imported.

    >>> environ = {}
    >>> wait_without_spinning(environ)
    >>> environ
    {'GOMP_SPINCOUNT': '3000'}
    """
    if not any(name in environ for name in WAIT_SETTINGS):
        environ["GOMP_SPINCOUNT"] = SPINS


def main() -> int:
    """Run one command and return its exit code, see `commands.main`."""
    try:
        from train import commands  # imports torch, which takes seconds

        code = commands.main()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as by `| head`
        # What is left would be written, and fail once more, at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("interrupted: nothing reads the output any more", file=sys.stderr)
        return 141


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if sys.argv[1:2] != ["bench"]:  # it measures torch with its defaults
        wait_without_spinning()
    sys.exit(main())
