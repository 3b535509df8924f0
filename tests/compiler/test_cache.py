"""The cache of programs on disk: shared by processes, whatever happens to them or to its files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl import jit, scan
from fdl._compiler import _cache
from fdl._torch_compat import RELEASE
from tests.train.test_recipes import RECIPES
from tests.workers import cache_worker

ROOT = Path(__file__).parents[2]
NAME = "00ab" + _cache.ENTRY
compiles = pytest.mark.skipif(RELEASE < (2, 12), reason="programs need Python there")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Something to keep."""
    path = tmp_path / "library.so"
    path.write_bytes(bytes(range(256)) * 20)
    return path


def entries(folder: Path) -> list[Path]:
    """The programs in a cache: not the extension that calls them."""
    return [p for p in folder.glob(f"*{_cache.ENTRY}") if not p.name.startswith("dispatch")]


def start(folder: Path, *cases: str, **variables: str) -> subprocess.Popen[str]:
    """Start a process that runs cases of the worker; its Inductor has an empty cache of its own."""
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.workers.cache_worker"]
    environment = {"FDL_CACHE": str(folder)} | variables
    return subprocess.Popen(
        [*command, *cases],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a worker has printed; it must have ended well."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert "CUDA" not in err  # of which torch warns if it finds CUDA's compiler and no GPU
    return json.loads(out.splitlines()[-1])


# ----------------------------------------------------------------------- what comes out of it


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("kind, names", [("program", cache_worker.PROGRAMS), ("recipe", RECIPES)])
def test_a_second_process_computes_the_same_bits_without_a_compiler(
    kind: str, names: Iterable[str], tmp_path: Path
) -> None:
    """Programs of users and the recipes' steps; strings have other hashes in each process."""
    cases = [f"{kind}:{name}" for name in names]
    cold = result(start(tmp_path, *cases, PYTHONHASHSEED="1"))
    nowhere = str(tmp_path / "inductor")
    warm = result(start(tmp_path, *cases, PYTHONHASHSEED="2", TORCHINDUCTOR_CACHE_DIR=nowhere))
    assert cold.pop("inductor") and not warm.pop("inductor")
    for case in cases:
        (bits, cached), (same, again) = cold[case], warm[case]
        assert bits == same, case
        assert cached and not any(cached), case
        assert again and all(again), case


@pytest.mark.slow
@compiles
def test_what_can_go_wrong_in_a_program_does_so_in_a_cached_one(tmp_path: Path) -> None:
    """Errors, Ctrl-C, a fork; and what only Python can do is not taken from another process."""
    cases = list(cache_worker.CASES)
    first = result(start(tmp_path, *cases))
    second = result(start(tmp_path, *cases))
    assert {case: first[case][0] for case in cases} == {case: second[case][0] for case in cases}
    not_cached = {case for case in cases if not all(second[case][1])}
    assert not_cached == {"printed", "with own operator"}


@pytest.mark.slow
@compiles
def test_of_two_processes_one_compiles_and_the_other_waits(tmp_path: Path) -> None:
    processes = [start(tmp_path, "scaled") for _ in range(2)]
    (a, first), (b, second) = (result(process)["scaled"] for process in processes)
    assert a == b and sorted(first + second) == [False, True]
    assert len(entries(tmp_path)) == 1


@pytest.mark.slow
@compiles
def test_a_process_that_is_killed_leaves_nothing_behind(program_cache: Path, library: Path) -> None:
    """It has locked the program, and writes it: the next one neither waits nor finds a part."""
    code = (
        "import sys, signal, os\n"
        "from fdl._compiler import _cache\n"
        "def replace(*paths):\n"
        "    if 'dispatch' in str(paths[1]): return rename(*paths)\n"
        "    print('writes', flush=True)\n"
        "    signal.pause()\n"
        "rename, os.replace = os.replace, replace\n"
        "from tests.workers import cache_worker\n"
        "cache_worker.main('scaled')\n"
    )
    environment = os.environ | {"FDL_CACHE": str(program_cache)}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"writes\n"
        (part,) = program_cache.glob(f"*{_cache.UNFINISHED}")
        assert part.stat().st_size > 1000 and not entries(program_cache)
        writer.send_signal(signal.SIGKILL)
    assert result(start(program_cache, "scaled"))["scaled"][1] == [False]
    assert part.exists()  # its process may be alive, for all that others know
    os.utime(part, (0, time.time() - _cache.ABANDONED - 1))
    _cache.keep(NAME, library, {})
    assert not part.exists() and len(entries(program_cache)) == 2


def tripled(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 3


def is_cached() -> bool:
    """Jit a function anew, check what it returns, and tell whether it was cached."""
    fn, x = jit(tripled), torch.arange(5.0)
    torch.testing.assert_close(fn(x), tripled(x))
    (report,) = fn.report()
    return report.cached


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1],
    "a byte of the library": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "empty": lambda data: b"",
    "garbage": lambda data: bytes(range(256)) * 50,
}


