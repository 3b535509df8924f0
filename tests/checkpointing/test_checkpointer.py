"""Checkpoints in a folder: whole, verified, the newest few, by one process at a time."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fdl
from fdl import TrainState, nn, optim, random, tree
from fdl.checkpointing import Checkpointer, _checkpointer, _folder, checkpoints, restore
from fdl.io import _inspect, _tree_file
from tests.support.asserts import equal_bits, unchanged


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def make(step, size=8):
    """A state in which every number tells the step."""
    params = {"w": torch.full((size, 3), float(step)), "b": torch.full((3,), -float(step))}
    state = TrainState(params, {}, optim.adam(0.1).init(params), random.key(7), torch.tensor(step))
    return state


def steps(folder):
    return [checkpoint.step for checkpoint in checkpoints(folder)]


def save_all(folder, *numbers, **options):
    with Checkpointer(folder, **options) as it:
        for number in numbers:
            it.save(make(number), metrics={"loss": abs(number - 3)})


def damage(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_state_comes_back_whole_to_the_bit(folder):
    model = nn.sequential(nn.linear(4, 3), nn.relu, nn.linear(3, 2))
    state = TrainState.create(model, optim.adam(0.1), key=random.key(0))
    state = state._replace(step=torch.tensor(41))
    with Checkpointer(folder) as it, unchanged(state):
        assert it.restore(like=state) is None and it.latest() is None
        it.save(state, metrics={"loss": 0.1}, config={"epoch": 2, "rates": [0.1, None]})
        found = it.restore(like=state)
        alone = it.restore()
    for back in (found.state, alone.state):
        assert type(back) is TrainState
        got, expected = tree.flatten_dict(back), tree.flatten_dict(state)
        assert got.keys() == expected.keys()
        assert all(equal_bits(got[path], expected[path]) for path in got)
    about = found.checkpoint
    assert (about.step, about.metrics) == (41, {"loss": 0.1})
    assert about.config == {"epoch": 2, "rates": [0.1, None]}
    assert about.versions == {"fdl": fdl.__version__, "torch": torch.__version__}


def test_the_state_may_change_or_be_donated_at_once(folder, monkeypatch):
    free = threading.Event()
    write = _tree_file.save

    def slow(*args, **kwargs):
        assert free.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(_checkpointer, "save", slow)
    state = make(1)
    with Checkpointer(folder) as it:
        it.save(state)
        for leaf in tree.leaves(state):
            leaf.zero_()
        free.set()
        assert tree.diff(it.restore(like=state).state, make(1)) == []


def test_leaves_that_are_one_tensor_stay_one(folder):
    state = make(1)
    state = state._replace(buffers={"tied": state.params["w"]})
    with Checkpointer(folder) as it:
        it.save(state)
        back = it.restore(like=state).state
    assert back.buffers["tied"].data_ptr() == back.params["w"].data_ptr()


def test_the_newest_stay_and_the_best(folder):
    save_all(folder, 1, 2, 3, 4, 5, 6, keep=2)
    assert steps(folder) == [6, 5]
    with Checkpointer(folder, keep=2, best=("loss", "min")) as it:
        for number in (2, 3, 4, 5, 6):
            it.save(make(number), metrics={"loss": abs(number - 3)})
        it.save(make(7), metrics={"loss": float("nan")})
        it.save(make(8))
        assert it.best("loss", "min").step == 3 and it.best("loss", "max").step == 3
        assert it.best("accuracy", "max") is None
        assert it.restore(it.best("loss", "min")).state.step == 3
        assert it.latest().step == 8
    assert steps(folder) == [8, 7, 3]


def test_steps_done_again_are_newer(folder):
    save_all(folder, 1, 2, 3)
    save_all(folder, 2)  # another process, from the first one
    assert restore(folder).checkpoint.step == 2
    assert steps(folder) == [2, 3, 2]


def test_due_by_the_time_that_passed(folder, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Checkpointer(folder, every=10) as it:
        assert not it.due()
        now = 110.0
        assert it.due()
        it.save(make(1))
        assert not it.due()
        now = 119.9
        assert not it.due()


@pytest.mark.parametrize("at", [0, 40, -1, "cut", "empty"])
def test_a_damaged_newest_one_is_skipped_by_name(folder, at):
    save_all(folder, 1, 2)
    newest = checkpoints(folder)[0].path
    if at == "cut":
        newest.write_bytes(newest.read_bytes()[:-3])
    elif at == "empty":
        newest.write_bytes(b"")
    else:
        damage(newest, at)
    with pytest.warns(RuntimeWarning, match=f"skipped .*{newest.name}, which is damaged"):
        found = restore(folder, like=make(0))
    assert tree.diff(found.state, make(1)) == []
    with Checkpointer(folder) as it, pytest.warns(RuntimeWarning, match="damaged"):
        assert it.restore().checkpoint.step == 1
    save_all(folder, 2)  # which goes on from there, and is the newest
    assert restore(folder).checkpoint.path.name == "000003-step-2.safetensors"


def test_where_all_are_damaged_nothing_begins_anew(folder):
    save_all(folder, 1, 2)
    for checkpoint in checkpoints(folder):
        damage(checkpoint.path)
    with (
        pytest.warns(RuntimeWarning, match="damaged"),
        pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* is intact; move them"),
    ):
        restore(folder)


def test_an_intact_one_of_another_structure_is_no_damage(folder):
    save_all(folder, 1, 2)
    other = make(0)._replace(params={"w": torch.zeros(8, 3), "c": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"params\.c"):
        restore(folder, like=other)


def test_old_ones_go_only_when_the_new_one_is_on_the_disk(folder, monkeypatch):
    save_all(folder, 1, keep=1)
    synced = []
    fsync, unlink = os.fsync, Path.unlink
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or fsync(fd))

    def watched(path, **kwargs):
        assert len(synced) == 2  # the file and the folder
        unlink(path, **kwargs)

    monkeypatch.setattr(Path, "unlink", watched)
    save_all(folder, 2, keep=1)
    assert steps(folder) == [2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_in_the_thread_is_raised_by_the_next_call(folder, monkeypatch, number, call):
    save_all(folder, 1, 2, keep=2)

    def fails(*args):
        raise OSError(number, os.strerror(number))

    for next_call in ("save", "wait", "latest", "restore", "close"):
        it = Checkpointer(folder, keep=2)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            it.save(make(3))
            with pytest.raises(OSError, match=os.strerror(number)):
                it.save(make(4)) if next_call == "save" else getattr(it, next_call)()
        if next_call != "close":
            it.close()  # it was said once
    assert steps(folder) == [2, 1] and restore(folder).checkpoint.step == 2
    assert sorted(path.name for path in folder.iterdir() if path.name != "lock") == [
        "000001-step-1.safetensors",
        "000002-step-2.safetensors",
    ]


FULL_DISK = """
import resource, signal, sys
import torch
from fdl import TrainState
from fdl.checkpointing import Checkpointer
state = TrainState({"w": torch.ones(1000)}, {}, (), torch.tensor([0, 1]), torch.tensor(1))
large = state._replace(params={"w": torch.ones(100_000)}, step=torch.tensor(2))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
with Checkpointer(sys.argv[1]) as it:
    it.save(state)
    it.save(large)
