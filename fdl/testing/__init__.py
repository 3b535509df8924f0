"""The proof kit: checks of ports, derivatives and pure functions, and comparisons of trees.

Each check raises an AssertionError that names paths, worst values, and what explains them. All of
them compare in float64, where a fault is larger than rounding.
"""

from __future__ import annotations

from fdl.testing._grads import check_grads
from fdl.testing._laws import check_laws
from fdl.testing._module import check_equals_module
from fdl.testing._programs import Programs, count_programs
from fdl.testing._trees import assert_trees_close

__all__ = [
    "Programs",
    "assert_trees_close",
    "check_equals_module",
    "check_grads",
    "check_laws",
    "count_programs",
]
