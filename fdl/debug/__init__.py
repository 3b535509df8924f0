"""See into a program that runs: print values, call Python functions, find the first NaN."""

from __future__ import annotations

from fdl.debug._callback import callback, print
from fdl.debug._nans import nans

__all__ = ["callback", "nans", "print"]
