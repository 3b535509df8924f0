"""The examples of the pages under docs/ run as they stand there, each page from top to bottom."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {page.name: page for page in DOCS.glob("*.md") if "```python" in page.read_text()}


@pytest.fixture
def restored_jax():
    """A page may turn on JAX's float64 for the whole process."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", False)


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


def test_links_between_pages_lead_somewhere():
    assert PAGES
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
