"""The benchmark: every runner trains as the reference does, and one that does not is not fast."""

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import fdl
from fdl import data, tree
from models import torch_modules
from train.__main__ import main
from train.bench import config as bench_config
from train.bench import measure, record, reference, registry, render, workloads
from train.bench import task as tasks
from train.bench.check import Reference, check
from train.bench.client import Client, RunnerError, end_session
from train.bench.fdl_runners import problem_of
from train.bench.runner import Trajectory
from train.bench.torch_peers import Eager, Samples, floats
from train.bench.worker import Worker

ROOT = Path(__file__).parents[2]
RATES = {"matrix_flops": 1e11, "matrix_by": "torch", "copy_bytes": 1e10}
HAS_JAX = not registry.missing("jax-step")


def make_task(name, steps=4, **changes):
    """A task as a run makes it, on the sample, with batches small enough to be quick."""
    bench = bench_config.Bench(workloads=(name,), steps=steps)
    (workload,) = workloads.find(bench)
    if name != "linreg":
        workload = workload._replace(recipe=replace(workload.recipe, batch_size=32))
    task = workloads.make_task(workload, bench, data.fashion_mnist_sample(), "cpu")
    return task._replace(**changes)


@pytest.fixture(scope="module")
def references():
    """Each task's reference, computed once."""
    found = {}

    def get(name):
        if name not in found:
            task = make_task(name)
            found[name] = task, reference.run(task)
        return found[name]

    return get


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in a folder of its own; give its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["python -m train", "bench", *map(str, args)])
        try:
            code = main()
        except SystemExit as stop:  # tyro's way out
            code = stop.code
        return code, *capsys.readouterr()

    return call


# The runners, compiled or not: what they compute is what is tested here, so none is compiled.

