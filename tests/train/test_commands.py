"""The command line: what it prints, leaves behind, and says of bad options."""

import ast
import doctest
import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fdl
import models
from fdl import data, random, tree
from fdl.data import Dataset
from train import config, loop, recipes, run_folder
from train.__main__ import wait_without_spinning
from train.config import Dropout, Linreg, LinregDecay, Softmax
from train.planning import Plan

ROOT = Path(__file__).parents[2]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.curriculum("L1")
def test_linreg_recovers_the_weights_it_was_given(run, tmp_path):
    code, out, err = run("linreg", "--out", "it")
    assert code == 0 and not err
    params = fdl.io.load(tmp_path / "it" / "params.safetensors")
    expected = {"weight": torch.tensor([[2.0, -3.4]]), "bias": torch.tensor([4.2])}
    assert not tree.diff(expected, params, atol=0.01)
    assert "learned w = [2.00" in out or "learned w = [1.99" in out
    assert [r["epoch"] for r in records(tmp_path / "it")] == [1, 2, 3]
    assert [r["step"] for r in records(tmp_path / "it")] == [100, 200, 300]
    assert records(tmp_path / "it")[-1]["loss"] < 1e-4  # ½ σ² = 5e-5


@pytest.mark.parametrize(
    ("name", "hint"),
    [("softmx", "; did you mean softmax?"), ("evl", "; did you mean eval?"), ("?", "")],
)
def test_a_misspelt_command_is_named(run, name, hint):
    code, _, err = run(name, "--epochs", 1)
    text = f"error: {name} is no recipe and no other command{hint}"
    assert (code, err) == (2, f"{text}\npython -m train --help lists them\n")


