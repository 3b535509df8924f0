"""`python -m train compare`: a table of runs, and their curves in one picture."""

import json

import pytest
from PIL import Image

from train import config, run_folder

BASE = ("weight-decay", "--epochs", 3, "--validation", 0.2, "--compile", "off")


@pytest.fixture
def three(run, tmp_path):
    for lr, name in ((0.003, "slow"), (0.01, "fast")):
        assert run(*BASE, "--lr", lr, "--out", name)[0] == 0
    assert run("linreg", "--epochs", 1, "--compile", "off", "--out", "other")[0] == 0
    return tmp_path


@pytest.mark.slow
def test_it_shows_what_differs_and_the_last_epoch(run, three):
    code, out, err = run("compare", "slow", "fast", "--out", "new/it.png")
    assert code == 0 and not err
    head, *rows, last = out.splitlines()
    assert head.split("  ")[0] == "run" and head.split()[:3] == ["run", "lr", "epoch"]
    assert last == "curves: new/it.png"
    for name, row in zip(("slow", "fast"), rows, strict=True):
        record = json.loads((three / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert row.split()[0] == name and row.split()[2] == "3"
        for metric in ("loss", "validation_loss", "test_loss"):
            assert f"{record[metric]:.4g}" in row.split()
    with Image.open(three / "new/it.png") as picture:
        assert picture.width > 500
    code, out, _ = run("compare", "slow", "fast", "other", "--out", "new/it.png")
    assert code == 0 and "linreg" in out and "–" in out


@pytest.mark.slow
def test_a_line_that_was_not_finished_is_left_out(run, three):
    with (three / "fast" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')
    assert [record["epoch"] for record in run_folder.read_metrics(three / "fast")] == [1, 2, 3]
    assert run("compare", "slow", "fast")[0] == 0


def test_it_says_what_is_missing(run, tmp_path):
    assert run("compare", "one")[::2] == (2, "error: compare needs at least two runs, got 1\n")
    code, _, err = run("compare", "one", "two")
    assert code == 2 and "one holds no run: there is no such folder" in err
    assert config.Compare((tmp_path,)).out.name == "compare.png"
