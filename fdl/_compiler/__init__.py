"""`jit`, `scan` and `map`; README.md shows the path of a call."""

from __future__ import annotations

from fdl._compiler._jit import Jitted, Report, disable_jit, jit
from fdl._compiler._map import map
from fdl._compiler._scan import scan

__all__ = [
    "Jitted",
    "Report",
    "disable_jit",
    "jit",
    "map",
    "scan",
]
