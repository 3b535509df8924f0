"""Measure the tables of docs/differences/ again: `python -m tests.differences [PAGE …] [--write]`.

Cells that differ from the committed ones are shown, and make the exit status 1. With --write
they are put into the page instead. What is not installed is not measured, and stays as it is.
"""

import argparse
import datetime
import importlib
import sys
import time

import torch

from tests.differences.tables import PAGES, changes, committed, made_with, measured, rewritten
from tests.differences.tables import releases as installed

NAMES = ("optimizers", "draws", "compiled", "files", "weights", "fashion-mnist")


def tables(page):
    """The tables of a page, from the module of the same name."""
    module = page.replace("-", "_")
    return importlib.import_module(f"tests.differences.{module}").TABLES


def remake(page, write):
    """Measure the tables of a page, show what has changed, and write it if asked to."""
    path, found = PAGES / f"{page}.md", []
    text = path.read_text()
    for table in tables(page):
        began, old = time.monotonic(), committed(text, table)
        new = measured(table, old)
        was, now = made_with(text, table), installed(table.libraries)
        for name in table.libraries:
            if name not in now:
                print(f"{page}, {table.name}: {name} is not installed; its cells stay as they are")
            elif was.get(name) != now[name]:
                print(f"{page}, {table.name}: made with {name} {was.get(name)}, now {now[name]}")
        lines = changes(old, new)
        print("\n".join(f"{page}, {table.name}: {line}" for line in lines), end="\n" * bool(lines))
        print(f"{page}, {table.name}: {len(new)} rows, {time.monotonic() - began:.0f} s")
        found += lines
        if write and lines:
            day = datetime.datetime.now(datetime.UTC).date().isoformat()
            text = rewritten(text, table, new, day)
    if write:
        path.write_text(text)
    return found


def main():
    """Remake the pages that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=", ".join(NAMES))
    parser.add_argument("--write", action="store_true", help="put what has changed into the pages")
    options = parser.parse_args()
    if unknown := set(options.pages) - set(NAMES):
        parser.error(f"no such page: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # with others, sums are rounded otherwise
    found = [line for page in options.pages or NAMES for line in remake(page, options.write)]
    if found and not options.write:
        sys.exit(f"{len(found)} cells have changed; WRITE=1 puts them into the pages")


if __name__ == "__main__":
    main()
