"""The command line: `python -m train RECIPE [options]`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import MutableMapping

SPINS = "3000"  # some 0.1 ms; GNU's OpenMP has 100 times that
ABOUT_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def wait_without_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's threads sleep soon when they wait for each other, unless the user has decided.

    By default they spin for milliseconds, which costs nothing alone on a machine and stops
    everybody where two runs share its cores. OpenMP reads this when torch is imported.

    >>> environ = {}
    >>> wait_without_spinning(environ)
    >>> environ
    {'GOMP_SPINCOUNT': '3000'}
    """
    if not any(name in environ for name in ABOUT_WAITING):
        environ["GOMP_SPINCOUNT"] = SPINS


def main() -> int:
    """Run one command; give its exit code, see `commands.main`."""
    try:
        from train import commands  # torch, which takes seconds

        return commands.main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if sys.argv[1:2] != ["bench"]:  # which measures torch as it is
        wait_without_spinning()
    sys.exit(main())