@pytest.mark.slow
@compiles
def test_a_damaged_entry_is_compiled_again(program_cache: Path) -> None:
    assert not is_cached() and is_cached()
    (path,) = entries(program_cache)
    for name, damage in DAMAGES.items():
        # Under the name of a loaded library there is another file now.
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(damage(whole))
        assert not is_cached(), name
        assert is_cached(), name


@pytest.mark.slow
@compiles
def test_the_report_of_a_cached_program(program_cache: Path) -> None:
    """It tells what that one does which was compiled, but for the time."""
    reports = []
    for _ in range(2):
        fn = jit(lambda x: scan(lambda c, z: (c + z, c.exp()), x[0], x)[1].sum())
        fn(torch.ones(50, 2))
        reports += fn.report()
    compiled, cached = reports
    assert not compiled.cached and cached.cached
    assert cached._replace(seconds=0, times=(), cached=False) == compiled._replace(
        seconds=0, times=(), cached=False
    )
    assert cached.times.compile == 0 < min(cached.times.trace, cached.times.load, cached.times.run)
    assert sum(cached.times) == cached.seconds
    assert min(compiled.times) > 0


@pytest.mark.slow
@compiles
def test_an_entry_that_cannot_be_loaded_is_compiled_again(program_cache: Path) -> None:
    """As if it had been linked with a library that is gone."""
    assert not is_cached()
    (path,) = entries(program_cache)
    about = _cache.find(path.name)[1]
    broken = program_cache / "broken"
    broken.write_bytes(b"\x7fELF and no more")
    path.unlink()
    _cache.keep(path.name, broken, about)
    assert not is_cached() and is_cached()


# ---------------------------------------------------------------------------- folders and files


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=2000), st.dictionaries(st.text(), st.integers()), st.data())
def test_an_entry_is_found_whole_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, about: Any, choice: Any
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    library = folder / "library.so"
    library.write_bytes(data)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FDL_CACHE", str(folder))
        path = _cache.keep(NAME, library, about)
        assert path and _cache.find(NAME) == (path, about)
        whole = path.read_bytes()
        assert whole.startswith(data)
        i = choice.draw(st.integers(0, len(whole) - 1))
        flipped = whole[i] ^ choice.draw(st.integers(1, 255))
        path.write_bytes(whole[:i] + bytes([flipped]) + whole[i + 1 :])
        assert _cache.find(NAME) is None and not path.exists()
        path.write_bytes(whole[:i])
        assert _cache.find(NAME) is None and not path.exists()


