"""A run: what an epoch is, how it ends where the weights are destroyed, and what it writes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fdl
from fdl import data, random, tree
from fdl._compiler import _inductor
from fdl._torch_compat import RELEASE
from fdl.checkpointing import _folder
from fdl.data import Dataset
from train import loop, planning, recipes, usual
from train.compiling import announced
from train.config import RECIPES, Images, Linreg, Mlp, Softmax, WeightDecay
from train.planning import Plan, steps_per_epoch

ROOT = Path(__file__).parents[2]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def batches(config):
    """The batches of a run, their padding left out: each epoch is a permutation."""
    problem, _, data_key = recipes.set_up(config, torch.device("cpu"))
    for epoch in range(config.epochs):
        order = random.permutation(random.fold_in(data_key, epoch), len(problem.train.x))
        for rows in order.split(config.batch_size):
            mask = torch.ones_like(rows, dtype=torch.bool)
            yield data.to_float(data.batch(problem.train, (rows, mask)))._replace(mask=())


DESTROYED = {
    "in the middle": Linreg(lr=1e6),
    "by the only update": Linreg(lr=1e30, batch_size=1000, epochs=1),
    "by the only update, of images": Softmax(lr=1e38, batch_size=6000, epochs=1, data="sample"),
    "by the first of two": Softmax(lr=1e38, batch_size=3000, epochs=1, data="sample"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("how", DESTROYED)
def test_destroyed_weights_end_a_run_and_those_before_are_kept(run, tmp_path, how):
    config = DESTROYED[how]
    name = type(config).__name__.lower()
    args = ["--lr", config.lr, "--batch-size", config.batch_size, "--epochs", config.epochs]
    args += ["--data", "sample"] if name == "softmax" else []
    code, _, err = run(name, *args, "--out", "it", "--save-every", 0)
    assert code == 1 and "the loss is not finite" in err and "Traceback" not in err
    assert max(map(len, err.splitlines())) <= 80
    # An independent loop: the state before the first update after which a loss is not finite.
    problem, state, _ = recipes.set_up(config, torch.device("cpu"))
    step, taken = fdl.train_step(problem.loss, problem.opt), list(batches(config))
    for i, batch in enumerate(taken):
        after, _ = step(state, batch)
        later = [batch, *taken[i + 1 : i + 2]]
        if not all(problem.loss(after.params, b)[0].isfinite() for b in later):
            break
        state = after
    assert int(err.split()[1]) == int(state.step) + 1
    kept = fdl.io.load(tmp_path / "it" / "params.safetensors")
    assert not tree.diff(state.params, kept, rtol=1e-5, atol=1e-7)
    assert problem.loss(kept, taken[0])[0].isfinite()
    for line in records(tmp_path / "it") if (tmp_path / "it/metrics.jsonl").exists() else []:
        assert line["step"] == int(state.step) and np.isfinite(line["loss"])
    for checkpoint in _folder.checkpoints("it/checkpoints"):
        assert problem.loss(fdl.io.load(checkpoint.path).params, taken[0])[0].isfinite()
    assert run(name, "--resume", "it")[0] == 1  # and again


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.1])
def test_a_sweep_does_not_choose_destroyed_weights(run, one_pass, share):
    options = ["--epochs", 1, "--compile", "off", "--validation", share]
    softmax = ["softmax", "--data", "sample", "--batch-size", 6000, *options]
    code, out, _ = run("sweep", *softmax, "--grid", "lr=1e38,0.1", "--out", "images")
    assert code == 0 and "diverged at step 1" in out and "lr = 0.1" in out
    assert run("sweep", *softmax, "--grid", "lr=1e38", "--out", "none")[0] == 1
    linreg = ["linreg", "--batch-size", 1000, *options]
    assert run("sweep", *linreg, "--grid", "lr=1e30,0.1", "--out", "numbers")[0] == 0
    for folder in ("images", "numbers"):
        assert json.loads(Path(folder, "best/config.json").read_text())["options"]["lr"] == 0.1


def test_speed_is_that_of_training_alone(monkeypatch):
    """By a clock that a chunk advances by 1 s, and all else by 1,000."""
    clock = [0.0]

    def taking(seconds, call):
        def timed(*args, **kwargs):
            clock[0] += seconds
            return call(*args, **kwargs)

        return timed

    for name in ("evaluate", "_is_sound", "epoch_order"):
        monkeypatch.setattr(loop, name, taking(1e3, getattr(loop, name)))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    config = WeightDecay(epochs=2)
    problem, state, data_key = recipes.set_up(config, torch.device("cpu"))
    plan = Plan(False, 5, "test")
    programs = loop.make_programs(problem, config, plan, state)
    found = loop.epochs(
        problem,
        config,
        plan,
        programs._replace(train=taking(1.0, programs.train)),
        state,
        data_key,
        loop.START,
        stopped=lambda: False,
        on_chunk=taking(1e3, lambda *_: None),
    )
    assert [epoch.progress.seconds for epoch in found] == [4.0, 4.0]  # of four chunks each


@pytest.mark.parametrize("batch_size", [256, 1000])
def test_an_epoch_on_the_sample_is_ten_passes_each_shuffled_anew(batch_size):
    config = Softmax(data="sample", batch_size=batch_size)
    problem, _, data_key = recipes.set_up(config, torch.device("cpu"))
    assert problem.passes == 10
    for epoch in (1, 2):
        index, mask = loop.epoch_order(problem, config, data_key, epoch)
        assert len(index) == steps_per_epoch(problem, config)
        passes = zip(index.chunk(10), mask.chunk(10), strict=True)
        for number, (one, counts) in enumerate(passes):
            key = random.fold_in(data_key, 10 * (epoch - 1) + number)
            whole = one[counts] if counts.shape[1] else one.flatten()  # without padding no mask
            assert torch.equal(whole, random.permutation(key, 6000))


def test_on_the_whole_set_an_epoch_is_one_pass(monkeypatch):
    images, labels = data.fashion_mnist_sample(train=False)
    many = Dataset(images.repeat(60, 1, 1), labels.repeat(60))
    monkeypatch.setattr(data, "fashion_mnist", lambda **_: many)
    problem, _, data_key = recipes.set_up(Softmax(), torch.device("cpu"))
    order = loop.epoch_order(problem, Softmax(), data_key, 3)
    expected = data.epoch_indices(random.fold_in(data_key, 2), 60_000, 256)
    assert problem.passes == 1 and not tree.diff(order, expected)


def never(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.slow
@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("config", [Softmax(data="sample"), Mlp(data="sample"), WeightDecay()])
def test_whether_to_compile_does_not_depend_on_how_busy_the_machine_is(config, monkeypatch):
    """Compiled and eager steps round differently: one command would give several results."""
    problem, state, _ = recipes.set_up(config, torch.device("cpu"))
    plans = []
    for seconds in (1e-6, 10.0):
        monkeypatch.setattr(planning, "timed", lambda call, device, s=seconds: s)
        plans.append(planning.make_plan(problem, config, state))
    assert plans[0]._replace(chunk=1) == plans[1]._replace(chunk=1)


def test_files_are_strict_json(run, monkeypatch, tmp_path):
    """Also where a metric is not finite, as here that of the test set."""
    score = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a: score(*a) | {"loss": float("nan")})
    options = ["softmax", "--data", "sample", "--epochs", 2, "--compile", "off"]
    assert run(*options, "--out", "it")[0] == 0
    assert [line["test_loss"] for line in records(tmp_path / "it")] == [None, None]
    assert run("softmax", "--resume", "it", "--epochs", 3)[0] == 0  # reads them back
    assert run("sweep", *options, "--grid", "lr=0.1,1e38", "--out", "sweep")[0] == 0
    for path in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl")]:
        for text in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            json.loads(text, parse_constant=never)


def test_json_is_written_in_one_place():
    """Or a NaN gets into a file that other readers of JSON refuse."""
    for path in (ROOT / "train").rglob("*.py"):
        if path.name != "records.py":
            assert "json.dump" not in path.read_text(), path


@pytest.mark.slow
def test_the_end_says_what_is_usual_for_default_options_alone(run, monkeypatch):
    monkeypatch.setitem(usual.USUAL, ("softmax", 6000, 1), (0.7, 0.82, 0.81))
    options = ["softmax", "--data", "sample", "--epochs", 1, "--compile", "off"]
    _, out, _ = run(*options, "--out", "it")
    found = records(Path("it"))[-1]["test_accuracy"]
    expected = f"test accuracy {found:.3f}; usual after 1 epochs is 0.700 to 0.820"
    assert expected in out.splitlines()
    for other in (["--lr", 0.2], ["--validation", 0.1], ["--batch-size", 1000]):
        assert "usual" not in run(*options, *other)[1]


def test_what_is_usual_is_what_the_readme_says():
    """Its table has every seed, on the whole set, after ten epochs, or fifteen."""
    epochs = {"resnet-small": 15}
    rows = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines()]
    for row in rows:
        name = row[1].strip(" `") if row[1:] else ""
        known = usual.USUAL.get((name, 60_000, epochs.get(name, 10)))
        if known:
            assert [float(text) for text in row[6].split(",")] == list(known)
    assert {recipe for recipe, *_ in usual.USUAL} == {
        name for name, kind in RECIPES.items() if issubclass(kind, Images)
    }


def test_an_older_run_on_the_sample_goes_on_with_one_pass_an_epoch(run, monkeypatch):
    """Its config.json says nothing of passes and validation."""
    options = ["softmax", "--data", "sample", "--compile", "off"]
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "EXAMPLES", 6_000)
        assert run(*options, "--epochs", 2, "--out", "whole")[0] == 0
        assert run(*options, "--epochs", 1, "--out", "old")[0] == 0
    record = json.loads(Path("old/config.json").read_text())
    assert record.pop("passes") == 1 and record["options"].pop("validation") == 0
    Path("old/config.json").write_text(json.dumps(record))
    assert run("softmax", "--resume", "old", "--epochs", 2)[0] == 0
    whole, old = (fdl.io.load(f"{folder}/params.safetensors") for folder in ("whole", "old"))
    assert not tree.diff(whole, old) and records(Path("old"))[-1]["step"] == 48
    assert run("eval", "old")[0] == 0


@pytest.mark.slow
def test_ten_passes_an_epoch_are_resumed_exactly(run):
    options = ["softmax", "--data", "sample", "--compile", "off"]
    assert run(*options, "--epochs", 2, "--out", "whole")[0] == 0
    assert run(*options, "--epochs", 1, "--out", "cut")[0] == 0
    assert run("softmax", "--resume", "cut", "--epochs", 2)[0] == 0
    whole, cut = (fdl.io.load(f"{folder}/params.safetensors") for folder in ("whole", "cut"))
    assert not tree.diff(whole, cut)
    assert json.loads(Path("cut/config.json").read_text())["passes"] == 10


# ----------------------------------------------------------------------- what it says meanwhile


@pytest.mark.slow
@pytest.mark.skipif(RELEASE < (2, 12), reason="programs need Python there")
def test_it_says_that_it_compiles_before_it_does_and_only_then(run, program_cache, monkeypatch):
    monkeypatch.setattr(planning, "timed", lambda *_: 0.01)  # or the chunk may have another length
    code, out, err = run("linreg", "--compile", "on", "--epochs", 1)
    assert code == 0 and re.fullmatch(r"compiling, about \d+ s\n", err)
    assert re.search(r"^compiled: --compile on\ncompiled in \d+\.\d s$", out, re.MULTILINE)
    code, again, err = run("linreg", "--compile", "on", "--epochs", 1)
    assert code == 0 and err == ""
    taken = r"^compiled: --compile on\ntaken from the cache in \d+\.\d s$"
    assert re.search(taken, again, re.MULTILINE)
    epoch = r"^epoch 1/1 .*(?=  \S+/s$)"  # without the speed
    assert re.findall(epoch, out, re.MULTILINE) == re.findall(epoch, again, re.MULTILINE) != []


def test_the_line_comes_before_the_compiler_runs(program_cache, monkeypatch, capsys):
    said = []

    def lower(graph, *_):
        said.append(capsys.readouterr())
        return lambda leaves: graph(*leaves)

    monkeypatch.setattr(_inductor, "lower", lower)
    with announced() as compiled:
        assert not compiled()
        for n in (3, 4):  # a second program is not announced again
            fdl.jit(lambda x: x.sin().sum() + 1)(torch.ones(n))
        assert compiled()
    assert [(out, err) for out, err in said] == [("", "compiling, about 3 s\n"), ("", "")]
    fdl.jit(lambda x: x.sin().sum() + 2)(torch.ones(3))
    assert capsys.readouterr().err == ""  # the library itself says nothing
