"""Whatever ends a writer, and whenever: what is there is whole, and what was promised is there."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdl import TrainState, random
from fdl.checkpointing import Checkpointer, restore
from tests.support.soak import repeats
from tests.train.test_resume import assert_same_run

ROOT = Path(__file__).parents[2]


def killing(kind, folder, kills):
    done = subprocess.run(
        [sys.executable, "tests/workers/kill_worker.py", kind, str(folder), str(kills)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_writer_killed_many_times(tmp_path):
    kills = repeats(40, 200)
    seen = killing("saving", tmp_path / "checkpoints", kills)
    assert seen["kills"] == kills
    # The moments are what they should be: within files, and such that work gets on. How often
    # depends on the load of the machine.
    assert seen["in the middle of a file"] >= kills // 10 and seen["new states"] >= kills // 10


@pytest.mark.slow
def test_a_run_killed_many_times_equals_one_that_was_not(tmp_path):
    kills = repeats(6, 20)
    assert killing("training", tmp_path, kills)["kills"] >= kills
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


class Disk:
    """A disk that keeps, when the power fails, no more than what it was told to keep.

    The content of a file counts from its fsync; before, there may be nothing or a part. A name that
    was made, changed or removed counts from the fsync of the folder; before, each such change may
    or may not have happened, in any combination.
    """

    def __init__(self, ignores=None):
        self.ignores = ignores  # "file" or "folder": whose fsync does nothing
        self.numbers = itertools.count()
        self.files = {}  # inode -> number of our own, since inodes are used again
        self.content = {}  # number -> bytes that are on the disk, None before fsync
        self.names = {}  # name -> number, on the disk
        self.changes = []  # functions of names, since the last fsync of the folder
        self.cuts = []  # what may be found after a power cut, and how much was promised then
        self.promised = 0

    def watch(self, monkeypatch):
        opened, unlink, replace, fsync = Path.open, Path.unlink, os.replace, os.fsync

        def watched_open(path, mode="r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            if "x" in mode or "w" in mode:
                number = self.files[os.fstat(file.fileno()).st_ino] = next(self.numbers)
                self.content[number] = None
                self.changed(lambda names: names.update({path.name: number}))
            return file

        def watched_unlink(path, **kwargs):
            unlink(path, **kwargs)
            self.changed(lambda names: names.pop(path.name, None))

        def watched_replace(source, target):
            number = self.files[os.stat(source).st_ino]
            replace(source, target)
            old, new = Path(source).name, Path(target).name

            def change(names):
                names.pop(old, None)
                names[new] = number

            self.changed(change)

        def watched_fsync(fd):
            fsync(fd)
            kind = "folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"
            if kind == self.ignores:
                return
            if kind == "file":
                with open(f"/proc/self/fd/{fd}", "rb") as file:
                    self.content[self.files[os.fstat(fd).st_ino]] = file.read()
            else:
                for change in self.changes:
                    change(self.names)
                self.changes = []
            self.cut()

        monkeypatch.setattr(Path, "open", watched_open)
        monkeypatch.setattr(Path, "unlink", watched_unlink)
        monkeypatch.setattr(os, "replace", watched_replace)
        monkeypatch.setattr(os, "fsync", watched_fsync)

    def changed(self, change):
        self.changes.append(change)
        self.cut()

    def cut(self):
        """Write down everything that a power cut at this moment may leave."""
        for happened in itertools.product([False, True], repeat=len(self.changes)):
            names = dict(self.names)
            for change in itertools.compress(self.changes, happened):
                change(names)
            for unsynced in (b"", b"\0" * 1000):
                found = {
                    name: unsynced if self.content[number] is None else self.content[number]
                    for name, number in names.items()
                }
                if (found, self.promised) not in self.cuts:
                    self.cuts.append((found, self.promised))


def make(step):
    params = {"w": torch.full((20,), float(step))}
    return TrainState(params, {}, (), random.key(step), torch.tensor(step))


def power_cuts(folder, monkeypatch, saves, ignores=None):
    """Save some times, and give what each possible power cut would have left."""
    disk = Disk(ignores)
    with monkeypatch.context() as patch, Checkpointer(folder, keep=1) as checkpointer:
        disk.watch(patch)
        for step in range(1, saves + 1):
            checkpointer.save(make(step))
            checkpointer.wait()
            disk.promised = step
            disk.cut()
    return disk.cuts


def is_kept(cut, promised, folder):
    """Whether, after a power cut, there is what was promised, or already the next state, whole."""
    folder.mkdir()
    for name, content in cut.items():
        (folder / name).write_bytes(content)
    found = restore(folder)  # a damaged file on the way would be a warning, and so an error
    step = int(found.state.step) if found else 0
    assert not found or (found.state.params["w"] == step).all()
    return step in (promised, promised + 1)


def test_no_power_cut_takes_what_was_promised(tmp_path, monkeypatch):
    cuts = power_cuts(tmp_path / "checkpoints", monkeypatch, 6)
    assert len(cuts) > 50 and cuts[-1][1] == 6
    assert all(is_kept(*cut, tmp_path / str(i)) for i, cut in enumerate(cuts))


def test_the_test_above_sees_a_missing_fsync(tmp_path, monkeypatch):
    cuts = power_cuts(tmp_path / "by file", monkeypatch, 2, ignores="file")
    with pytest.raises(RuntimeWarning, match="damaged"):
        [is_kept(*cut, tmp_path / f"file{i}") for i, cut in enumerate(cuts)]
    cuts = power_cuts(tmp_path / "by folder", monkeypatch, 2, ignores="folder")
    assert not all(is_kept(*cut, tmp_path / f"folder{i}") for i, cut in enumerate(cuts))
