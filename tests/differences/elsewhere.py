"""Measures with another interpreter, which has other releases of the libraries.

`OLDEST_PYTHON` is one with the oldest torch that fdl supports; what it would measure stays as it
is where that is not set.
"""

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@cache
def measured_by(python: str, module: str, function: str) -> Any:
    """Call a function without arguments in another interpreter; return what it returned."""
    done = subprocess.run(
        [python, "-m", "tests.differences.elsewhere", module, function],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{python} could not measure {module}.{function}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def oldest(module: str, function: str) -> Any:
    """What the interpreter with the oldest torch measures, or None if there is none."""
    python = os.environ.get("OLDEST_PYTHON")
    return measured_by(python, module, function) if python else None


if __name__ == "__main__":
    module, function = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)()))