@pytest.mark.slow
@pytest.mark.parametrize("read", [0, 1], ids=["closed at once", "closed after a line"])
def test_an_output_that_nobody_reads_ends_the_command(tmp_path, read):
    """As `| head` does; what was saved stays."""
    command = [sys.executable, "-m", "train", "linreg", "--compile", "off", "--epochs", "3"]
    with subprocess.Popen(
        [*command, "--out", tmp_path / "it"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        for _ in range(read):
            process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"interrupted: nothing reads the output any more\n"
        assert process.wait() == 141


@pytest.mark.usefixtures("one_pass")
def test_run_folder_holds_configuration_metrics_curves_and_parameters(run, tmp_path):
    assert run("softmax", "--data", "sample", "--epochs", 2, "--lr", 0.2, "--out", "it")[0] == 0
    folder = tmp_path / "it"
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"] == "softmax" and config["options"]["lr"] == 0.2
    assert "SAMPLE" in config["data"] and config["environment"]["torch"] == torch.__version__
    last = records(folder)[-1]
    assert last["epoch"] == 2 and last["accuracy"] > 0.6 and last["test_accuracy"] > 0.6
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The parameters are those whose accuracy was reported.
    params, test = (
        fdl.io.load(folder / "params.safetensors"),
        data.fashion_mnist_sample(train=False),
    )
    x = test.x.reshape(len(test.x), -1).float() / 255
    guesses = (x @ params["1"]["weight"].T + params["1"]["bias"]).argmax(1)
    assert (guesses == test.y).double().mean().item() == pytest.approx(last["test_accuracy"])


@pytest.mark.slow
@pytest.mark.usefixtures("one_pass")
def test_statistics_of_batch_norm_are_saved_among_the_parameters(run, tmp_path):
    options = ["--data", "sample", "--epochs", 2, "--batch-size", 500, "--compile", "off"]
    assert run("lenet-bn", *options, "--out", "it")[0] == 0
    saved = fdl.io.load(tmp_path / "it" / "params.safetensors")
    params, buffers = tree.partition(saved, lambda path, _: path.endswith(("weight", "bias")))
    assert buffers["fc"]["1"]["num_batches_tracked"] == 24
    test = data.fashion_mnist_sample(train=False)
    logits, _ = models.lenet_bn().apply(params, buffers, test.x[:, None].float() / 255)
    accuracy = (logits.argmax(1) == test.y).double().mean().item()
    last = records(tmp_path / "it")[-1]
    assert accuracy == pytest.approx(last["test_accuracy"]) and last["accuracy"] > 0.3
    code, out, _ = run("eval", "it")
    assert code == 0 and f"test accuracy {accuracy:.6g}" in out


@pytest.mark.slow
def test_the_sample_that_was_asked_for_is_named_and_no_warning(run):
    _, out, err = run("softmax", "--data", "sample", "--epochs", 1, "--compile", "off")
    first, second, *_ = out.splitlines()
    assert first == "softmax: a SAMPLE of Fashion-MNIST, 6,000 + 1,000 images; cpu, seed 0"
    assert second.startswith("an epoch is 10 passes over it") and not err


@pytest.mark.slow
def test_auto_falls_back_to_the_sample_and_says_why_in_two_lines(run, monkeypatch):
    def absent(*args, **kwargs):
        raise FileNotFoundError("here\nor there") from OSError("no network " * 20)

    monkeypatch.setattr(data, "fashion_mnist", absent)
    code, _, err = run("softmax", "--epochs", 1, "--compile", "off")
    assert code == 0
    why, what = err.splitlines()
    assert why.startswith("no Fashion-MNIST on this machine: no network no") and "sample" in what
    assert max(len(why), len(what)) <= 80


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["weight-decay", "--epochs", 2],
        ["linreg-decay", "--validation", 0.1],
        ["softmax", "--data", "sample", "--epochs", 10, "--validation", 0.1],
    ],
    ids=lambda args: args[0],
)
@pytest.mark.usefixtures("one_pass")
def test_lines_fit_80_columns_and_the_end_says_what_to_do_next(run, args):
    code, out, err = run(*args, "--compile", "off")
    lines = out.splitlines()
    assert code == 0 and not err and max(map(len, lines)) <= 80
    folder = Path(lines[lines.index("next, for example:") - 1].strip())
    assert (folder / "params.safetensors").is_file()
    commands = out[out.index("next, for example:") :].replace("\\\n", " ").splitlines()[1:]
    for command in commands:
        words = command.split()
        assert words[:3] == ["python", "-m", "train"] and str(folder) in words
        if "predict" not in words:
            assert run(*words[3:])[0] == 0


