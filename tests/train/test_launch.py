"""`torchrun -m train`: the run of one process, to the bit, also where a process is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.soak import repeats

KILLS = repeats(1, 25)
LONGEST = 9.0  # seconds from the start of two processes to the death of one; training begins at 4
OPTIONS = ["--data", "sample", "--epochs", "3", "--batch-size", "2000", "--parts", "4"]  # 30 steps


def command(processes, *options, restarts=0):
    one = [sys.executable, "-m", "train"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    several = [*run, f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "-m", "train"]
    return [*(one if processes == 1 else several), *map(str, options)]


def launch(arguments):
    """Start it; what it says goes to a file: a pipe that nobody reads would stop it when full."""
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (outcome reads it)
    process = subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT)
    return process, said


def outcome(process, said):
    with said:
        code = process.wait(timeout=600)
        said.seek(0)
        return code, said.read()


def still_runs(process, said, deadline):
    if process.poll() is None and time.monotonic() < deadline:
        return True
    process.kill()
    pytest.fail(outcome(process, said)[1])


def metrics(folder):
    """The lines, but for how long they took."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "examples_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run on one process."""
    folder = tmp_path_factory.mktemp("torchrun") / "one"
    code, output = outcome(*launch(command(1, "dropout", *OPTIONS, "--out", folder)))
    assert code == 0, output
    return folder


def check_equal(folder, whole):
    found, expected = metrics(folder), metrics(whole)
    for one, other in zip(found, expected, strict=True):
        # Tests are not cut into parts: their mean is summed in another order.
        assert one.pop("test_loss") == pytest.approx(other.pop("test_loss"), rel=1e-6)
    assert found == expected
    name = "params.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_run_of_one_to_the_bit(tmp_path, whole):
    folder = tmp_path / "two"
    code, output = outcome(*launch(command(2, "dropout", *OPTIONS, "--out", folder)))
    assert code == 0, output
    check_equal(folder, whole)
    assert output.count("continues") == 0 and output.count("epoch 3/3") == 1, output


def workers_of(launcher):
    """The training processes that a torchrun has started: those to which it has given a rank."""
    tasks = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    children = {int(pid) for task in tasks for pid in task.read_text().split()}
    return sorted(pid for pid in children if b"\0RANK=" in b"\0" + environment_of(pid))


def environment_of(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it is gone
        return b""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_killed_processes_lose_nothing_and_repeat_nothing(tmp_path):
    """SIGKILL to one of the two, at random moments after they have started."""
    draws, epochs = random.Random(0), str(5 * KILLS)
    options = [*OPTIONS[:3], epochs, *OPTIONS[4:], "--compile", "off"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    code, output = outcome(*launch(command(1, "dropout", *options, "--out", whole)))
    assert code == 0, output
    options += ["--save-every", "0", "--out", folder]
    launcher, said = launch(command(2, "dropout", *options, restarts=KILLS))
    known: set[int] = set()
    for kill in range(KILLS):
        deadline, longest = time.monotonic() + 120, LONGEST
        while len(workers := [pid for pid in workers_of(launcher) if pid not in known]) < 2:
            assert still_runs(launcher, said, deadline)
            time.sleep(0.01)
        known.update(workers)
        if kill == KILLS - 1:  # on a busy machine none may have begun to train yet
            longest = 1.0
            while not any(folder.glob("checkpoints/[0-9]*-step-*")):
                assert still_runs(launcher, said, deadline)
                time.sleep(0.01)
        time.sleep(draws.uniform(0, longest))
        os.kill(draws.choice(workers), signal.SIGKILL)
    code, output = outcome(launcher, said)
    assert code == 0, output
    assert "continues after step" in output  # it was restarted
    check_equal(folder, whole)


SWEEP = ["sweep", "dropout", *OPTIONS[:2], "--epochs", "1", "--compile", "off"]
SWEEP += ["--grid", "lr=0.01:0.4:2log", "--grid", "momentum=0.3,0.6", "--memory", "1e-6"]


def results(folder):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_sweep_is_shared_out_and_survives_the_loss_of_a_process(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "several"
    code, output = outcome(*launch(command(1, *SWEEP, "--out", whole)))
    assert code == 0, output
    launcher, said = launch(command(2, *SWEEP, "--out", folder, restarts=2))
    deadline = time.monotonic() + 120
    while not (done := sorted(folder.glob("groups/[0-9]*/results.json"))):
        assert still_runs(launcher, said, deadline)
        time.sleep(0.01)
    os.kill(workers_of(launcher)[0], signal.SIGKILL)
    written = {path: path.stat().st_mtime_ns for path in done}
    code, output = outcome(launcher, said)
    assert code == 0, output
    assert "of 4 groups are done" in output and "4 of 4" not in output
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert len(results(folder)) == 4 and results(folder) == results(whole)
    name = "best/params.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "restarts", "message"),
    [
        (["--batch-size", "7"], 0, "--batch-size must be divisible by 2, the number of processes"),
        (["--epochs", "1"], 1, "--out or --resume is needed with torchrun --max-restarts 1"),
    ],
)
def test_what_is_wrong_is_said_once_and_clearly(options, restarts, message):
    code, output = outcome(*launch(command(2, "linreg", *options, restarts=restarts)))
    assert code
    assert output.count(f"error: {message}") == restarts + 1, output
