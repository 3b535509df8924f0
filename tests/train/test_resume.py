"""A run that was ended anywhere and continued equals one that was not, bit by bit."""

import json
import os
import random as numbers
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fdl
from fdl import tree
from fdl.checkpointing import _checkpointer, _folder
from tests.support.asserts import equal_bits
from tests.support.soak import repeats
from train import loop, planning, resume
from train.__main__ import main

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_pass")

# Of 10 to 30 steps an epoch and 60 chunks in all: ended within epochs and between them.
RECIPES = {
    "linreg": ["--epochs", 12, "--examples", 95, "--momentum", 0.9],
    "linreg-decay": ["--epochs", 10, "--examples", 520],
    "weight-decay": ["--epochs", 6],
    "softmax": ["--epochs", 5, "--data", "sample"],
    "mlp": ["--epochs", 5, "--data", "sample", "--momentum", 0.5],
    "dropout": ["--epochs", 5, "--data", "sample"],
    "lenet": ["--epochs", 5, "--data", "sample", "--batch-size", 200],
    "lenet-bn": ["--epochs", 5, "--data", "sample", "--batch-size", 200],
    "resnet-small": ["--epochs", 2, "--data", "sample", "--batch-size", 200],
}


class Killed(BaseException):
    """As nothing but a test would catch it."""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command in chunks of `chunk` steps; give its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    plan = planning.make_plan

    def call(*args, chunk=2):
        monkeypatch.setattr(sys, "argv", ["python -m train", *map(str, args)])

        def planned(*given):
            assert "--resume" not in args, "a resumed run keeps its plan"
            return plan(*given)._replace(chunk=chunk)

        monkeypatch.setattr(planning, "make_plan", planned)
        code = main()
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def end_after(monkeypatch):
    """End the next run within its n-th chunk: by a signal, or at once and without a word."""
    make = loop.run_chunk

    def arrange(count, how):
        def run_chunk(problem, *several):
            left, chunk = count, make(problem, *several)

            def counted(carry, dataset, indices):
                nonlocal left
                left -= indices.mask.any().item()  # none where it only compiles
                if left == 0 and how is None:
                    raise Killed
                if left == 0:
                    os.kill(os.getpid(), how)
                return chunk(carry, dataset, indices)

            return counted

        monkeypatch.setattr(loop, "run_chunk", run_chunk)

    return arrange


