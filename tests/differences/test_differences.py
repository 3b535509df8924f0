"""A tenth of the measured rows are measured again, and the command shows what has changed."""

import re

import pytest

from tests.differences import __main__ as command
from tests.differences.tables import (
    PAGES,
    Table,
    changes,
    committed,
    made_with,
    releases,
    rewritten,
)

TABLES = [(page, table) for page in command.NAMES for table in command.tables(page)]
EVERY = 10


@pytest.mark.parametrize(("page", "table"), TABLES, ids=[f"{p}-{t.name}" for p, t in TABLES])
def test_every_row_stands_in_the_page(page, table):
    rows = committed((PAGES / f"{page}.md").read_text(), table)
    assert list(rows) == list(table.rows)
    assert all(tuple(cells) == table.columns[1:] for cells in rows.values())


def again(page, table):
    """The tenth of a table that is measured again, where the releases are those of the page."""
    used = made_with((PAGES / f"{page}.md").read_text(), table)
    here = releases(table.libraries)
    if any(used[name] != release for name, release in here.items()):
        return []
    return list(table.rows)[EVERY // 2 :: EVERY]


ROWS = [(page, table, row) for page, table in TABLES for row in again(page, table)]


@pytest.mark.parametrize(("page", "table", "row"), ROWS, ids=[f"{p}-{r}" for p, _, r in ROWS])
def test_a_tenth_of_the_rows_is_as_it_was_measured(page, table, row):
    old = committed((PAGES / f"{page}.md").read_text(), table)[row]
    new = table.rows[row]()
    if not new:
        pytest.skip("what this row needs is not installed")
    assert {column: old[column] for column in new} == dict(new)


PAGE = """Text.
<!-- measured: sums -->
| sum | torch | other |
| --- | --- | --- |
| 1 + 1 | 2 | 2.0 |

Made on 2026-01-02 with torch 1.0.
<!-- end -->
More.
"""
SUMS = Table("sums", ("sum", "torch", "other"), {"1 + 1": lambda: {"torch": "3"}}, ("torch",))


@pytest.fixture
def one_page(tmp_path, monkeypatch):
    (tmp_path / "sums.md").write_text(PAGE)
    monkeypatch.setattr(command, "PAGES", tmp_path)
    monkeypatch.setattr(command, "tables", lambda page: (SUMS,))
    return tmp_path / "sums.md"


def test_a_changed_cell_is_shown_and_not_written(one_page, capsys):
    assert command.remake("sums", write=False) == ["1 + 1 | torch: 2 → 3"]
    assert one_page.read_text() == PAGE
    assert "1 + 1 | torch: 2 → 3" in capsys.readouterr().out


def test_what_was_not_measured_stays_when_a_page_is_written(one_page):
    command.remake("sums", write=True)
    text = one_page.read_text()
    assert committed(text, SUMS) == {"1 + 1": {"torch": "3", "other": "2.0"}}
    assert made_with(text, SUMS) == releases(("torch",))
    assert text.startswith("Text.\n") and text.endswith("<!-- end -->\nMore.\n")
    assert command.remake("sums", write=False) == []


def test_rows_that_are_gone_or_new_are_changes():
    old = {"a": {"x": "1"}, "b": {"x": "1"}}
    assert changes(old, {"a": {"x": "1"}, "c": {"x": "2"}}) == [
        "c | x: (no such cell) → 2",
        "b: no longer measured",
    ]


def test_a_page_without_a_place_for_its_table_raises():
    with pytest.raises(ValueError, match="no place for the table 'sums'"):
        rewritten("Text.", SUMS, {}, "2026-01-02")


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\(([\w-]+)\.md\)", (PAGES / "index.md").read_text())
    assert {page.stem for page in PAGES.glob("*.md")} - {"index"} == set(linked)
    assert set(command.NAMES) <= set(linked)
