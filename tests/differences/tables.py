"""Tables of a page that are measured: how they are written, read, and compared with what was seen.

A table stands between two comments that name it. Its last line says with what it was made.
"""

import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

PAGES = Path(__file__).parents[2] / "docs" / "differences"
Cells = Mapping[str, str]  # what a row shows, by the name of its column


class Table(NamedTuple):
    """One table of a page."""

    name: str
    columns: tuple[str, ...]  # the first is that of the rows' names
    rows: Mapping[str, Callable[[], Cells]]  # a row leaves out what cannot be measured here
    libraries: tuple[str, ...]  # the releases that stand below the table


def releases(names: tuple[str, ...]) -> dict[str, str]:
    """The releases of the libraries that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def _between(page: str, name: str) -> re.Match[str]:
    found = re.search(rf"<!-- measured: {name} -->\n(.*?)<!-- end -->", page, re.S)
    if found is None:
        raise ValueError(f"the page has no place for the table {name!r}")
    return found


def committed(page: str, table: Table) -> dict[str, Cells]:
    """Read the rows of a table from the text of its page."""
    text = _between(page, table.name)[1]
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    rows = [re.split(r" *(?<!\\)\| *", line) for line in lines]
    if not rows:
        return {}
    head, _, *body = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def made_with(page: str, table: Table) -> dict[str, str]:
    """Read the releases with which a table was made."""
    line = re.search(r"^Made on .*? with (.*)\.$", _between(page, table.name)[1], re.M)
    return dict(re.findall(r"([\w-]+) (\d[\w.]*)", line[1])) if line else {}


def measured(table: Table, old: Mapping[str, Cells], only: set[str] | None = None):
    """Measure the rows of a table, or `only` some; what cannot be measured stays as it was."""
    missing = dict.fromkeys(table.columns[1:], "–")
    return {
        name: missing | dict(old.get(name, {})) | dict(row())
        for name, row in table.rows.items()
        if only is None or name in only
    }


def changes(old: Mapping[str, Cells], new: Mapping[str, Cells]) -> list[str]:
    """Write a line for every cell that is not as it was."""
    return [
        f"{row} | {column}: {old.get(row, {}).get(column, '(no such cell)')} → {cell}"
        for row, cells in new.items()
        for column, cell in cells.items()
        if old.get(row, {}).get(column) != cell
    ] + [f"{row}: no longer measured" for row in old.keys() - new.keys()]


def rewritten(page: str, table: Table, rows: Mapping[str, Cells], day: str) -> str:
    """Put rows into the text of a page, with the day and the releases they were made with."""
    lines = [table.columns, ("---",) * len(table.columns)]
    lines += [(name, *(cells[c] for c in table.columns[1:])) for name, cells in rows.items()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    used = made_with(page, table) | releases(table.libraries)
    made = ", ".join(f"{name} {used[name]}" for name in table.libraries if name in used)
    start, end = _between(page, table.name).span(1)
    return f"{page[:start]}{text}\n\nMade on {day} with {made}.\n{page[end:]}"
