"""The examples of the pages under docs/ run as they stand there, each page from top to bottom."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fdl
import models

DOCS = Path(__file__).parents[2] / "docs"
TEXTS = [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CHANGELOG.md"]
PAGES = {
    page.relative_to(DOCS).as_posix(): page
    for page in sorted(DOCS.rglob("*.md"))
    if "```python" in page.read_text() and page.name != "works-with.md"  # tests/works_with
}


@pytest.fixture
def restored_jax():
    """A page may turn on JAX's float64 for the whole process."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", False)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_examples_of_a_page_run(page, restored_jax):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        if any(
            f"import {name}" in block and importlib.util.find_spec(name) is None
            for name in ("optax", "jax")
        ):
            continue  # the oldest environment has no JAX
        exec(block, names)


@pytest.mark.slow
def test_the_example_of_several_processes_runs():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, DOCS / "examples" / "data_parallel.py"],
        env=os.environ | {"PYTHONPATH": str(DOCS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # Two processes write to one pipe: a line of one may end with that of the other.
    losses = re.findall(r"process \d: mean loss (\d+\.\d{6})", done.stdout)
    assert len(losses) == 2 and len(set(losses)) == 1, done.stderr


def test_links_between_pages_lead_somewhere():
    assert PAGES
    for page in TEXTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_the_glossary_names_is_there_and_in_order():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "glossary.md").read_text().splitlines()
        if line.startswith("| ")
    ][1:]
    terms = [row[0].lower() for row in rows]
    assert terms == sorted(set(terms))
    assert all(re.search("[\u4e00-\u9fff]", row[1]) or row[1].lower() == row[0] for row in rows)
    units = {name: getattr(fdl, name) for name in fdl.__all__} | {"models": models}
    named = {n for row in rows for n in re.findall(r"`(\w+)\.(\w+)", row[-1]) if n[0] in units}
    assert len(named) > 20
    assert [n for n in named if not hasattr(units[n[0]], n[1])] == []