@pytest.mark.curriculum("G1")
@pytest.mark.parametrize(
    "args, message",
    [
        (["linreg", "--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["linreg", "--lr", "nan"], "--lr must be finite and at least 0, got nan"),
        (["linreg", "--epochs", 0], "--epochs must be at least 1, got 0"),
        (["linreg", "--seed", -1], "--seed must be in"),
        (["dropout", "--rates", 0.2, 1.0], "--rates must be in [0, 1)"),
        (["linreg", "--device", "cuda:99"], "CUDA devices; use --device cpu"),
        (["linreg", "--device", "gpu"], "--device must be auto, cpu, cuda or cuda:N"),
        (["linreg", "--out", "/dev/null/it"], "Not a directory"),
        (["softmax", "--data", "nowhere"], "nowhere"),
        (["linreg", "--lr", "fast"], "--lr"),
        (["linear"], "linear"),
        ([], "--help"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_clear_message_and_exit_code_2(run, tmp_path, args, message):
    code, _, err = run(*args)
    assert code == 2 and message in err and "Traceback" not in err
    assert not list(tmp_path.glob("**/config.json"))


def test_a_finished_run_is_not_overwritten(run):
    assert run("linreg", "--epochs", 1, "--out", "it")[0] == 0
    code, _, err = run("linreg", "--epochs", 1, "--out", "it")
    assert code == 2 and "holds a run already" in err


@pytest.mark.curriculum("D1")
def test_data_draws_ten_images_and_times_a_pass(run, tmp_path):
    code, out, _ = run("data", "--data", "sample")
    assert code == 0 and "24 batches of 256" in out and "images/s" in out
    assert (tmp_path / "runs/data/images.png").read_bytes().startswith(b"\x89PNG")


def walk(config, chunk, compile=False, stopped=lambda: False):
    problem, state, data_key = recipes.set_up(config, torch.device("cpu"))
    plan = Plan(compile, chunk, "test")
    return list(
        loop.epochs(
            problem,
            config,
            plan,
            loop.make_programs(problem, config, plan, state),
            tree.map(torch.clone, state),
            data_key,
            loop.START,
            stopped=stopped,
            on_chunk=lambda state, progress, steps, loss: None,
        )
    )


@pytest.mark.parametrize("chunk", [1, 3, 7, 200])
def test_the_length_of_chunks_changes_nothing(chunk):
    config = Linreg(epochs=2, examples=95, momentum=0.5)
    whole, cut = walk(config, 10), walk(config, chunk)
    assert not tree.diff(whole[-1].state, cut[-1].state)
    for a, b in zip(whole, cut, strict=True):
        assert a.examples == b.examples == 95
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-12)
    assert int(cut[-1].state.step) == 20  # steps of padding do not count


def test_the_loop_equals_a_plain_loop_over_short_batches():
    config = LinregDecay(epochs=2, examples=120)
    problem, state, data_key = recipes.set_up(config, torch.device("cpu"))
    step = fdl.train_step(problem.loss, problem.opt)
    for epoch in range(2):
        order = random.permutation(random.fold_in(data_key, epoch), 120)
        for rows in order.split(50):  # 50, 50, 20
            state, _ = step(state, (problem.train.x[rows], problem.train.y[rows]))
    assert not tree.diff(state.params, walk(config, 2)[-1].state.params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", [Linreg(epochs=2, examples=95)], ids=["linreg"])
def test_compiled_and_eager_runs_agree(config):
    eager, compiled = walk(config, 4), walk(config, 4, compile=True)
    assert not tree.diff(eager[-1].state, compiled[-1].state, rtol=1e-5, atol=1e-6)


def test_a_stop_ends_after_the_chunk_with_what_is_done():
    config = Linreg(epochs=5, examples=100)
    asked = iter([False, False, True])
    (epoch,) = walk(config, 2, stopped=lambda: next(asked))
    assert epoch.end == "interrupted" and epoch.examples == 60 and int(epoch.state.step) == 6


@pytest.mark.slow
def test_a_run_is_reproduced_by_its_seed(run, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        args = ("dropout", "--data", "sample", "--epochs", 1, "--seed", seed, "--out", name)
        args += ("--compile", "off")
        assert run(*args)[0] == 0
    a, b, c = (fdl.io.load(tmp_path / name / "params.safetensors") for name in "abc")
    assert not tree.diff(a, b) and tree.diff(a, c)


def test_ridge_is_where_the_gradient_vanishes():
    drawn = data.synthetic_linear(random.key(0), [1.0, -1.0, 2.0], 5.0, 500, 0.1)
    *w, b = recipes.ridge(drawn, 0.1)
    x, y, weight = drawn.x.double(), drawn.y.double()[:, 0], torch.stack(w)
    residual = x @ weight + b - y
    torch.testing.assert_close(2 * x.T @ residual / 500, -0.1 * weight, atol=1e-7, rtol=0)
    torch.testing.assert_close(2 * residual.mean(), -0.1 * b, atol=1e-7, rtol=0)


def test_evaluation_counts_every_test_image_once(monkeypatch):
    monkeypatch.setattr(loop, "EVAL_BATCH", 300)  # does not divide 1,000
    problem, state, _ = recipes.set_up(Softmax(data="sample"), torch.device("cpu"))
    tests = data.sequential_indices(1000, 300)
    found = loop.run_evaluation(problem)
    with fdl.disable_jit():
        metrics = found(state, problem.test, tests)
    assert metrics["accuracy"].count == 1000
    whole = problem.loss(
        state.params, data.to_float(data.batch(problem.test, whole_set(problem.test)))
    )[1]
    assert metrics["loss"].value.item() == pytest.approx(whole["loss"].value.item(), rel=1e-6)


def whole_set(dataset: Dataset):
    index, mask = data.sequential_indices(len(dataset.x), len(dataset.x))
    return index[0], mask[0]


def test_evaluation_drops_nothing_at_random():
    problem, state, _ = recipes.set_up(Dropout(data="sample"), torch.device("cpu"))
    batch = data.to_float(data.batch(problem.test, whole_set(problem.test)))
    first, second = (problem.loss(state.params, batch)[0] for _ in range(2))
    assert first == second != problem.loss(state.params, batch, train=True, key=random.key(0))[0]


MODULES = (
    "__main__ bench.scaling bench.step_time config images launch loop options recipes records "
    "planning plots resume run run_folder sweep.grid sweep.results sweep.run"
)


@pytest.mark.parametrize("name", MODULES.split())
def test_examples_in_docstrings_run(name):
    found = doctest.testmod(importlib.import_module(f"train.{name}"))
    assert found.attempted and not found.failed


def test_help_of_an_option_is_one_line_of_the_source():
    """What follows a line break there starts a new line of the help, wherever the first ended."""
    classes = [c for c in ast.parse(inspect.getsource(config)).body if isinstance(c, ast.ClassDef)]
    for kind in classes:
        for before, text in itertools.pairwise(kind.body):
            if isinstance(before, ast.AnnAssign):
                said = ast.literal_eval(text.value) if isinstance(text, ast.Expr) else "inherited."
                assert "\n" not in said and said.endswith((".", "…")), (kind.name, said)


@pytest.mark.parametrize(
    ("args", "command", "said"),
    [
        (["softmax", "--epoch", 2], "softmax", "--epochs INT"),
        (["linreg", "--lr", "fast"], "linreg", "could not convert"),
        (["sweep", "mlp", "--grid", "lr", 0.1], "sweep mlp", "0.1"),
        (["eval"], "eval", "PATH"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_wrong_option_points_at_the_help_of_its_own_command(run, args, command, said):
    code, _, err = run(*args)
    others = set(config.RECIPES) - {command, "linreg"}
    assert code == 2 and said in err and f"python -m train {command} --help" in err
    assert not any(f"{other} --help" in err for other in others if not command.endswith(other))
    assert max(map(len, err.splitlines())) <= 80


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [run_folder.make(None, "linreg").name for _ in range(3)]
    assert len(set(names)) == 3 and {len(name) for name in names} <= {17, 24}


def test_threads_wait_as_the_user_says():
    for name, value in [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")]:
        environ = {name: value}
        wait_without_spinning(environ)
        assert environ == {name: value}


def test_inspect_prints_a_saved_tree(run, tmp_path):
    params = {"fc": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "rate": 0.5}
    fdl.io.save(tmp_path / "it.safetensors", params, metadata={"epoch": 3})
    code, out, err = run("inspect", "it.safetensors")
    assert code == 0 and not err
    assert out == (
        "path       shape   dtype    bytes\n"
        "fc.weight  [2, 3]  float32     24\n"
        "fc.bias    [2]     float32      8\n"
        "rate       0.5     float\n"
        "total                          32\n"
        'metadata {\n  "epoch": 3\n}\n'
    )


def test_inspect_says_what_is_wrong_with_a_file(run, tmp_path):
    (tmp_path / "it").write_bytes(b"x" * 99)
    assert run("inspect", "absent") == (2, "", "error: inspect: no such file: absent\n")
    code, out, err = run("inspect", "it")
    assert (
        code == 2 and not out and err.startswith("error: inspect: cannot read it: expected a safet")
    )
