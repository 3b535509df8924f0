"""Run each recipe as a user does, alone and in an empty folder: `make works-with`.

A recipe is skipped where a library that it imports is not installed. Its asserts compare it with
something independent, and what it compiled must run in the fastest way.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
RECIPES = {path.stem.removeprefix("with_"): path for path in sorted(FOLDER.glob("with_*.py"))}
RUN = """
import runpy, sys
from types import FunctionType

names = runpy.run_path(sys.argv[1], run_name="__main__")
jitted = [f for f in names.values() if isinstance(f, FunctionType) and hasattr(f, "report")]
for report in [report for f in jitted for report in f.report()]:
    assert not report.fallbacks and report.route in ("one program", "CUDA graph"), report
print("programs:", sum(len(f.report()) for f in jitted))
"""


def imported(path):
    """The packages that a recipe imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", RECIPES.values(), ids=RECIPES)
def test_recipe(path, tmp_path):
    missing = sorted({name for name in imported(path) if importlib.util.find_spec(name) is None})
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, "-c", RUN, path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = "fdl.jit" in path.read_text()
    assert compiled == ("programs: 0" not in done.stdout), "a program that report() does not reach"
