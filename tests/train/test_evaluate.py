"""`python -m train eval` and `predict`: what a run has saved, put to use."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import fdl
from fdl import data
from fdl.data import LABELS
from train.__main__ import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of `softmax`, `softmax-bf16` and `linreg`."""
    folder, argv = tmp_path_factory.mktemp("runs"), sys.argv
    softmax = ["softmax", "--data", "sample", "--epochs", "2", "--compile", "off"]
    for name, options in {
        "softmax": softmax,
        "bfloat16": [*softmax, "--precision", "bfloat16"],
        "linreg": ["linreg"],
    }.items():
        sys.argv = ["python -m train", *options, "--out", str(folder / name)]
        assert main() == 0
    sys.argv = argv
    return folder


@pytest.fixture
def run(runs, monkeypatch, capsys):
    """Run a command beside the runs; give its exit code, output and errors."""
    monkeypatch.chdir(runs)
    capsys.readouterr()

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["python -m train", *map(str, args)])
        return main(), *capsys.readouterr()

    return call


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "bfloat16"])
def test_eval_finds_what_the_run_reported(run, runs, name):
    code, out, _ = run("eval", name)
    last = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
    first, loss, accuracy = out.splitlines()
    assert code == 0 and first.startswith(f"softmax after step {last['step']}: a SAMPLE")
    assert loss == f"test loss {last['test_loss']:.6g}"
    assert accuracy == f"test accuracy {last['test_accuracy']:.6g}"


@pytest.mark.slow
def test_eval_of_a_run_without_test_data(run):
    code, out, _ = run("eval", "linreg")
    assert code == 0 and "linreg after step 300" in out
    assert float(out.split("train loss ")[1]) < 1e-4


@pytest.mark.slow
def test_predict_gives_the_probabilities_of_the_model(run, runs, tmp_path):
    images = data.fashion_mnist_sample(train=False).x
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image.numpy()).save(path)
    code, out, _ = run("predict", "softmax", *paths)
    assert code == 0 and len(out.splitlines()) == 3 * 11
    params = fdl.io.load(runs / "softmax" / "params.safetensors")
    x = images[:3].reshape(3, -1).float() / 255
    expected = (x @ params["1"]["weight"].T + params["1"]["bias"]).softmax(1)
    for i, path in enumerate(paths):
        head, *rows = out.splitlines()[11 * i : 11 * i + 11]
        assert head == f"{path}: {LABELS[int(expected[i].argmax())]}"
        found = {row[:16].strip(): float(row[16:]) for row in rows}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for label, p in zip(LABELS, expected[i].tolist(), strict=True):
            assert found[label] == pytest.approx(p, abs=1e-4)


@pytest.mark.parametrize(
    "args, message",
    [
        (["predict", "linreg", "it.png"], "needs a run on images, got linreg, a run of linreg"),
        (["predict", "nowhere", "it.png"], "nowhere holds no run"),
        (["predict", "softmax", "it.png", "--device", "gpu"], "--device must be auto, cpu, cuda"),
        (["predict", "softmax"], "predict needs at least one image"),
        (["eval", "nowhere"], "nowhere holds no run: there is no such folder; there is bfloat16, "),
        (["eval", "linreg", "--data", "sample"], "--data: linreg is a run of linreg, on drawn"),
        (["eval", "softmax", "--data", "nowhere"], "--data must be auto, sample or a folder"),
        (["eval", "softmax", "--device", "gpu"], "--device must be auto, cpu, cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_clear_message(run, args, message):
    code, out, err = run(*args)
    assert code == 2 and message in err and not out


def test_a_run_without_a_checkpoint(run, runs):
    hidden = runs / "hidden"
    (runs / "linreg" / "checkpoints").rename(hidden)
    code, _, err = run("eval", "linreg")
    hidden.rename(runs / "linreg" / "checkpoints")
    assert code == 2 and "linreg holds no checkpoint yet" in err


# ------------------------------------------------------------------ a folder that is no run


@pytest.fixture
def folders(run, runs, tmp_path, monkeypatch):
    """Two runs of softmax in runs/softmax, the newer one first by name, and one of linreg."""
    for name, source, age in [("b", "softmax", 9), ("a", "softmax", 1), ("it", "linreg", 5)]:
        recipe = source
        shutil.copytree(runs / source, tmp_path / "runs" / recipe / name)
        mark = tmp_path / "runs" / recipe / name / "config.json"
        then = mark.stat().st_mtime - 60 * age
        os.utime(mark, (then, then))
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.slow
def test_the_folder_of_a_recipe_stands_for_its_newest_run(folders):
    for command in (["eval"], ["inspect"], ["softmax", "--epochs", 3, "--resume"]):
        code, out, _ = folders(*command, "runs/softmax")
        assert code == 0 and "the newest run in runs/softmax: runs/softmax/a" in out
    assert "after step 480" in folders("eval", "runs/softmax/b")[1]
    assert "after step 720" in folders("eval", "runs/softmax/a")[1]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("runs", "there is no runs/config.json; there is runs/linreg, runs/softmax"),
        ("runs/sofmax", "there is no such folder; there is runs/linreg, runs/softmax"),
        ("runs/softmax/c", "there is no such folder; there is runs/softmax/a, runs/softmax/b"),
        ("runs/softmax/a/config.json", "it is a file; give the folder of a run"),
        ("runs/softmax/a/checkpoints", "it is part of one, runs/softmax/a"),
    ],
)
def test_what_is_there_instead_is_named(folders, folder, message):
    for command in (["eval"], ["predict"], ["softmax", "--resume"]):
        image = ["it.png"] if command == ["predict"] else []
        code, out, err = folders(*command, folder, *image)
        assert code == 2 and not out and err == f"error: {folder} holds no run: {message}\n"


def test_home_is_expanded(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders("eval", "~/runs/softmax/a")[0] == 0
    assert folders("linreg", "--epochs", 1, "--out", "~/mine")[0] == 0
    assert folders("linreg", "--epochs", 2, "--resume", "~/mine", "--out", "~/mine")[0] == 0
    assert "no such folder" in folders("softmax", "--data", "~/images")[2]
    assert str(tmp_path / "images") in folders("softmax", "--data", "~/images")[2]
    assert (tmp_path / "mine/config.json").is_file() and not Path("~").exists()
