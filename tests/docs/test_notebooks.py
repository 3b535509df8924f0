"""The notebooks run from a clean checkout, and what is shown is what they are."""

import importlib
import sys
from pathlib import Path

import pytest

import fdl

for needed in ("jupytext", "nbclient", "ipykernel"):
    pytest.importorskip(needed)
sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))
execute = importlib.import_module("execute")


@pytest.mark.slow
@pytest.mark.parametrize("name", execute.TEXTS)
def test_a_notebook_runs_with_its_answers(name, tmp_path, monkeypatch):
    path = execute.TEXTS[name]
    if "data.fashion_mnist(" in path.read_text():
        try:
            fdl.data.fashion_mnist(download=False)
        except FileNotFoundError as error:
            pytest.skip(f"needs the full Fashion-MNIST: {error}")
    monkeypatch.setenv("PYTHONPATH", str(path.parent.parent))
    done = execute.execute(execute.answers(execute.read(path)))
    streams = [o for c in done.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert streams == [], "a notebook writes nothing to stderr"


@pytest.mark.parametrize("name", execute.TEXTS)
def test_what_is_shown_was_made_from_the_text(name):
    import nbformat

    path = execute.TEXTS[name]
    shown = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    text = execute.read(path)
    assert [(c.cell_type, c.source) for c in shown.cells] == [
        (c.cell_type, c.source) for c in text.cells
    ], f"run `make notebooks` after changing {path.name}"
    assert all(c.execution_count for c in shown.cells if c.cell_type == "code")
    # The time it took when it was made, on two free cores: a test's own clock measures the machine.
    assert shown.metadata["seconds"] < 60
