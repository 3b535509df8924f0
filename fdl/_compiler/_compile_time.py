"""Patches of Inductor with which it compiles the same programs in less time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, wraps
from typing import Any

import torch

from fdl._compiler._headers import compile_with

LONG = 200  # lines of code, before they are written out in C++
UNOPTIMIZED = """
#if defined(__clang__)
__attribute__((optnone))
#else
__attribute__((optimize("O0")))
#endif
void inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*);
"""
KNOWS_ALL = 12  # release of g++ and of clang++ from which on they know the instruction sets


@cache
def compile_faster() -> None:
    """Apply the patches."""
    _change_commands()
    _build_side_by_side()
    _leave_long_wrappers_unoptimized()
    _skip_test_programs()
    _skip_hash_of_triton()
    _find_varying_strides()


def _change_commands() -> None:
    """Let the C++ compiler read headers in advance, write no warnings, and link faster."""
    from torch._inductor import cpp_builder

    module: Any = cpp_builder
    module.run_compile_cmd = compile_with(module.run_compile_cmd)


def _build_side_by_side() -> None:
    """Compile the two files of a program, its kernels and its wrapper, at the same time."""
    from torch._inductor import codecache

    module: Any = codecache
    build = module._worker_compile_cpp

    @wraps(build)  # pickled by its name
    def build_parts_first(lock: str, builders: Sequence[Any]) -> None:
        *parts, _ = builders
        if len(parts) > 1:
            locks = [f"{lock}.{i}" for i in range(len(parts))]
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(build, locks, [[part] for part in parts]))
        build(lock, builders)  # what is missing: the program, linked from its parts

    module._worker_compile_cpp = build_parts_first


def _leave_long_wrappers_unoptimized() -> None:
    """Translate the code around many kernels as it is.

    Each of its lines runs once in each call of the program, and takes far less time than a kernel.
    The time to optimize them grows faster than their number.
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


def _skip_test_programs() -> None:
    """Assume that the C++ compiler knows the instruction sets that the processor has.

    To find out, torch compiles and loads a program for each of them, which takes a second or two.
    """
    from torch._inductor.cpu_vec_isa import VecAMX, VecISA

    isa: Any = VecISA
    test = isa.check_build

    @wraps(test)
    def check_build(self: Any, code: str) -> bool:
        if code == isa._avx_code:  # any compiler that accepts torch's headers
            return True
        return (code != VecAMX._amx_fp16_code and _release() >= KNOWS_ALL) or bool(test(self, code))

    isa.check_build = check_build


@cache
def _release() -> int:
    """Return the major release of the C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    version = subprocess.check_output([get_cpp_compiler(), "-dumpversion"], text=True)
    return int(version.split(".")[0])


def _skip_hash_of_triton() -> None:
    """Name Triton by its release where it is not used, instead of reading its sources."""
    from torch._inductor import codecache

    if not torch.accelerator.is_available():
        codecache.triton_key = lambda: getattr(sys.modules.get("triton"), "__version__", None)


def _find_varying_strides() -> None:
    """Do not try to simplify the stride of an index if it varies.

    Sympy takes a tenth of a second for each index of an average pooling, and finds nothing.
    """
    from torch._inductor.codegen import cpp

    function = vars(cpp)["stride_at_vec_range"]
    module: Any = sys.modules[function.__module__]
    simplified = module.stride_at

    @lru_cache
    def stride_at(index: Any, var: Any) -> Any:
        if index.has(module.FloorDiv) and index.has(var):
            stride = index.xreplace({var: var + 1}) - index
            others = dict.fromkeys(stride.free_symbols - {var}, 0)
            if len({stride.subs({**others, var: i}) for i in range(4)}) > 1:
                return stride
        return simplified(index, var)

    module.stride_at = stride_at
