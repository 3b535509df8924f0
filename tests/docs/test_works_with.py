"""The page of other libraries shows the recipes as they are run, and the releases they ran with."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "works-with.md").read_text()
SHOWN = re.findall(r"```python\n(.*?)```", PAGE, re.S)
RECIPES = {
    path.stem.removeprefix("with_"): path.read_text()
    for path in sorted((ROOT / "tests" / "works_with").glob("with_*.py"))
}
LONGEST = 10


def versions(name):
    """The releases that a file of constraints pins."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.M))


def rows():
    """The libraries of the tables, with the releases that stand beside them."""
    return re.findall(r"^\| \[?([\w.-]+)[^|]*?\| (\S+) \|", PAGE, re.M)


def test_every_recipe_is_on_the_page_and_nothing_else():
    assert sorted(SHOWN) == sorted(RECIPES.values())
    for name in RECIPES:
        assert f"(#{name})" in PAGE, f"no row of a table leads to {name}"


def test_releases_are_those_of_the_constraints():
    pinned = versions("constraints.txt") | versions("constraints-works-with.txt")
    shown = dict(rows())
    assert {name: pinned[name] for name in shown if name in pinned} == {
        name: release for name, release in shown.items() if name in pinned
    }
    assert versions("constraints-works-with.txt").keys() <= shown.keys()


def test_releases_are_installed_by_make():
    project = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^works-with = \[(.*?)^\]", project, re.M | re.S)
    installed = re.findall(r'"([\w-]+)', extra[1])
    assert sorted(installed) == sorted(versions("constraints-works-with.txt"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short(name):
    recipe = RECIPES[name].partition("# Recipe\n")[2].partition("# Check")[0]
    assert 0 < sum(bool(line.strip()) for line in recipe.splitlines()) <= LONGEST
