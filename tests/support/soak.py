"""How often a test repeats what it does: `make test-all` repeats it many times."""

import os


def repeats(usual: int, many: int) -> int:
    return many if os.environ.get("FDL_SOAK") == "1" else usual
