"""`--log tensorboard`: the events, read back, are the lines of `metrics.jsonl`."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest

from train.event_log import event_log

ARGS = ("linreg", "--epochs", 2, "--compile", "off", "--log", "tensorboard", "--out", "it")
installed = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def read(folder):
    """The values by name and step, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {name: scalars(reader, name) for name in reader.Tags()["scalars"]}


def scalars(reader, name):
    return [(event.step, event.value) for event in reader.Scalars(name)]


def expected(records):
    """The same from the lines of `metrics.jsonl`; events are float32."""
    return {
        name: [(record["epoch"], float(np.float32(record[name]))) for record in records]
        for name in records[0]
        if name != "epoch"
    }


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@installed
@pytest.mark.slow
def test_a_resumed_run_has_each_epoch_once(run, tmp_path):
    assert run(*ARGS)[0] == 0
    assert read(tmp_path / "it") == expected(lines(tmp_path / "it"))
    # A run that is killed may have logged an epoch that the resumed one repeats.
    with event_log(tmp_path / "it", [{"epoch": 3, "loss": 9.0}]):
        pass
    assert read(tmp_path / "it")["loss"] == [(3, 9.0)]
    assert run("linreg", "--resume", "it", "--epochs", 4)[0] == 0
    records = lines(tmp_path / "it")
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert read(tmp_path / "it") == expected(records) and "examples_per_second" in records[0]
    assert run("linreg", "--resume", "it", "--epochs", 5, "--log", "off")[0] == 0
    assert len(read(tmp_path / "it")["loss"]) == 4


@installed
def test_a_reader_that_watches_sees_no_epoch_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with event_log(tmp_path) as log:
        for epoch, loss in enumerate((0.5, 0.25, math.nan), 1):
            log({"epoch": epoch, "loss": loss})
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [step for step, _ in scalars(reader, "loss")] == [1, 2, 3]
    with event_log(tmp_path, [{"epoch": 1, "loss": 0.5}]) as log:
        log({"epoch": 2, "loss": 0.125})
        reader.Reload()  # while it is written
    assert scalars(reader, "loss") == [(1, 0.5), (2, 0.125)]


def test_without_the_package_it_says_so_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, out, err = run(*ARGS)
    assert code == 2 and not out and not (tmp_path / "it").exists()
    assert err.startswith("error: --log tensorboard needs the package tensorboard (")
    assert "pip install 'fdl[tensorboard]'" in err


def test_a_sweep_has_no_such_option(run):
    assert "--log" not in run("sweep", "linreg", "--help")[1]
