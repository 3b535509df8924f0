"""g++ reads headers in advance, of a machine that compiles; what it computes stays as it is."""

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fdl._compiler import _cache, _headers

LIBRARY = "-shared -fPIC -o {0}.so {0}.main.o"
SECONDS = 120  # for a small header, on a busy machine
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="g++ on Linux"
)


class Machine:
    """A folder with a header, and the commands that the compiler was given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, []
        (folder / "torch").mkdir()
        self.write("torch/answer.h", "#pragma once\ninline int answer() { return ANSWER; }")
        self.run_faster = _headers.compile_with(self.run)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def run(self, command: str, cwd: str) -> None:
        self.commands.append(shlex.split(command))
        subprocess.run(shlex.split(command), cwd=cwd, check=True, capture_output=True)

    def program(self, name: str, text: str = "return answer();", answer: int = 42) -> int:
        """Compile a program, run it, and return its result."""
        code = f'#include <torch/answer.h>\nextern "C" int run() {{ {text} }}'
        self.write(f"{name}.cpp", code)
        flags = f"-O1 -fPIC -DANSWER={answer} -I{self.folder}"
        self.run_faster(f"g++ {name}.cpp {flags} -c -o {name}.main.o", str(self.folder))
        self.run_faster(f"g++ {LIBRARY.format(name)}", str(self.folder))
        return int(ctypes.CDLL(str(self.folder / f"{name}.so")).run())

    def wait_for_header(self) -> Path:
        """Wait until a header has been read in advance."""
        end = time.monotonic() + SECONDS
        place = _cache.folder()
        while place and time.monotonic() < end:
            found = [*place.glob("*.gch")]
            if found and not [*place.glob("*.fdl-new")]:
                return found[0]
            time.sleep(0.05)
        raise AssertionError("no header was read")


@pytest.fixture
def machine(program_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setattr(_headers, "HEADERS", ("torch/answer.h",))
    monkeypatch.setattr(_headers, "_programs", itertools.count(1))
    monkeypatch.setattr(_headers, "_unused", set())
    monkeypatch.setattr(_headers, "_wanted", {})
    return Machine(tmp_path)


def compiled(machine: Machine) -> list[list[str]]:
    return [words for words in machine.commands if "-c" in words]


def includes(words: list[str]) -> bool:
    return any(word.startswith("-include") for word in words)


def test_a_header_is_read_after_some_programs_and_used_from_then_on(machine: Machine) -> None:
    number = _headers.FEW + 1
    assert [machine.program(f"p{i}") for i in range(number)] == [42] * number
    assert not any(includes(words) for words in compiled(machine))
    header = machine.wait_for_header()
    os.utime(header, (1, 1))
    assert machine.program("after") == 42
    assert includes(compiled(machine)[-1])
    assert header.stat().st_mtime > 1  # among those that are used, which are kept longest
    assert len(compiled(machine)) == number + 1  # each at the first try


def test_a_header_that_has_changed_is_read_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_header(machine, monkeypatch)
    machine.write("torch/answer.h", "#pragma once\ninline int answer() { return 7; }")
    assert machine.program("second") == 7


def test_few_programs_read_no_header(machine: Machine) -> None:
    for i in range(_headers.FEW):
        machine.program(f"p{i}")
    assert not _headers._wanted
    assert not [*(_cache.folder() or Path()).glob("headers-*")]


def test_a_machine_with_programs_in_its_cache_reads_it_at_once(machine: Machine) -> None:
    place = _cache.folder()
    assert place is not None
    place.mkdir(parents=True, exist_ok=True)
    for i in range(_headers.FEW + 1):
        (place / f"{i}.fdl").touch()
    machine.program("first")
    machine.wait_for_header()
    machine.program("second")
    assert [includes(words) for words in compiled(machine)] == [False, True]


def with_header(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_headers, "_programs", itertools.count(100))
    machine.program("first")
    return machine.wait_for_header()


def test_other_flags_have_another_header(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_header(machine, monkeypatch)
    assert machine.program("other", answer=7) == 7
    assert not includes(compiled(machine)[-1])


@pytest.mark.parametrize("damage", [b"", b"gpch", b"\0" * 10_000])
def test_a_damaged_header_is_not_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    header = with_header(machine, monkeypatch)
    header.write_bytes(damage)
    assert machine.program("second") == 42
    assert machine.program("third") == 42


def test_options_that_are_refused_are_not_used_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_headers, "options_for", lambda words, cwd: ["--no-such-option"])
    assert [machine.program("first"), machine.program("second")] == [42, 42]
    tried = ["--no-such-option" in words for words in machine.commands]
    assert tried == [True, False, False, False, False]


def test_an_error_in_the_code_is_raised(machine: Machine) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        machine.program("wrong", "return question();")
    assert "question" in error.value.stderr.decode()
    assert not _headers._unused


@pytest.mark.parametrize(
    "hinder",
    [
        lambda patch: patch.setenv("FDL_CACHE", "0"),
        lambda patch: patch.setattr(_cache, "is_writable", lambda: False),
        lambda patch: patch.setattr(sys, "platform", "darwin"),
        lambda patch: patch.setattr(_headers, "_is_gcc", lambda compiler: False),
    ],
    ids=["no cache", "not writable", "macOS", "clang"],
)
def test_without_a_place_or_gcc_nothing_is_read(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, hinder: Callable[[object], None]
) -> None:
    monkeypatch.setattr(_headers, "_programs", itertools.count(100))
    hinder(monkeypatch)
    assert machine.program("first") == 42
    assert not _headers._wanted


def test_only_programs_for_this_process_are_linked_by_the_faster_linker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    own = ["g++", "a.main.o", "a.optimized.o", "-shared", "-o", "a.so"]
    package = ["g++", "a.wrapper.o", "a.weights.o", "-shared", "-o", "a.so"]
    assert _headers.options_for(own, "/") == ["-fuse-ld=gold"]
    assert _headers.options_for(package, "/") == []
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert _headers.options_for(own, "/") == []


@pytest.mark.parametrize(
    ("compiler", "is_gcc"),
    [
        ("g++", True),
        ("/usr/bin/g++-13", True),
        ("x86_64-linux-gnu-g++", True),
        ("clang++", False),
        ("clang++-19", False),
        ("icpx", False),
        ("ccache", False),
    ],
)
def test_gcc_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, compiler: str, is_gcc: bool
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert _headers._is_gcc.__wrapped__(compiler) == is_gcc
