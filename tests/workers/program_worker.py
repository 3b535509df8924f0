"""Run a program from a file where there is no compiler and no code of models.

`python program_worker.py PROGRAM ARGUMENTS RESULTS`: four calls, each with the state of the last.
"""

import importlib.abc
import sys
from typing import Any


class Absent(importlib.abc.MetaPathFinder):
    """Lets the import of a package fail."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "models" or name.startswith(("torch._inductor", "torch._dynamo")):
            raise ImportError(f"{name} must not be needed")


if __name__ == "__main__":
    program_file, arguments, results = sys.argv[1:]
    sys.meta_path.insert(0, Absent())

    import fdl

    program = fdl.load_program(program_file)
    state, *rest = fdl.io.load(arguments)
    outputs = []
    for _ in range(4):
        state, output = program(state, *rest)
        outputs.append(output)
    fdl.io.save(results, (state, outputs))
