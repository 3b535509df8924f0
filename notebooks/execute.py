"""Execute the notebooks: `python notebooks/execute.py [NAME …]` remakes `.ipynb` from `.py`.

A notebook is written and reviewed as text, `NN_name.py` in jupytext's percent format; beside it
lies the `.ipynb` that was made from it, with its outputs and the seconds it took, for reading.
It is never edited.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
TEXTS = {path.stem: path for path in sorted(HERE.glob("[0-9][0-9]_*.py"))}

# A warning concerns the reader, so it stops a notebook; torch's and the kernel's are not ours,
# nor is what torch logs of a CUDA toolkit without a GPU.
STRICT = """\
import logging
import warnings
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
warnings.simplefilter("error")
for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
    warnings.filterwarnings("ignore", category=category, module="torch|ipykernel")
"""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> NotebookNode:
    """Return the notebook a text stands for, with the same cell ids each time."""
    notebook = jupytext.read(path)
    notebook.metadata = NotebookNode(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    return notebook


def answers(notebook: NotebookNode) -> NotebookNode:
    """Return a notebook in which the code of folded answers is run too, where it stands."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown" and "<details>" in cell.source:
            code = re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)
            cells += [nbformat.v4.new_code_cell(source) for source in code]
    return NotebookNode({**notebook, "cells": cells})


def execute(notebook: NotebookNode, seconds: int = 300) -> NotebookNode:
    """Run all cells in a fresh kernel, warnings as errors; return the notebook with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message shows the cell.
    """
    strict = nbformat.v4.new_code_cell(STRICT)
    whole = NotebookNode({**notebook, "cells": [strict, *notebook.cells]})
    NotebookClient(
        whole,
        timeout=seconds,
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    ).execute()
    whole.cells.pop(0)
    whole.metadata = NotebookNode(METADATA)  # the kernel added its exact version
    for count, cell in enumerate((c for c in whole.cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    return whole


def main() -> int:
    """Execute the notebooks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among {', '.join(TEXTS)}")
    names = parser.parse_args().names or list(TEXTS)
    if unknown := [name for name in names if name not in TEXTS]:
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(TEXTS)}")
    for name in names:
        start = time.monotonic()
        done = execute(read(TEXTS[name]))
        done.metadata["seconds"] = round(time.monotonic() - start)
        nbformat.write(done, TEXTS[name].with_suffix(".ipynb"))
        print(f"{name}: {done.metadata['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
