"""Programs in the cache on disk."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from fdl._compiler import _cache
from fdl._compiler._block_pass import Regions
from fdl._compiler._dispatch import from_library
from fdl._compiler._library import library_of, load
from fdl._compiler._program import Program, program_of
from fdl._compiler._trace import Traced


class Stored(NamedTuple):
    """The place of a program in the cache."""

    name: str | None  # None: it cannot be kept there

    def lock(self) -> AbstractContextManager[object]:
        """Wait for another process that compiles the same program."""
        return _cache.lock(self.name) if self.name else nullcontext()

    def is_kept(self) -> bool:
        """Check that the program will be in the cache once it has been compiled."""
        return self.name is not None and _cache.is_writable()

    def find(self, traced: Traced) -> tuple[Program, int, Regions] | None:
        """Load the program, and return it with the number of its kernels, and its regions."""
        found = _cache.find(self.name) if self.name else None
        if found is None:
            return None
        path, about = found
        try:
            library = load(path)
        except OSError:  # it was linked with libraries that have changed
            return None
        aliases = {int(out): i for out, i in about["aliases"].items()}
        outputs = len(traced.results) - len(aliases)
        if library is None:
            return None
        run = from_library(library, outputs)
        regions = Regions(about["regions"], tuple(about["left_out"]))
        return program_of(run, traced, aliases), about["kernels"], regions

    def keep(self, program: Program, kernels: int, regions: Regions) -> None:
        """Write a program that has been compiled."""
        library = library_of(program.direct.run) if self.name and program.direct else None
        if self.name and program.direct and library:
            about = {
                "aliases": program.direct.aliases,
                "kernels": kernels,
                "regions": regions.regions,
                "left_out": regions.left_out,
            }
            _cache.keep(self.name, library.path, about)