NAMES = [
    *("linreg", "softmax", "mlp", "dropout"),
    *("lenet", "lenet-momentum", "lenet-adam", "lenet-bn", "cnn"),
]
# The learner's loop forks, which JAX forbids; two others differ from compile-step in the compiler.
ELSEWHERE = ("learner", "compile-step-cpp", "compile-step-graphs")
IN_PROCESS = [name for name in registry.RUNNERS if name not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("runner", IN_PROCESS)
def test_a_runner_trains_as_the_reference_does(runner, name, references):
    if registry.missing(runner):
        pytest.skip("needs JAX and optax")
    if runner.startswith("jax") and name == "lenet":
        pytest.skip("lenet-momentum does the same and more")
    task, expected = references(name)
    with fdl.disable_jit(), torch.compiler.set_stance("force_eager"):
        found = registry.build(runner, task).trajectory()
    result = check(expected, found, registry.RUNNERS[runner].own_masks)
    assert result.right, result
    moved = [np.abs(found.params[k] - p).max() for k, p in task.params.items()]
    assert min(moved) > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of torch.compile
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # of reduce-overhead
@pytest.mark.parametrize("runner", registry.runners_for("cuda", (), scaling=False))
def test_a_runner_trains_on_cuda_as_the_reference_does(runner, references):
    if registry.missing(runner) or runner == "learner":
        pytest.skip("needs JAX and optax, or forks")
    task, expected = references("lenet-momentum")
    found = registry.build(runner, task._replace(device="cuda")).trajectory()
    result = check(expected, found, registry.RUNNERS[runner].own_masks)
    assert result.right, result


def test_the_list_of_runners_is_that_of_the_command_line():
    assert set(registry.RUNNERS) == set(get_args(bench_config.RunnerName))
    assert set(NAMES) | {"lenet-scaling"} == set(get_args(bench_config.WorkloadName))
    assert "compile-step-graphs" not in registry.runners_for("cpu", (), scaling=False)
    assert set(registry.runners_for("cpu", (), scaling=True)) == set(registry.SCALING["cpu"])
    assert registry.runners_for("cpu", ("eager", "jax-scan"), scaling=True) == ["eager", "jax-scan"]


def test_the_learner_sees_the_images_that_the_others_see():
    task = make_task("softmax")
    samples = Samples(task.x, task.y)
    assert len(samples) == 6000
    image, label = samples[7]
    torch.testing.assert_close(image, floats(task)[7], rtol=0, atol=1e-7)
    assert label == task.y[7]


def test_a_task_survives_its_file(tmp_path):
    task = make_task("dropout")
    tasks.save(task, tmp_path / "task.npz")
    loaded = tasks.load(tmp_path / "task.npz")
    for before, after in zip(task, loaded, strict=True):
        np.testing.assert_equal(after, before)
    assert loaded.images and loaded.rates == (0.2, 0.5) and loaded.rows.shape == (4, 32)


@pytest.mark.slow
def test_a_worker_of_jax_does_not_import_torch():
    code = "import sys, train.bench.worker; print('torch' in sys.modules)"
    if HAS_JAX:
        code = code.replace("worker;", "worker, train.bench.jax_peers;")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# What is wrong is said to be wrong.


class InProcess:
    """A client whose worker is in this process."""

    def __init__(self, runner):
        self.worker, self.warned = Worker(runner), []

    def read(self):
        return {}

    def ask(self, do, **given):
        return getattr(self.worker, do)(**given)


def prepared(runner, expected, tmp_path, name="compile-model"):
    setting = measure.Setting(bench_config.Bench(seconds=0.0), "cpu", 1, tmp_path)
    row = {"name": name, "label": "", "status": "measuring"}
    measure.prepare(InProcess(runner), setting, row, expected)
    return row


def test_a_dropped_weight_decay_is_wrong_and_no_best_peer(references, tmp_path):
    task, expected = references("lenet-momentum")
    assert task.weight_decay and task.momentum
    right = prepared(Eager(task), expected, tmp_path, "eager")
    wrong = prepared(Eager(task._replace(weight_decay=0.0)), expected, tmp_path)
    assert right["status"] == "measuring" and wrong["status"] == "wrong"
    assert "weight moved" in wrong["reason"] and "rounds_us" not in wrong
    assert wrong["check"]["loss"] < 1e-3, "the losses would not have told"
    right["rounds_us"], wrong["rounds_us"] = [20.0], [10.0]  # even if it had been timed
    ours = {"name": "fdl-scan", "status": "measuring", "rounds_us": [30.0], "check": right["check"]}
    entry = {"name": "it", "batch": 32, "steps": 4, "runners": [ours, right, wrong]}
    record.summarise(entry)
    assert entry["best_peer"] == "eager" and entry["fdl_over_best_peer"] == 1.5
    assert "wrong: " in render.terminal_table(entry)
    assert render.markdown_cell(entry, "compile-model") == "wrong"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"lr": 0.1005}, "moved"),
        ({"momentum": 0.8}, "moved"),
        ({"lr": float("nan")}, "a loss is not finite"),
    ],
)
def test_a_slightly_wrong_rate_is_wrong(references, change, said):
    task, expected = references("lenet-momentum")
    runner = Eager(task)
    runner.optimizer.param_groups[0].update(change)  # SGD itself refuses NaN
    runner.reset = lambda: None
    result = check(expected, runner.trajectory(), own_masks=False)
    assert not result.right and said in result.reason


def test_a_call_that_starts_over_is_wrong(references):
    task, expected = references("mlp")
    runner = Eager(task)
    once = runner.losses(runner.epoch())
    twice = Trajectory(np.array(once + once), runner.params())
    result = check(expected, twice, own_masks=False)
    assert not result.right and "loss" in result.reason and "moved" in result.reason


def test_other_masks_are_compared_by_their_spread(references):
    task, expected = references("dropout")
    mean, deviation = expected.other_masks
    params = expected.params
    for sigmas, right in [(4.9, True), (5.1, False)]:
        losses = np.full(8, mean + sigmas * deviation)
        result = check(expected, Trajectory(losses, params), own_masks=True)
        assert result.right == right and result.distance is None
    # The right losses, but from other masks than those that were to be shared:
    own = Eager(task).trajectory()
    assert check(expected, own, own_masks=True).right
    assert not check(expected, own, own_masks=False).right


def test_rounding_is_allowed_only_where_a_parameter_hardly_moves():
    start = {"w": np.ones(1000, np.float32)}
    for moved, right in [(1e-4, True), (1e-2, False)]:
        expected = Reference(np.ones(16), start, {"w": np.ones(1000) + moved}, None)
        off = {"w": (expected.params["w"] * (1 + 3e-7 * (moved / 1e-4))).astype(np.float32)}
        found = check(expected, Trajectory(np.ones(16), off), own_masks=False)
        assert found.distance > 1e-3 and found.right == right


