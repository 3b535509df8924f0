"""Faster builds of Inductor's C++ code."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from typing import Any

LONG = 200  # lines of code, before they are written out in C++
UNOPTIMIZED = """
#if defined(__clang__)
__attribute__((optnone))
#else
__attribute__((optimize("O0")))
#endif
void inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*);
"""
KNOWS_ALL = 12  # release of g++ and of clang++ from which on they know the instruction sets below


def build_side_by_side() -> None:
    """Let Inductor compile the two files of a program, kernels and wrapper, at the same time."""
    from torch._inductor import codecache

    build = codecache._worker_compile_cpp

    @wraps(build)  # pickled by its name
    def build_parts_first(lock: str, builders: Sequence[Any]) -> None:
        *parts, _ = builders
        if len(parts) > 1:
            with ThreadPoolExecutor(len(parts)) as pool:
                locks = [f"{lock}.{i}" for i in range(len(parts))]
                list(pool.map(build, locks, [[part] for part in parts]))
        build(lock, builders)  # what is missing: the program, linked from its parts

    codecache._worker_compile_cpp = build_parts_first


def leave_long_wrappers_unoptimized() -> None:
    """Let the C++ compiler translate the code around many kernels as it is.

    Each of its lines runs once for each call of the program, and takes far less time than a
    kernel; the time to optimise it grows faster than its length.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    wrapper: Any = CppWrapperCpu
    generate = wrapper.generate

    @wraps(generate)
    def generate_unoptimized(self: Any, is_inference: bool) -> Any:
        if len(self.lines) > LONG and not V.graph.aot_mode:
            self.prefix.splice(UNOPTIMIZED)
        return generate(self, is_inference)

    wrapper.generate = generate_unoptimized


def skip_test_programs() -> None:
    """Assume that the C++ compiler knows the instruction sets that the processor has.

    To find out, torch compiles and loads a program for each: a second or two.
    """
    from torch._inductor.cpu_vec_isa import VecAMX, VecISA

    isa: Any = VecISA
    test = isa.check_build

    @wraps(test)
    def check_build(self: Any, code: str) -> bool:
        if code == isa._avx_code:  # any compiler that accepts torch's headers
            return True
        return (code != VecAMX._amx_fp16_code and _release() >= KNOWS_ALL) or test(self, code)

    isa.check_build = check_build


@cache
def _release() -> int:
    """Return the major release of the C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    version = subprocess.check_output([get_cpp_compiler(), "-dumpversion"], text=True)
    return int(version.split(".")[0])
