"""`jit`, `scan`, `map` and other control flow; README.md shows the path of a call."""

from __future__ import annotations

from fdl._compiler._associative_scan import associative_scan
from fdl._compiler._branches import cond, switch
from fdl._compiler._export import export
from fdl._compiler._jit import Jitted, Report, disable_jit, jit
from fdl._compiler._load_program import load_program
from fdl._compiler._map import map
from fdl._compiler._scan import scan
from fdl._compiler._while import fori_loop, while_loop

__all__ = [
    "Jitted",
    "Report",
    "associative_scan",
    "cond",
    "disable_jit",
    "export",
    "fori_loop",
    "jit",
    "load_program",
    "map",
    "scan",
    "switch",
    "while_loop",
]