def test_a_bias_that_a_norm_cancels_may_round_and_no_more(references):
    task, expected = references("lenet-bn")
    found = Eager(task).trajectory()
    cancelled = "conv.0.bias"
    assert 0 < np.abs(expected.params[cancelled]).max() < 1e-12, "the premise"
    assert check(expected, found, own_masks=False).right
    found.params[cancelled] = found.params[cancelled] + np.float32(1e-4)
    result = check(expected, found, own_masks=False)
    assert not result.right and result.reason.startswith(f"{cancelled} moved")


@pytest.mark.parametrize("statistic", ["running_mean", "running_var", "num_batches_tracked"])
def test_statistics_that_stand_still_are_wrong(references, statistic):
    task, expected = references("lenet-bn")
    found = Eager(task).trajectory()
    found.params[f"fc.1.{statistic}"] = task.buffers[f"fc.1.{statistic}"]
    result = check(expected, found, own_masks=False)
    assert not result.right and result.reason == f"fc.1.{statistic} moved 1.0e+00 off"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_the_module_of_the_peers(name):
    """In float64 to 1e-12, in evaluation, where batch norms use their statistics."""
    task = make_task(name)
    module = torch_modules.make(task.model, task.rates).double().eval()
    start = {path: torch.from_numpy(p).clone() for path, p in (task.params | task.buffers).items()}
    module.load_state_dict(start)
    model = problem_of(task, torch.device("cpu")).model
    params, buffers = (
        tree.cast(tree.unflatten_dict({path: start[path] for path in part}), torch.float64)
        for part in (task.params, task.buffers)
    )
    x = floats(task)[:5].double()
    y = model.apply(params, buffers, x)[0] if buffers else model.apply(params, x)
    torch.testing.assert_close(y, module(x), rtol=1e-12, atol=1e-12)


# Processes.


def client(runner, path, tmp_path):
    setting = measure.Setting(bench_config.Bench(), "cpu", 1, tmp_path)
    return Client(runner, path, setting.env("x"), tmp_path / "log")


def test_a_runner_that_raises_is_an_error_with_its_reason(tmp_path):
    worker = client("eager", tmp_path / "absent.npz", tmp_path)
    with worker, pytest.raises(RunnerError, match=r"FileNotFoundError: .*absent.npz"):
        worker.read()
    assert worker.process.poll() is not None


def test_a_runner_that_dies_is_an_error_with_its_signal(tmp_path):
    with client("eager", tmp_path / "absent.npz", tmp_path) as worker:
        with pytest.raises(RunnerError):
            worker.read()
        worker.process.kill()
        with pytest.raises(RunnerError, match="the process ended with signal SIGKILL"):
            worker.ask("first")


def test_a_busy_process_is_ended_with_what_it_started():
    script = "sleep 100 & echo $!; wait"
    process = subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    child = int(process.stdout.readline())
    end_session(process)
    assert process.returncode == -9
    assert process.stdout.read() == ""  # at its end: the child holds it open no more
    process.stdout.close()
    assert not Path(f"/proc/{child}/fd/1").exists()


def test_a_failed_runner_is_a_row_and_its_rounds_are_dropped():
    def fail():
        raise RunnerError("out of memory")

    row = {"name": "eager", "status": "measuring", "rounds_us": [1.0]}
    measure.attempt(row, fail)
    assert row == {"name": "eager", "status": "failed", "reason": "out of memory"}
    measure.attempt(row, lambda: pytest.fail("it was asked again"))