PLACES = {
    "chosen": ({"FDL_CACHE": "/a/b", "XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/a/b"),
    "chosen in the home": ({"FDL_CACHE": "~/b", "HOME": "/h"}, "/h/b"),
    "off": ({"FDL_CACHE": "0", "HOME": "/h"}, None),
    "XDG": ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/fdl"),
    "relative XDG": ({"XDG_CACHE_HOME": "c", "HOME": "/h"}, "/h/.cache/fdl"),
    "empty": ({"FDL_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/fdl"),
    "home": ({"HOME": "/h"}, "/h/.cache/fdl"),
}


@pytest.mark.parametrize("variables, expected", PLACES.values(), ids=PLACES)
def test_where_it_is(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FDL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _cache.folder() == (expected and Path(expected))


def test_a_relative_folder_is_one_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library without a folder in its name would be looked for in the system's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FDL_CACHE", ".")
    assert _cache.folder() == tmp_path


def test_without_a_home_nothing_is_kept(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no name."""
    for name in ("FDL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    assert _cache.folder() is None
    with _cache.lock(NAME):
        assert _cache.find(NAME) is None and _cache.keep(NAME, library, {}) is None
    assert not _cache.is_writable()


def test_the_default_folder_is_the_users_alone(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FDL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _cache._warn_once.cache_clear()
    path = _cache.keep(NAME, library, {})
    assert path == tmp_path / "fdl" / NAME and path.parent.stat().st_mode & 0o777 == 0o700
    for mode in (0o777, 0o770, 0o720, 0o702):
        path.parent.chmod(mode)
        assert _cache.find(NAME) is None and not _cache.is_writable(), oct(mode)
        with pytest.warns(UserWarning, match="other users can write to it"):
            assert _cache.keep(NAME, library, {}) is None
        _cache._warn_once.cache_clear()
    path.parent.chmod(0o755)
    assert _cache.find(NAME) == (path, {}) and _cache.is_writable()
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    assert _cache.find(NAME) is None
    with pytest.warns(UserWarning, match="other users can write to it"):
        assert _cache.keep(NAME, library, {}) is None
    monkeypatch.setenv("FDL_CACHE", str(path.parent))  # whoever chooses a folder trusts it
    assert _cache.find(NAME) == (path, {})


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be written, by the superuser either."""
    if os.getuid():
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        real = open

        def refuse(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if set(mode) & set("wxa") and Path(path).parent == folder:
                raise OSError(30, "Read-only file system", str(path))
            return real(path, mode, *rest, **options)

        monkeypatch.setattr("builtins.open", refuse)
        yield


def test_a_read_only_folder_is_read_and_one_warning_says_so(
    program_cache: Path, library: Path
) -> None:
    _cache.keep(NAME, library, {"a": 1})
    with read_only(program_cache), _cache.lock(NAME):
        assert _cache.find(NAME) == (program_cache / NAME, {"a": 1})
        with pytest.warns(UserWarning, match=re.escape(f"({program_cache}: ")) as caught:
            for i in range(3):
                assert _cache.keep(f"{i:04}{_cache.ENTRY}", library, {}) is None
        assert len(caught) == 1 and "FDL_CACHE=0 turns this off" in str(caught[0].message)
    assert [path.name for path in entries(program_cache)] == [NAME]


def test_where_the_folder_should_be_there_is_a_file(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDL_CACHE", str(library))
    _cache._warn_once.cache_clear()
    with _cache.lock(NAME), pytest.warns(UserWarning, match="File exists"):
        assert _cache.find(NAME) is None and _cache.keep(NAME, library, {}) is None
    assert not _cache.is_writable()


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be written from now on: what Linux's /dev/full does."""
    real = open

    def to_full_disk(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if str(path).endswith(_cache.UNFINISHED):
            real(path, mode).close()
            return real("/dev/full", "wb")
        return real(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", to_full_disk)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_a_warning(
    program_cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        for _ in range(3):
            assert _cache.keep(NAME, library, {}) is None
    assert len(caught) == 1
    assert list(program_cache.iterdir()) == []  # and no part of a file is left


@pytest.mark.slow
@compiles
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_on_a_full_disk_functions_are_compiled(
    program_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert not is_cached()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_cached()  # and nothing is said again


@pytest.mark.slow
@compiles
def test_turned_off_it_neither_reads_nor_writes(
    program_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_cached() and is_cached()
    before = {path: path.stat().st_mtime_ns for path in program_cache.iterdir()}
    monkeypatch.setenv("FDL_CACHE", "0")
    assert not is_cached()
    assert before == {path: path.stat().st_mtime_ns for path in program_cache.iterdir()}


def test_what_was_used_longest_ago_makes_room(
    program_cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i:04x}{_cache.ENTRY}" for i in range(6)]
    size = _cache.keep(names[0], library, {}).stat().st_size
    monkeypatch.setattr(_cache, "LIMIT", 5 * size)
    mine = [
        program_cache / "library.so",
        program_cache / "new-model.pt",
        program_cache / "0000.lock",
    ]
    for path in mine:  # a user's own files in a folder that was chosen
        path.write_bytes(bytes(10 * size))
        os.utime(path, (0, 0))
    for i, name in enumerate(names[:5]):
        _cache.keep(name, library, {})
        os.utime(program_cache / name, (0, 1000 + i))
    assert len(entries(program_cache)) == 5  # as many as there is room for
    assert _cache.find(names[0])  # it is used now
    _cache.keep(names[5], library, {})
    assert {path.name for path in entries(program_cache)} == {names[0], names[5]}
    assert all(path.exists() for path in mine)


# JAX warns of every fork once another test has imported it.
@pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
def test_a_lock_ends_with_its_block_though_a_child_has_it_open(program_cache: Path) -> None:
    """A worker of a DataLoader that was forked meanwhile may live for hours."""
    with _cache.lock(NAME):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    locked = f"from fdl._compiler import _cache\nwith _cache.lock({NAME!r}): print('locked')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", locked], cwd=ROOT, capture_output=True, timeout=100, check=True
        )
        assert done.stdout == b"locked\n"
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_the_extension_has_a_lock_that_no_program_has(program_cache: Path) -> None:
    """The thread that opens it waits for its lock while a program holds its own, and needs it."""
    with _cache.lock("dispatch-0" + _cache.ENTRY):
        for i in range(256):
            with _cache.lock(f"{i:02x}00{_cache.ENTRY}"):
                pass
    assert len(list(program_cache.glob("*.lock"))) == 257
