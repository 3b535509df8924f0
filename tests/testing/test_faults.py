"""The table of docs/prove-your-port.md says what each check finds, and the page what is printed."""

import contextlib
import io
import re

import pytest

from tests.support import faults

ROWS = [line for line in faults.PAGE.read_text().splitlines() if line.startswith("| ")]


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.FAULTS)
def test_each_check_finds_what_the_table_says(name, plain_backend):
    assert faults.row(name, faults.FAULTS[name]) in ROWS


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.WITHOUT_FAULT)
def test_nothing_is_found_where_there_is_no_fault(name, plain_backend):
    for check in faults.CHECKS.values():
        check(faults.WITHOUT_FAULT[name])


def test_the_table_has_a_row_for_each_fault_and_each_fault_is_found():
    names = [row.split(" | ")[0].removeprefix("| ") for row in ROWS[1:]]
    assert names == list(faults.FAULTS) and len(names) >= 20
    assert all(set(row.split("|")[2:-1]) != {"  "} for row in ROWS[1:])


def test_the_readme_has_their_number():
    readme = (faults.PAGE.parents[1] / "README.md").read_text()
    assert f"each of {len(faults.FAULTS)} planted faults" in readme


def without_numbers(text):
    """The last digits depend on the machine."""
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text)


@pytest.mark.slow
def test_the_page_prints_what_it_shows(plain_backend):
    names, printed = {}, ""
    for kind, block in re.findall(r"```(python|text)\n(.*?)```", faults.PAGE.read_text(), re.S):
        if kind == "text":
            assert without_numbers(block) == without_numbers(printed)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(block, names)
        printed = out.getvalue()