def test_warnings_of_a_runner_are_told():
    code = (
        "import warnings\nfrom train.bench.worker import collect_warnings\n"
        "warned = collect_warnings()\n"
        "for _ in range(2): warnings.warn('jit: fell back\\nbecause')\n"
        "warnings.warn('of torch', FutureWarning)\nprint(warned)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['jit: fell back']\n", done.stderr


# The whole command, with runners that compile nothing.


QUICK = ("--workloads", "linreg", "--rounds", 1, "--steps", 5, "--seconds", 0.01)
RUNNERS = ("fdl-eager", "learner", "eager", *(["jax-step"] if HAS_JAX else []))


@pytest.mark.slow
def test_the_command_measures_checks_and_writes(command, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "find_rates", lambda setting: RATES)
    code, out, err = command(
        *QUICK, "--device", "cpu", "--runners", *RUNNERS, "--out", "it/it.json"
    )
    assert code == 0 and not err
    assert max(map(len, out.splitlines())) <= 80
    document = record.read(tmp_path / "it" / "it.json")
    assert document["device"] == "cpu" and document["machine"]["threads"] == 1
    assert torch.__version__.startswith(document["versions"]["torch"])
    (entry,) = document["workloads"]
    assert [runner["name"] for runner in entry["runners"]] == list(RUNNERS)
    assert [runner["status"] for runner in entry["runners"]] == ["right"] * len(RUNNERS)
    for runner in entry["runners"]:
        (us,) = runner["rounds_us"]
        assert us == runner["min_us"] == runner["median_us"] > 0
        assert runner["examples_per_s"] == pytest.approx(10e6 / us, rel=1e-3)
        assert runner["peak_bytes"] >= runner["start_bytes"] > 1e7
        assert runner["check"]["loss"] < 1e-3 and runner["check"]["distance"] < 1e-3
        assert runner["cold_s"] >= 0
        on_disk = runner["name"] == "jax-step"  # the others leave nothing there
        assert ("warm_s" in runner) == ("warm_peak_bytes" in runner) == on_disk
        assert runner["name"] in out
    assert entry["best_fdl"] == "fdl-eager" and entry["best_peer"] in RUNNERS
    # Two products of [10, 2] by [2, 1], forward and for the weight; x needs no gradient.
    assert entry["floor"]["flops"] == 2 * 2 * 10 * 2
    assert entry["floor"]["bytes"] == 10 * (8 + 4 + 8) + 2 * 4 * 3


@pytest.mark.slow
def test_ctrl_c_writes_what_was_measured_and_leaves_no_process(command, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "find_rates", lambda setting: RATES)
    monkeypatch.setattr(
        measure,
        "find_reference",
        lambda setting, task, path: (reference.run(task), reference.count_flops(task)),
    )
    started, rounds, add = [], [], measure.add_round
    monkeypatch.setattr(
        measure, "Client", lambda *args: started.append(Client(*args)) or started[-1]
    )

    def add_round(worker, row):
        rounds.append(row["name"])
        if len(rounds) == 2:
            raise KeyboardInterrupt
        add(worker, row)

    monkeypatch.setattr(measure, "add_round", add_round)
    code, _, err = command(
        *QUICK, "--device", "cpu", "--runners", "eager", "--rounds", 3, "--out", "o"
    )
    assert code == 130 and "interrupted" in err
    (runner,) = record.read(tmp_path / "o")["workloads"][0]["runners"]
    assert runner["status"] == "right" and len(runner["rounds_us"]) == 1
    assert started and all(worker.process.poll() is not None for worker in started)


def test_without_jax_its_runners_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert registry.missing("jax-scan") == ["jax", "optax"] and not registry.missing("eager")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--rounds", 0], "--rounds must be at least 1, got 0"),
        (["--steps", 0], "--steps must be at least 1, got 0"),
        (["--batch-sizes", 64, 0], "--batch-sizes must be at least 1, got 0"),
        (["--batch-sizes"], "--batch-sizes"),
        (["--seconds", -1], "--seconds must be finite and at least 0"),
        (["--workloads", "resnet"], "--workloads"),
        (["--runners", "flax"], "--runners"),
        (
            ["--runners", "compile-step-graphs", "--device", "cpu"],
            "--runners: none of compile-step-gr",
        ),
        (["--device", "tpu"], "--device"),
        (["--data", "nowhere"], "--data must be auto, sample or a folder"),
        (["--out", "there.json"], "--out there.json exists already"),
        (["--out", "/dev/null/it"], "/dev/null"),
        (
            ["--workloads", "lenet-scaling", "--data", "sample", "--batch-sizes", 8192],
            "--batch-sizes: every size exceeds the number of images",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_clear_message_and_exit_code_2(command, tmp_path, args, message):
    (tmp_path / "there.json").write_text("{}")
    code, _, err = command(*args)
    assert code == 2 and message in err and "Traceback" not in err
