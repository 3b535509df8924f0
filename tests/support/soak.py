"""How much a test does: `make test-all` has it do more."""

import os
from typing import TypeVar

T = TypeVar("T")


def repeats(usual: T, many: T) -> T:
    """Choose how often, or for which cases, something is done."""
    return many if os.environ.get("FDL_SOAK") == "1" else usual
