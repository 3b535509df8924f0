"""`python -m train sweep`: every point is the ordinary run with its options, and is kept as one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fdl
from fdl import data, random, tree
from train.sweep import grid, group, results
from train.sweep import run as sweeping
from train.sweep.grid import Axis
from train.sweep.results import Result

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_pass")
LINREG = ("linreg", "--examples", 40, "--epochs", 2, "--compile", "off")
DROPOUT = ("dropout", "--data", "sample", "--epochs", 1, "--batch-size", 3000, "--compile", "off")
LENET = ("lenet", *DROPOUT[1:])
RESNET = ("resnet-small", *DROPOUT[1:])


def lines(folder):
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def last(folder):
    return json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])


def close(got, expected, rtol=1e-5):
    names = [name for name in expected if "second" not in name]
    assert {"loss", "step", "epoch"} <= set(names)
    for name in names:
        torch.testing.assert_close(got[name], expected[name], rtol=rtol, atol=1e-9, msg=name)


# ---------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("lr=0.1:1.6:5log", Axis("lr", (0.1, 0.2, 0.4, 0.8, 1.6))),
        ("momentum=0:0.9:4lin", Axis("momentum", (0.0, 0.3, 0.6, 0.9))),
        ("seed=2:5", Axis("seed", (2, 3, 4))),
        ("seed=7,3", Axis("seed", (7, 3))),
        ("weight-decay=0,1e-3", Axis("weight_decay", (0, 0.001))),
    ],
)
def test_an_axis_is_read(text, axis):
    assert grid.parse([text]) == [axis]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "--grid must be given"),
        (["lr"], "expected NAME=VALUES"),
        (["batch_size=1,2"], "'batch_size' cannot be swept.*lr, momentum, weight_decay, seed"),
        (["lr=1,2", "lr=3,4"], "lr is given twice"),
        (["lr=1,1"], "none twice"),
        (["lr=0:1:3log"], "log needs positive ends"),
        (["lr=1:2:1lin"], "an axis has 2 to 10000 values"),
        (["lr=a,b"], "expected values like .*, got 'a,b'"),
        (["seed=5:5"], "at least one value"),
        (["seed=0.5"], "seeds must be integers"),
    ],
)
def test_a_wrong_grid_is_refused(given, text):
    with pytest.raises(ValueError, match=text):
        grid.parse(given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--grid", "lr=-1,1"], "--lr must be finite and at least 0, got -1"),
        (["--grid", "lr=1,2", "--memory", 0], "--memory must be positive"),
        (["--grid", "lr=1,2", "--parts", 3], "--batch-size must be divisible by 3, --parts"),
        (["--grid", "lr=1,2", "--resume", "x"], "x holds no sweep: there is no such folder"),
        (["--grid", "lr=1,2", "--validation", 1], "--validation must be at least 0 and below 1"),
        (["--grid", "lr=1,2", "--validation", 0.01], "--validation 0.01 of 40 examples leaves"),
        (["--grid", "epochs=1,2"], "'epochs' cannot be swept"),
    ],
)
def test_a_wrong_option_ends_with_2(run, options, text):
    code, _, errors = run("sweep", *LINREG, *options)
    assert code == 2 and text in errors


# -------------------------------------------------------------------- as the ordinary runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "axes", "points"),
    [
        (LINREG, ["lr=0.01,0.1", "seed=0:2", "momentum=0,0.5"], [(0.01, 1, 0), (0.1, 0, 0.5)]),
        (DROPOUT, ["lr=0.1,0.4", "seed=3:5"], [(0.1, 4), (0.4, 3)]),
        (LENET, ["lr=0.1,0.4", "seed=3:5"], [(0.1, 4)]),
        (RESNET, ["lr=0.001,0.01", "weight_decay=0,0.1"], [(0.01, 0.1)]),
        (("weight-decay", "--epochs", 2, "--compile", "off"), ["weight_decay=0,3"], [(0,), (3,)]),
        ((*DROPOUT, "--parts", 3), ["lr=0.1,0.4"], [(0.4,)]),
    ],
    ids=["linreg", "dropout", "lenet", "resnet-small", "weight-decay", "in parts"],
)
def test_each_point_is_the_ordinary_run(run, recipe, axes, points):
    options = [option for axis in axes for option in ("--grid", axis)]
    code, out, _ = run("sweep", *recipe, *options, "--out", "sweep")
    assert code == 0 and all(len(line) <= 80 for line in out.splitlines())
    assert Path("sweep/sweep.png").stat().st_size > 5000
    names = [axis.name for axis in grid.parse(axes)]
    found = {tuple(row[name] for name in names): row for row in lines("sweep")}
    for i, point in enumerate(points):
        at = [x for n, v in zip(names, point, strict=True) for x in (f"--{n.replace('_', '-')}", v)]
        assert run(*recipe, *at, "--validation", 0.1, "--out", i)[0] == 0
        ordinary = last(str(i))
        for name in ("test_loss", "test_accuracy"):  # which a sweep does not look at
            assert name not in found[point]
            ordinary.pop(name, None)
        close(found[point], ordinary)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [["lr=0.03,0.003", "momentum=0,0.01", "weight_decay=0,9"]])
@pytest.mark.parametrize("recipe", ["linreg", "weight-decay"])
def test_the_best_is_an_ordinary_run_that_goes_on(run, recipe, axes):
    options = [option for axis in axes for option in ("--grid", axis)]
    assert (
        run("sweep", recipe, "--epochs", 2, "--out", "sweep", *options, "--compile", "off")[0] == 0
    )
    best = json.loads(Path("sweep/best/config.json").read_text())["options"]
    row = min(lines("sweep"), key=lambda row: row["validation_loss"])
    assert {name: best[name] for name in ("lr", "momentum", "weight_decay")} == {
        name: row[name] for name in ("lr", "momentum", "weight_decay")
    }
    code, out, _ = run("eval", "sweep/best")
    shown = dict(line.rsplit(" ", 1) for line in out.splitlines()[1:])
    assert code == 0
    assert float(shown["validation loss"]) == pytest.approx(row["validation_loss"], rel=1e-5)
    if recipe == "weight-decay":
        tested = last("sweep/best")["test_loss"]
        assert float(shown["test loss"]) == pytest.approx(tested, rel=1e-5)
    assert run(recipe, "--resume", "sweep/best", "--epochs", 3)[0] == 0
    same = [
        x for n in ("lr", "momentum", "weight_decay") for x in (f"--{n.replace('_', '-')}", best[n])
    ]
    assert run(recipe, "--epochs", 3, "--validation", 0.1, *same, "--out", "whole")[0] == 0
    whole, resumed = (fdl.io.load(f"{f}/params.safetensors") for f in ("whole", "sweep/best"))
    assert tree.diff(whole, resumed, rtol=1e-4, atol=1e-5) == []


@pytest.mark.slow
def test_groups_that_fit_the_memory_give_what_one_gives(run):
    axes = ["--grid", "lr=0.01:0.1:5log"]
    _, whole, _ = run("sweep", *LINREG, *axes, "--out", "whole")
    code, parts, _ = run("sweep", *LINREG, *axes, "--out", "parts", "--memory", 7e-6)
    assert code == 0 and "all at once" in whole and "groups of" in parts
    assert len(lines("parts")) == 5
    for one, other in zip(lines("whole"), lines("parts"), strict=True):
        close(one, other)
    one, other = (fdl.io.load(f"{f}/best/params.safetensors") for f in ("whole", "parts"))
    assert tree.diff(one, other, rtol=1e-5, atol=1e-6) == []


@pytest.mark.slow
def test_compiled_as_eager(run):
    axes = ["--grid", "lr=0.01,0.1", "--grid", "seed=0:2"]
    run("sweep", *LINREG, *axes, "--out", "eager")
    code, out, _ = run("sweep", *LINREG[:-1], "on", *axes, "--out", "compiled")
    assert code == 0 and "\ncompiled: --compile on\n" in out
    for one, other in zip(lines("eager"), lines("compiled"), strict=True):
        close(one, other, rtol=1e-4)


# ------------------------------------------------------------------------- how it may end


@pytest.mark.slow
def test_a_point_that_diverges_is_said_and_the_others_go_on(run):
    code, out, _ = run("sweep", *LINREG, "--grid", "lr=0.1,1e30", "--out", "sweep")
    good, bad = lines("sweep")
    assert code == 0 and good["loss"] < 10 and "diverged at step" in out
    assert set(bad) == {"lr", "diverged_at_step"}
    assert run("sweep", *LINREG, "--grid", "lr=1e30,1e31", "--out", "none")[0] == 1
    assert not Path("none/best").exists()


@pytest.mark.parametrize("metric", ["validation_accuracy", "loss"])
def test_best_values_are_the_best_over_further_axes(metric):
    axes = [Axis("lr", (0.1, 0.2)), Axis("momentum", (0.0, 0.5, 0.9)), Axis("seed", (0, 1))]
    scores = torch.rand(2, 3, 2, dtype=torch.float64)
    scores[1, 2] = float("nan")  # these runs diverge
    runs = [
        Result(point, score == score, 1, [{metric: score}])
        for point, score in zip(grid.points(axes), scores.flatten().tolist(), strict=True)
    ]
    best = scores.amax(-1) if metric.endswith("accuracy") else scores.amin(-1)
    assert torch.tensor(results.best_values(axes, runs)).allclose(best.float(), equal_nan=True)
    row = results.best_values(axes[:1], [run for run in runs if run.point["momentum"] == 0])
    assert torch.tensor(row).allclose(best[:, 0].float())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_what_there_is(run, monkeypatch, number, code):
    make, options = group.make_programs, ("--grid", "lr=0.1,0.4", "--grid", "momentum=0.1,0.5")
    monkeypatch.setattr(fdl, "jit", lambda f, **_: f)

    def ended(*args, **kwargs):
        programs, left = make(*args, **kwargs), 2 + 2 + 4  # to plan, the first group, one epoch

        def train(*args):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return programs.train(*args)

        return programs._replace(train=train)

    monkeypatch.setattr(sweeping, "make_programs", ended)
    found = run("sweep", *LINREG, "--epochs", 9, *options, "--out", "sweep", "--memory", 7e-6)
    assert found[0] == code and "all results so far are saved" in found[2]
    assert 0 < len(lines("sweep")) < 4
    assert run("linreg", "--resume", "sweep/best")[0] == 0
    assert last("sweep/best")["epoch"] == 9
    monkeypatch.setattr(sweeping, "make_programs", make)
    code, out, _ = run("sweep", "linreg", "--resume", "sweep")
    assert code == 0 and "groups of 2, as when the sweep began" in out
    assert run("sweep", *LINREG, "--epochs", 9, *options, "--out", "whole")[0] == 0
    same("sweep", "whole")


def same(folder, whole):
    """Have two sweeps come to the same?"""
    for one, other in zip(lines(folder), lines(whole), strict=True):
        close(one, other)
    one, other = (fdl.io.load(Path(f, "best", "params.safetensors")) for f in (folder, whole))
    assert tree.diff(one, other, rtol=1e-5, atol=1e-6) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("mlp", "--resume", "sweep"), "sweep is a run of linreg, got mlp"),
        (("linreg", "--resume", "sweep", "--epochs", 5), "--epochs is 2 in sweep, got 5"),
        (("linreg", "--resume", "sweep", "--grid", "lr=1,2"), "--grid is"),
        (("linreg", "--out", "sweep", "--grid", "lr=1,2"), "sweep holds a run already"),
    ],
)
def test_a_sweep_goes_on_as_it_began(run, args, message):
    assert run("sweep", *LINREG, "--grid", "lr=0.01,0.1", "--out", "sweep")[0] == 0
    before = Path("sweep/results.jsonl").read_text()
    code, _, errors = run("sweep", *args)
    assert code == 2 and message in errors
    code, out, _ = run("sweep", "linreg", "--resume", "sweep", "--memory", 1)
    assert code == 0 and "1 of 1 groups are done" in out  # nothing is trained anew
    assert Path("sweep/results.jsonl").read_text() == before


@pytest.mark.slow
def test_a_sweep_chooses_by_images_that_no_member_trained_on_and_tests_the_best_alone(run):
    """Its accuracies are those of the parameters it has saved, on the images documented."""
    options = [*DROPOUT[1:], "--grid", "lr=0.05,0.4", "--out", "sweep"]
    code, out, _ = run("sweep", "softmax", *options)
    rows, best = lines("sweep"), last("sweep/best")
    assert code == 0 and "600 of the training examples are held out for validation" in out
    assert not any("test_accuracy" in row for row in rows) and "test_accuracy" in best
    params = fdl.io.load("sweep/best/params.safetensors")["1"]
    train, test = (data.fashion_mnist_sample(train=train) for train in (True, False))
    _, validation = data.split(random.key(0), train, 0.1)
    for part, (x, y) in {"validation": validation, "test": test}.items():
        logits = x.reshape(len(x), -1) / 255 @ params["weight"].T + params["bias"]
        accuracy = (logits.argmax(1) == y).double().mean().item()
        assert best[f"{part}_accuracy"] == pytest.approx(accuracy, abs=2e-3)
    assert max(row["validation_accuracy"] for row in rows) == best["validation_accuracy"]


@pytest.mark.parametrize("share", [0.1, 0])
def test_what_a_sweep_chooses_by(share):
    """The lowest training loss, the best of the test set and of the validation set differ."""
    names = ("loss", "test_accuracy", "test_loss", "validation_accuracy", "validation_loss")
    rows = [(0.1, 0.7, 1.3, 0.7, 1.3), (0.2, 0.9, 1.2, 0.6, 1.2), (0.3, 0.8, 1.1, 0.8, 1.1)]
    rows.append((float("nan"), float("nan"), 0.0, float("nan"), 0.0))
    found = [Result({"seed": i}, True, 1, [dict(zip(names, row, strict=True))])
             for i, row in enumerate(rows)]  # fmt: skip
    if not share:
        found = [r._replace(history=[dict(list(r.history[0].items())[:3])]) for r in found]
    assert results.best_of(found).point == {"seed": 2 if share else 1}


@pytest.mark.slow
def test_a_sweep_stands_for_its_best_run(run):
    for folder in ("sweeps/a", "sweeps/b"):
        run("sweep", *LINREG, "--grid", "lr=0.01,0.1", "--out", folder)
    for folder in ("sweeps/a", "sweeps"):
        code, out, _ = run("eval", folder)
        best = "sweeps/a/best" if folder == "sweeps/a" else "sweeps/b/best"
        assert code == 0 and f"the newest run in {folder}: {best}" in out
    code, out, _ = run("sweep", "linreg", "--resume", "sweeps")
    assert code == 0 and "the newest sweep in sweeps: sweeps/b" in out


@pytest.mark.slow
def test_without_a_validation_set_the_choice_is_said_to_flatter(run):
    options = [*DROPOUT[1:], "--grid", "lr=0.05,0.4", "--out", "sweep", "--validation", 0]
    code, out, _ = run("sweep", "softmax", *options)
    best = max(lines("sweep"), key=lambda row: row["test_accuracy"])
    assert code == 0 and f"best by test accuracy: lr = {best['lr']:g}\n" in out
    assert "which flatters it" in out


@pytest.mark.slow
def test_a_sweep_from_before_there_was_a_validation_set_goes_on(run):
    """Its options name none, its numbers may be NaN, and an epoch was one pass."""
    options = [*DROPOUT[1:], "--grid", "lr=0.05,0.4", "--out", "sweep", "--memory", 1e-5]
    assert run("sweep", "softmax", *options, "--validation", 0)[0] == 0
    whole = lines("sweep")
    record = json.loads(Path("sweep/sweep.json").read_text())
    del record["options"]["validation"], record["passes"]
    Path("sweep/sweep.json").write_text(json.dumps(record))
    group = Path("sweep/groups/0000/results.json")
    group.write_text(group.read_text().replace('"epoch": 1', '"epoch": 1, "old": NaN'))
    shutil.rmtree("sweep/groups/0001")
    code, out, _ = run("sweep", "softmax", "--resume", "sweep")
    assert code == 0 and "1 of 2 groups are done" in out and "held out" not in out
    rows = lines("sweep")
    assert rows[0].pop("old") is None
    for row, other in zip(rows, whole, strict=True):
        close(row, other)
    assert run("eval", "sweep/best")[0] == 0


@pytest.mark.slow
def test_statistics_of_batch_norm_are_saved_with_the_best(run):
    options = ["--data", "sample", "--epochs", 1, "--batch-size", 3000, "--compile", "off"]
    assert run("sweep", "lenet-bn", *options, "--grid", "lr=0.1", "--out", "sweep")[0] == 0
    assert "running_var" in fdl.io.load("sweep/best/params.safetensors")["fc"]["1"]


@pytest.mark.slow
def test_each_seed_is_scored_on_its_own_data_where_data_are_drawn(run):
    options = ["weight-decay", "--epochs", 2, "--compile", "off", "--validation", 0]
    assert run("sweep", *options, "--grid", "seed=0:3", "--out", "sweep")[0] == 0
    for row in lines("sweep"):
        assert run(*options, "--seed", row["seed"], "--out", row["seed"])[0] == 0
        close(row, last(str(row["seed"])))


def test_it_runs_from_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "train",
        "sweep",
        "softmax",
        "--data",
        "sample",
        "--epochs",
        "1",
    ]
    done = subprocess.run(
        [*command, "--grid", "lr=0.03:0.3:3log", "--out", tmp_path / "sweep", "--compile", "off"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "val_accuracy" in done.stdout
    best = max(lines(tmp_path / "sweep"), key=lambda row: row["validation_accuracy"])
    found = last(tmp_path / "sweep/best")
    assert found["validation_accuracy"] == best["validation_accuracy"]
    said = f"no part in the choice: test accuracy {found['test_accuracy']:.4g}\n"
    assert said in done.stdout and "best by validation accuracy: lr = " in done.stdout