"""


@pytest.mark.slow
def test_a_file_that_does_not_fit_leaves_the_earlier_ones(folder):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "File too large" in done.stderr
    assert steps(folder) == [1]
    assert {path.name for path in folder.iterdir()} == {"lock", "000001-step-1.safetensors"}


def test_a_read_only_folder_raises(folder, monkeypatch):
    save_all(folder, 1)
    if os.geteuid():
        folder.chmod(0o500)
    else:  # to whom no folder is closed
        opened = os.open

        def refused(path, flags, *args):
            if flags & os.O_CREAT:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return opened(path, flags, *args)

        monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match="lock"):
        Checkpointer(folder)
    assert restore(folder).checkpoint.step == 1  # reading takes no lock
    folder.chmod(0o700)


def test_two_on_one_folder_are_refused_with_the_name_of_the_first(folder):
    with (
        Checkpointer(folder),
        pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on .*; wait"),
    ):
        Checkpointer(folder)
    Checkpointer(folder).close()


HOLDER = """
import sys, time
from fdl.checkpointing import Checkpointer
it = Checkpointer(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_ends_with_its_process_however_that_ends(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"in use by process {holder.pid} on"):
            Checkpointer(folder)
        assert checkpoints(folder) == []
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    Checkpointer(folder).close()


def test_what_a_killed_writer_left_is_cleared_away(folder):
    save_all(folder, 1)
    left = folder / ".000002-step-2.safetensors.0123456789abcdef"
    left.write_bytes(b"half")
    assert steps(folder) == [1]
    Checkpointer(folder).close()
    assert not left.exists()


def test_a_reader_does_not_mind_that_an_old_one_goes(folder, monkeypatch, recwarn):
    save_all(folder, 1, 2)
    inspect = _inspect.inspect

    def removed(path):
        if path.name.startswith("000002"):
            path.unlink()
        return inspect(path)

    monkeypatch.setattr(_folder, "inspect", removed)
    assert restore(folder).checkpoint.step == 1 and not recwarn


def test_errors_at_the_boundary(folder, tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpointer(folder, keep=0)
    with pytest.raises(ValueError, match="every must be at least 0 seconds, got nan"):
        Checkpointer(folder, every=float("nan"))
    with pytest.raises(ValueError, match='best must be "min" or "max", got \'most\''):
        Checkpointer(folder, best=("loss", "most"))
    assert not folder.exists()
    with Checkpointer(folder) as it:
        with pytest.raises(ValueError, match='mode must be "min" or "max", got \'least\''):
            it.best("loss", "least")
        with pytest.raises(TypeError, match=r"config.*set"):
            it.save(make(1), config={"a": {1}})
            it.wait()
    it.close()
    with pytest.raises(ValueError, match="is closed; make a new one"):
        it.save(make(1))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        restore(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        Checkpointer(tmp_path / "file")


def test_a_population_has_one_step(folder):
    state = tree.stack([make(4), make(4)])
    with Checkpointer(folder) as it:
        it.save(state)
        assert it.latest().step == 4 and tree.diff(it.restore(like=state).state, state) == []
