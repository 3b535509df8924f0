"""Patch Inductor's C++ code for loops, which allocates at each turn what no kernel uses."""

from __future__ import annotations

from functools import wraps
from typing import Any


def allocate_only_what_is_stored() -> None:
    """Tell the code of a program which values in the bodies of its loops stay within a kernel.

    The code of a body is written into that of the program, which looks up only its own list of
    values that need no memory. A draw of random numbers in a loop has dozens of them.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    wrapper: Any = CppWrapperCpu
    write = wrapper.codegen_subgraph

    @wraps(write)
    def codegen_subgraph(self: Any, subgraph: Any, *args: Any, **kwargs: Any) -> Any:
        result = write(self, subgraph, *args, **kwargs)
        V.graph.removed_buffers.update(subgraph.graph.removed_buffers)  # their names are unique
        return result

    wrapper.codegen_subgraph = codegen_subgraph
