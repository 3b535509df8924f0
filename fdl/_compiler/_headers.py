"""Read torch's headers once on a machine, instead of for each program.

For a small program g++ takes four seconds, three of them to read the headers of its kernels. Read
in advance they fill 150 MB of the cache, and take g++ ten seconds. A machine that has compiled a
few programs will compile more: then g++ does that in the background, with the lowest priority.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, wraps
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fdl._compiler import _cache

# They come first in the code of kernels, and in that of the program around them.
HEADERS = ("torch/csrc/inductor/cpp_prefix.h", "torch/csrc/inductor/cpp_wrapper/cpu.h")
GCC = re.compile(r"(^|-)g\+\+(-|$)")  # with a target before and a release behind it
LINKS = ("-l", "-L")  # options for the linker
FEW = 4  # programs of a process or a machine, for which it does not pay

_programs = count(1)  # of this process
_wanted: dict[Path, tuple[str, list[str]]] = {}  # headers that a program includes, and commands
_unused: set[str] = set()  # options that the compiler has refused


def compile_with(run: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """Change the function of Inductor that runs the commands of the C++ compiler."""

    @wraps(run)
    def run_faster(command: str, cwd: str) -> None:
        words = shlex.split(command)
        options = [option for option in options_for(words, cwd) if option not in _unused]
        try:
            run(shlex.join([words[0], *options, *words[1:]]) if options else command, cwd)
        except Exception:  # of a type in Inductor
            if not options:
                raise
            run(command, cwd)  # raises if it was not for the options
            _refuse(options)
        if "-shared" in words:  # the program is complete
            _read_wanted(next(_programs))

    return run_faster


def options_for(words: Sequence[str], cwd: str) -> list[str]:
    """Return options with which a command of g++ does the same in less time."""
    if sys.platform != "linux" or not _is_gcc(words[0]):
        return []
    sources = [Path(cwd, word) for word in words if word.endswith(".cpp")]
    if "-shared" in words and not sources:
        # The other linker reads all symbols of torch's libraries, which takes half a second.
        has_gold = any(word.endswith(".main.o") for word in words) and shutil.which("ld.gold")
        return ["-fuse-ld=gold"] if has_gold else []
    text = sources[0].read_text() if len(sources) == 1 and "-o" in words else ""
    header = next((header for header in HEADERS if f"#include <{header}>" in text), None)
    if header is None:
        return []
    precompiled = _precompiled(header, words)
    # Without -w, it writes thousands of warnings about these headers.
    return [f"-include{precompiled}", "-w"] if precompiled else ["-w"]


def _precompiled(header: str, words: Sequence[str]) -> Path | None:
    """Return a file to include, next to which is what g++ has read of a header, if it is there."""
    place = _cache.folder()
    if place is None or not _cache.is_writable():  # others might have put a file there
        return None
    flags = _flags(words)
    path = place / f"headers-{_key(header, words[0], flags)}.h"
    try:
        os.utime(_read_in_advance(path))  # it is used now
    except OSError:
        _wanted[path] = header, [words[0], *flags]
        return None
    return path


def _flags(words: Sequence[str]) -> list[str]:
    """Return the options of a command with which it reads a file."""
    at = words.index("-o")
    flags = [*words[1:at], *words[at + 2 :]]
    return [
        word
        for word in flags
        if word not in ("-c", "-shared") and not word.endswith(".cpp") and word[:2] not in LINKS
    ]


@cache
def _identity(compiler: str) -> tuple[Any, ...]:
    path = Path(shutil.which(compiler) or compiler).resolve()
    return str(path), path.stat().st_mtime_ns, torch.__version__, torch.version.git_version


def _key(header: str, compiler: str, flags: Sequence[str]) -> str:
    known = header, tuple(flags), _identity(compiler), torch.__file__
    return hashlib.sha256(repr(known).encode()).hexdigest()


@cache
def _is_gcc(compiler: str) -> bool:
    """Check that a compiler is g++; on other systems clang++ may have its name."""
    return bool(GCC.search(Path(compiler).name)) and shutil.which(compiler) is not None


def _read_in_advance(path: Path) -> Path:
    return path.with_name(f"{path.name}{_cache.HEADER}")


def _read_wanted(programs: int) -> None:
    """Let g++ read the headers that the last of some programs has included, if that pays."""
    pays = programs > FEW or (_wanted and _cache.count_entries(FEW + 1) > FEW)
    for path in tuple(_wanted):
        wanted = _wanted.pop(path, None)  # unless another thread has taken it
        if pays and wanted:
            _read(path, *wanted)


def _read(path: Path, header: str, command: Sequence[str]) -> None:
    """Let g++ read a header in a process of its own, unless another one is at it."""
    unfinished = path.with_suffix(_cache.UNFINISHED)
    _cache.remove_abandoned(unfinished)
    with suppress(OSError):
        unfinished.touch(exist_ok=False)
        path.write_text(f"#include <{header}>\n")
        work = [*command, "-w", "-x", "c++-header", str(path), "-o", str(unfinished)]
        # In the background of a shell that ends at once: nobody has to wait for it.
        script = f"{{ {_cache.script_to_write(work)}; }} >/dev/null 2>&1 &"
        subprocess.run(
            ["nice", "-n", "19", "sh", "-c", script, str(unfinished), str(_read_in_advance(path))],
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is not for it
            check=False,
        )


def _refuse(options: Sequence[str]) -> None:
    """Do without the option that made a command fail, and without the file that it names."""
    _unused.add(options[0])
    if options[0].startswith("-include"):
        with suppress(OSError):
            _read_in_advance(Path(options[0].removeprefix("-include"))).unlink()