def lines(folder):
    """The lines of `metrics.jsonl`, but for the times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in found:
        assert record.pop("seconds") > 0 and record.pop("examples_per_second") > 0
    return found


def final(folder):
    """The last state of a run, and the lines of its metrics."""
    return _folder.restore(folder / "checkpoints").state, lines(folder)


def assert_same_run(a, b):
    (state, metrics), (other, other_metrics) = final(a), final(b)
    flat, other_flat = tree.flatten_dict(state), tree.flatten_dict(other)
    assert flat.keys() == other_flat.keys()
    assert [path for path in flat if not equal_bits(flat[path], other_flat[path])] == []
    assert metrics == other_metrics
    files = [folder / "params.safetensors" for folder in (a, b)]
    assert not tree.diff(*map(fdl.io.load, files))


def end_and_continue(run, end_after, name, options, times, every):
    """Start a run, end it `times` times, let it finish; count how often it was ended how."""
    draw = numbers.Random(name)
    code, ended = None, []
    args = [name, *options, "--out", "cut"]
    while code != 0:
        how = [signal.SIGTERM, signal.SIGINT, None][len(ended) % 3]
        end_after(draw.randint(1, 3) if len(ended) < times else 10**9, how)
        try:
            code, _, _ = run(*args, "--save-every", every)
            assert code in (0, {signal.SIGTERM: 75, signal.SIGINT: 130}.get(how))
        except Killed:
            code = None
        ended += [how] if code != 0 else []
        if Path("cut/config.json").exists():
            args = [name, "--resume", "cut"]
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_ended_many_times_equals_one_that_was_not(run, end_after, name, tmp_path):
    options = [*RECIPES[name], "--compile", "off"]
    assert run(*options_of(name, options, "whole"))[0] == 0
    times = repeats(6, 24)
    ended = end_and_continue(run, end_after, name, options, times, every=0)
    assert len(ended) >= times - 4 and len(set(ended)) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def options_of(name, options, out):
    return [name, *options, "--out", out]


@pytest.mark.slow
@pytest.mark.parametrize("name", repeats(["linreg-decay", "dropout", "lenet-bn"], list(RECIPES)))
def test_a_compiled_run_as_well(run, end_after, name, tmp_path):
    """Each start compiles, so it is ended once only."""
    ends = repeats(1, 24)
    options = [*RECIPES[name], *(["--epochs", 2] if ends == 1 else []), "--compile", "on"]
    assert run(*options_of(name, options, "whole"))[0] == 0
    ended = end_and_continue(run, end_after, name, options, ends, every=0)
    assert len(ended) == ends
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_what_was_done_after_the_last_checkpoint_is_done_again(run, end_after, tmp_path):
    """It saves at its end only, so whole epochs are lost, and their lines with them."""
    options = [*RECIPES["linreg"], "--epochs", 4, "--compile", "off"]
    assert run(*options_of("linreg", options, "whole"))[0] == 0
    end_after(8, signal.SIGTERM)  # of 5 an epoch
    assert run(*options_of("linreg", options, "cut"))[0] == 75
    end_after(10, None)
    with pytest.raises(Killed):
        run("linreg", "--resume", "cut")
    assert [record["epoch"] for record in lines(tmp_path / "cut")] == [1, 2, 3]
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')  # and the line that was being written
    end_after(10**9, None)
    code, out, err = run("linreg", "--resume", "cut")
    assert code == 0 and not err and "continues after step 16" in out
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(run, end_after, tmp_path):
    options = [*RECIPES["linreg"], "--epochs", 4, "--compile", "off"]
    assert run(*options_of("linreg", options, "whole"))[0] == 0
    end_after(7, None)
    with pytest.raises(Killed):
        run(*options_of("linreg", options, "cut"))
    end_after(10**9, None)
    assert run("linreg", "--resume", "cut")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_skipped(run, end_after, tmp_path):
    options = [*RECIPES["linreg"], "--epochs", 4, "--compile", "off", "--save-every", 0]
    assert run(*options_of("linreg", options, "whole"))[0] == 0
    end_after(8, signal.SIGTERM)
    assert run(*options_of("linreg", options, "cut"))[0] == 75
    path = _folder.checkpoints(tmp_path / "cut" / "checkpoints")[0].path
    path.write_bytes(path.read_bytes()[:-1])
    end_after(10**9, None)
    with pytest.warns(RuntimeWarning, match=f"skipped .*{path.name}"):
        assert run("linreg", "--resume", "cut")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_more_epochs_are_as_if_asked_for_at_once(run, tmp_path):
    assert run("linreg", "--epochs", 4, "--compile", "off", "--out", "whole")[0] == 0
    assert run("linreg", "--epochs", 2, "--compile", "off", "--out", "cut")[0] == 0
    assert run("linreg", "--resume", "cut", "--epochs", 4)[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    code, out, _ = run("linreg", "--resume", "cut")  # four are what it has now
    assert code == 0 and "\nepoch" not in out
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_diverged_run_diverges_again(run, tmp_path):
    assert run("linreg", "--lr", 1e6, "--out", "it", "--save-every", 0, chunk=1)[0] == 1
    before, metrics = fdl.io.load("it/params.safetensors"), lines(tmp_path / "it")
    code, _, err = run("linreg", "--resume", "it", "--save-every", 0)
    assert code == 1 and "the loss is not finite" in err
    assert tree.diff(before, fdl.io.load("it/params.safetensors")) == []
    assert lines(tmp_path / "it") == metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, message",
    [
        (["linreg", "--resume", "it", "--lr", 0.1], "--lr is 0.03 in it, got 0.1; a resumed run"),
        (["linreg", "--resume", "it", "--compile", "on"], "--compile is auto in it, got on"),
        (["linreg", "--resume", "it", "--out", "there"], "--out is None in it, got there"),
        (["linreg", "--resume", "it", "--epochs", 1], "--epochs 1: it has begun epoch 2 already"),
        (["linreg", "--resume", "it", "--epochs", 0], "--epochs must be at least 1, got 0"),
        (["linreg", "--resume", "nowhere"], "nowhere holds no run: there is no such folder"),
        (["mlp", "--resume", "it"], "--resume it is a run of linreg, got mlp"),
        (["linreg", "--save-every", "-1"], "--save-every must be finite and at least 0, got -1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_contradict_the_run_are_refused(run, args, message, tmp_path):
    assert run("linreg", "--epochs", 2, "--out", "it")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = run(*args)
    assert code == 2 and message in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_options_given_again_are_those_of_the_run(run):
    assert run("linreg", "--epochs", 1, "--lr", 0.1, "--out", "it")[0] == 0
    assert run("linreg", "--resume", "it", "--lr", 0.1, "--epochs", 2)[0] == 0
    assert run("linreg", "--resume", "it", "--lr", 0.03)[0] == 2  # the default is not that


@pytest.mark.slow
def test_other_data_are_refused(run):
    assert run("softmax", "--data", "sample", "--epochs", 1, "--out", "it")[0] == 0
    config = json.loads(Path("it/config.json").read_text())
    Path("it/config.json").write_text(json.dumps(config | {"data": "other images"}))
    code, _, err = run("softmax", "--resume", "it", "--epochs", 2)
    assert code == 2 and "it was trained on other images, got a SAMPLE" in err
    assert run("softmax", "--resume", "it", "--epochs", 2)[0] == 2  # no lock is left


@pytest.mark.slow
def test_another_environment_is_named(run, monkeypatch):
    here = resume.environment(torch.device("cpu"))
    monkeypatch.setattr(resume, "environment", lambda _: here | {"torch": "2.0", "threads": 7})
    assert run("linreg", "--epochs", 1, "--out", "it")[0] == 0
    monkeypatch.setattr(resume, "environment", lambda _: here)
    code, _, err = run("linreg", "--resume", "it", "--epochs", 2)
    assert code == 0 and f"torch {torch.__version__}, was 2.0" in err
    assert f"threads {torch.get_num_threads()}, was 7" in err
    config = json.loads(Path("it/config.json").read_text())
    assert config["environment"]["torch"] == "2.0" and config["options"]["epochs"] == 2
    assert config["resumed"] == [{"step": 100, "environment": here | {"processes": 1}}]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "{}", '{"recipe": "linreg", "options": {"x": 1}}'])
def test_a_folder_that_is_not_ours(run, text, tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "config.json").write_text(text)
    code, _, err = run("linreg", "--resume", "it")
    assert code == 2 and "config.json is not that of a run" in err


@pytest.mark.slow
def test_lost_lines_of_metrics_are_noticed(run):
    assert run("linreg", "--epochs", 3, "--out", "it")[0] == 0
    text = Path("it/metrics.jsonl").read_text()
    Path("it/metrics.jsonl").write_text("".join(text.splitlines(True)[1:]))
    code, _, err = run("linreg", "--resume", "it", "--epochs", 4)
    assert code == 2 and "must have a line for each of the 3 epochs" in err


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(run, end_after, monkeypatch, tmp_path):
    end_after(5, signal.SIGTERM)
    assert run("linreg", "--compile", "off", "--out", "it", "--save-every", 0)[0] == 75
    before = _folder.checkpoints("it/checkpoints")
    end_after(10**9, None)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_checkpointer, "save", full)
        code, _, err = run("linreg", "--resume", "it", "--save-every", 0)
    assert code == 74 and "cannot write to it: [Errno 28] No space left on device" in err
    assert "python -m train linreg --resume it" in err
    assert _folder.checkpoints("it/checkpoints") == before
    assert run("linreg", "--resume", "it")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_continue(number, code, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "linreg", "--epochs", "100000", "--compile", "off",
         "--out", str(tmp_path / "it")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    seen = []
    while not seen or not seen[-1].startswith("epoch"):
        seen.append(process.stdout.readline())
    with pytest.raises(BlockingIOError, match=f"in use by process {process.pid} "):
        _checkpointer.Checkpointer(tmp_path / "it" / "checkpoints")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code and not err
    command = out[out.index("to continue:") :].replace("\\\n", " ").split()  # on two lines
    assert command[2:] == ["python", "-m", "train", "linreg", "--resume", str(tmp_path / "it")]
    (saved,) = _folder.checkpoints(tmp_path / "it" / "checkpoints")
    assert f"interrupted after step {saved.step};" in out
    assert lines(tmp_path / "it")[-1]["step"] == saved.step
    assert (tmp_path / "it" / "curves.png").exists()
    params = fdl.io.load(tmp_path / "it" / "params.safetensors")
    state = _folder.restore(tmp_path / "it" / "checkpoints").state
    assert tree.diff(params, state.params) == []
