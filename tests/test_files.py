"""Paths as people write them: `~`, symbolic links, permissions, odd names."""

import errno
import importlib
import inspect
import os
import pkgutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fdl
from fdl import TrainState, data, nn, optim, random
from fdl._files import atomic_write
from fdl.checkpointing import Checkpointer, _folder

PARAMS = {"w": torch.arange(3.0)}
STATE = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that is not the working directory."""
    there = tmp_path / "home"
    here = tmp_path / "here"
    there.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(there))
    monkeypatch.chdir(here)
    return there


def a_checkpoint(folder: str | Path) -> None:
    with Checkpointer(folder) as it:
        it.save(STATE)


def read_at_home(home: Path) -> Any:
    return fdl.io.load(home / "it.safetensors")["w"].tolist()


def images_at_home(home: Path) -> bool:
    (home / "data").mkdir()
    (home / "data" / "unknown.txt").touch()
    with pytest.raises(FileNotFoundError, match=f"{home}/data: unknown.txt"):
        data.fashion_mnist("~/data", download=False)
    return True


def a_table_at_home(home: Path) -> Any:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    parquet.write_table(table({"x": [1, 2], "y": [3, 4]}), home / "it.parquet")
    return data.table("~/it.parquet", "x", "y")


def refused_at_home(home: Path, read: Callable[[str], Any], library: str, name: str) -> bool:
    """What has no content is found in the home folder, and refused."""
    pytest.importorskip(library)
    (home / name).mkdir()
    with pytest.raises((ValueError, OSError), match=str(home / name)):
        read(f"~/{name}")
    return True


# Each public function that takes a path, and something that is true if it took `~` for the home.
AT_HOME: dict[str, Callable[[Path], Any]] = {
    "io.save": lambda home: (
        fdl.io.save("~/it.safetensors", PARAMS) or read_at_home(home) == [0, 1, 2]
    ),
    "io.load": lambda home: (
        fdl.io.save(home / "it.safetensors", PARAMS) or fdl.io.load("~/it.safetensors")
    ),
    "io.load_matching": lambda home: (
        fdl.io.save(home / "it.safetensors", PARAMS)
        or fdl.io.load_matching("~/it.safetensors", PARAMS)[1] == []
    ),
    "io.inspect": lambda home: (
        fdl.io.save(home / "it.safetensors", PARAMS)
        or fdl.io.inspect("~/it.safetensors").read("w").shape == (3,)
    ),
    "io.save_torch": lambda home: (
        fdl.io.save_torch("~/it.pt", PARAMS) or torch.load(home / "it.pt")
    ),
    "io.load_torch": lambda home: (
        torch.save(PARAMS, home / "it.pt") or fdl.io.load_torch("~/it.pt")
    ),
    "checkpointing.Checkpointer": lambda home: (
        a_checkpoint("~/run") or _folder.checkpoints(home / "run")
    ),
    "checkpointing.checkpoints": lambda home: (
        a_checkpoint(home / "run") or _folder.checkpoints("~/run")
    ),
    "checkpointing.restore": lambda home: a_checkpoint(home / "run") or _folder.restore("~/run"),
    "data.fashion_mnist": images_at_home,
    "data.on_disk": lambda home: (
        np.save(home / "it.npy", np.arange(3)) or data.on_disk("~/it.npy", "~/it.npy")
    ),
    "data.table": a_table_at_home,
    "interop.from_keras": lambda home: refused_at_home(
        home, fdl.interop.from_keras, "h5py", "it.keras"
    ),
    "interop.from_orbax": lambda home: refused_at_home(
        home, fdl.interop.from_orbax, "orbax.checkpoint", "run"
    ),
}
# They take no path of a user: `Checkpoint` is what `checkpoints` returns, `TreeInfo` what `inspect`
# returns.
NOT_GIVEN = {"io.TreeInfo", "checkpointing.Checkpoint"}


def takers_of_paths() -> set[str]:
    found = set()
    for module in pkgutil.iter_modules(fdl.__path__):
        if module.name.startswith("_"):
            continue
        there = importlib.import_module(f"fdl.{module.name}")
        for name in getattr(there, "__all__", []):
            public = getattr(there, name)
            if not callable(public) or not hasattr(public, "__module__"):
                continue
            try:
                parameters = inspect.signature(public).parameters.values()
            except (TypeError, ValueError):
                continue
            if any("Path" in str(parameter.annotation) for parameter in parameters):
                found.add(f"{module.name}.{name}")
    return found


def test_the_table_has_a_row_for_each_public_function_that_takes_a_path() -> None:
    assert takers_of_paths() - NOT_GIVEN == AT_HOME.keys()


@pytest.mark.parametrize("name", AT_HOME)
def test_a_tilde_is_the_home_folder(name: str, home: Path) -> None:
    assert AT_HOME[name](home)
    assert os.listdir() == []


def test_an_unknown_users_home_is_a_name_like_any_other(home: Path) -> None:
    Path("~nobody-of-this-name").mkdir()
    fdl.io.save("~nobody-of-this-name/it.safetensors", PARAMS)
    assert os.listdir("~nobody-of-this-name") == ["it.safetensors"]


@pytest.mark.parametrize(
    "name", ["with a space", "[a]*?", "été", "参数", "参" * 80, "x" * 240, os.fsdecode(b"\xff\xfe")]
)
def test_names_of_every_kind(name: str, tmp_path: Path) -> None:
    fdl.io.save(tmp_path / name, PARAMS)
    assert fdl.io.load(tmp_path / name)["w"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == [name]
    if len(os.fsencode(name)) < 200:
        a_checkpoint(tmp_path / "in" / name)
        assert _folder.restore(tmp_path / "in" / name, like=STATE) is not None


# Symbolic links


@pytest.mark.parametrize("save", [fdl.io.save, fdl.io.save_torch])
def test_through_a_link_the_file_is_written_and_the_link_stays(save: Any, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "folder").symlink_to("far")
    target, link, chain = tmp_path / "far" / "it", tmp_path / "link", tmp_path / "chain"
    link.symlink_to(Path("folder", "it"))
    chain.symlink_to("link")
    for given in (link, chain):  # the first meets a link that leads to nothing yet
        save(given, PARAMS)
        assert link.is_symlink()
        assert chain.is_symlink()
        assert target.is_file()
        target.rename(tmp_path / "far" / "before")
    assert sorted(os.listdir(tmp_path)) == ["chain", "far", "folder", "link"]


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError) as info:
        fdl.io.save(tmp_path / "loop", PARAMS)
    assert info.value.errno == errno.ELOOP
    assert (tmp_path / "loop").is_symlink()


def test_checkpoints_in_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "run").symlink_to("far")
    a_checkpoint(tmp_path / "run")
    # The lock is that of the folder, by either name.
    with Checkpointer(tmp_path / "run"), pytest.raises(BlockingIOError):
        Checkpointer(tmp_path / "far")
    assert [found.step for found in _folder.checkpoints(tmp_path / "far")] == [0]


def test_checkpoints_stay_in_one_folder_when_the_process_goes_to_another(home: Path) -> None:
    with Checkpointer("run") as it:
        os.chdir(home)
        it.save(STATE)
        it.wait()
        assert it.latest() is not None
    assert os.listdir() == []


# Permissions


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.touch()
    path.chmod(mode)
    seen = []

    def write(file: Any) -> None:
        (temporary,) = set(tmp_path.iterdir()) - {path}
        seen.append(stat.S_IMODE(temporary.stat().st_mode))

    atomic_write(path, write)
    assert seen == [mode]  # while it is written as well
    assert stat.S_IMODE(path.stat().st_mode) == mode
    for save in (fdl.io.save, fdl.io.save_torch):
        save(path, PARAMS)
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_follows_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        fdl.io.save(tmp_path / "it", PARAMS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "it").stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    (tmp_path / "it").touch()
    os.chown(tmp_path / "it", 1234, 2345)
    fdl.io.save(tmp_path / "it", PARAMS)
    found = (tmp_path / "it").stat()
    assert (found.st_uid, found.st_gid) == (1234, 2345)


def test_a_hard_link_keeps_the_old_content(tmp_path: Path) -> None:
    fdl.io.save(tmp_path / "it", {"w": torch.zeros(1)})
    os.link(tmp_path / "it", tmp_path / "other")
    fdl.io.save(tmp_path / "it", PARAMS)
    assert fdl.io.load(tmp_path / "other")["w"].tolist() == [0]


def test_a_read_only_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it"
    fdl.io.save(path, PARAMS)
    before = path.read_bytes()
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write everything
    with pytest.raises(PermissionError, match="the file is read-only"):
        fdl.io.save(path, {"w": torch.zeros(1)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["it"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="it is not a regular file"):
        fdl.io.save(tmp_path / "pipe", PARAMS)
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        fdl.io.save(tmp_path / "folder", PARAMS)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_an_absent_or_closed_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"cannot create a file in {tmp_path}/absent"
    ) as info:
        fdl.io.save(tmp_path / "absent" / "it", PARAMS)
    assert info.value.filename == str(tmp_path / "absent" / "it")

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError, match="Permission denied: cannot create a file in"):
        fdl.io.save(tmp_path / "it", PARAMS)
