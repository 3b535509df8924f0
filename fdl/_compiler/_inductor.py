"""Compile a graph with Inductor, torch's compiler; only `_package.py` calls it as well."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from fdl._compiler._callbacks import take_error
from fdl._compiler._common_subexpressions import keep_results_apart
from fdl._compiler._graph import NAMESPACES, copy_graph, nodes_of, results_of
from fdl._compiler._interrupt import watch_signals
from fdl._compiler._lowerings import register
from fdl._compiler._passes import rewrite
from fdl._compiler._program_errors import python_error
from fdl._compiler._vector_functions import accurate_functions
from fdl._torch_compat import RELEASE

Compiled = Callable[[list[Tensor]], list[Tensor]]
DAMAGED = re.compile(r"(/\S+\.so): (?:file too short|invalid ELF header|cannot read file data)")
HAS_CPP_WRAPPER = RELEASE >= (2, 12)  # `scan` fails with it in torch 2.11


def lower(
    graph: GraphModule, mode: FakeTensorMode, inputs: Sequence[Tensor], cpp_wrapper: bool = True
) -> Compiled:
    """Compile a graph of primitives for fake `inputs`; its last operations may write to them.

    Args:
        graph: the graph, which is not changed.
        mode: the mode of its fake tensors.
        inputs: its arguments.
        cpp_wrapper: call the kernels from C++ where torch can, instead of from Python.
    """
    import_inductor()
    try:
        return _lower(graph, mode, inputs, cpp_wrapper)
    except Exception as error:
        if not _removed_damaged(error):
            raise
        return _lower(graph, mode, inputs, cpp_wrapper)


def import_inductor() -> None:
    """Import Inductor, with the lowerings of fdl."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # inside torch
        import torch._inductor.compile_fx  # noqa: F401

    register()
    silence_log()


def _removed_damaged(error: Exception) -> bool:
    """Remove a library that cannot be loaded from torch's cache.

    A compiler that was killed may leave one, which torch would never compile again.
    """
    from torch._inductor.codecache import CppWrapperCodeCache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    found = DAMAGED.search(str(error))
    if found is None or not Path(found[1]).is_relative_to(cache_dir()):
        return False
    Path(found[1]).unlink(missing_ok=True)
    CppWrapperCodeCache.cache_clear()
    return True


def _lower(
    graph: GraphModule, mode: FakeTensorMode, inputs: Sequence[Tensor], cpp_wrapper: bool
) -> Compiled:
    on_cpu = not any(leaf.is_cuda for leaf in inputs)
    with prepared(graph, mode, on_cpu, cpp_wrapper and HAS_CPP_WRAPPER) as copy:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner

        compiled = compile_fx_inner(
            copy, list(inputs), cpp_wrapper=config.cpp_wrapper, is_inference=True
        )
    return _with_python_errors(cast(Compiled, compiled))


@contextmanager
def prepared(
    graph: GraphModule,
    mode: FakeTensorMode,
    on_cpu: bool,
    cpp_wrapper: bool,
    in_python: bool = True,
) -> Iterator[GraphModule]:
    """Rewrite a copy of a graph, and set the options of Inductor while it compiles the copy.

    Args:
        graph: the graph, which is not changed.
        mode: the mode of its fake tensors.
        on_cpu: it is for the CPU.
        cpp_wrapper: kernels are called from C++.
        in_python: the program runs in a Python process, which handles signals.
    """
    from torch._inductor import config
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    graph = copy_graph(graph)  # the passes change it
    with (
        config.patch(_options(on_cpu, cpp_wrapper)),
        config.patch({"size_asserts": config.size_asserts and not _is_known(graph)}),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        accurate_functions(),
        warnings.catch_warnings(),
    ):
        # Float32 products are computed in float32 unless the user asks for less.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for comp")
        rewrite(graph, on_cpu)
        if on_cpu and in_python:
            watch_signals(graph)
        _keep_strides(graph)
        joint_graph_passes(graph)
        keep_results_apart(graph.graph)
        graph.recompile()
        yield graph


def without_cache() -> AbstractContextManager[None]:
    """Turn off Inductor's own cache of graphs: its keys take half a second."""
    from torch._inductor import config

    return config.patch({"fx_graph_cache": False})


@cache
def silence_log() -> None:
    """Drop messages in torch's log about which a user can do nothing."""
    dropped = ("No CUDA runtime is found", "is missing a c-shim implementation")

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in dropped)

    for name in ("torch.utils.cpp_extension", "torch._inductor.ir"):
        logging.getLogger(name).addFilter(keep)


def _with_python_errors(compiled: Compiled) -> Compiled:
    def run(inputs: list[Tensor]) -> list[Tensor]:
        try:
            return compiled(inputs)
        except BaseException as error:
            raise_python_error(error)

    cast(Any, run).compiled = compiled
    return run


def raise_python_error(error: BaseException) -> NoReturn:
    """Raise the error of a callback, or of eager torch; from C++ all are RuntimeErrors."""
    raised = take_error()
    if raised is not None:
        raise raised from None
    if type(error) is RuntimeError:
        raise python_error(error) from None
    raise error


def _keep_strides(graph: GraphModule) -> None:
    """Keep the strides of the results as traced: the next step of a loop expects them.

    Otherwise convolutions may return channels-last memory.
    """
    (output,) = nodes_of(graph.graph, "output")
    strides = [node.meta["val"].stride() for node in results_of(graph.graph)]
    output.meta["original_output_strides"] = strides
    output.meta["user_visible_output_idxs"] = list(range(len(strides)))


def _options(on_cpu: bool, cpp_wrapper: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        # Round values of 16 bits even if a kernel continues with them in 32 bits.
        "emulate_precision_casts": True,
        # Inductor recomputes a shared intermediate result in each of its users up to this number of
        # operations. Twenty rounds of Threefry share so much that with the default, 30, a draw
        # takes ten times longer to compile, and the program is not faster.
        "realize_opcount_threshold": 8,
        # Its passes remove copies, also both of two copies of one value that a branch returns.
        "post_grad_custom_post_pass": _results_apart(),
        # Without this, programs with a loop are not cached on disk. Programs that other sources
        # of fdl have lowered are not loaded from there.
        "unsafe_marked_cacheable_functions": {
            "torch.ops.higher_order.scan": torch.__version__,
            "fdl": sources(),
        },
    }
    if on_cpu:
        options["cpp_cache_precompile_headers"] = False  # `_headers.py` does so in the background
        # Convolutions of few channels are faster in their own layout than in channels-last.
        options["layout_optimization"] = False
    if on_cpu and cpp_wrapper:
        # Halves the cost of a step of a small model.
        options["cpp_wrapper"] = True
        # Compile kernels and wrapper as two files, the latter unoptimised: half the time.
        options["cpp_wrapper_build_separate"] = True
    return options


def _is_known(module: GraphModule) -> bool:
    """Check that all operations are torch's or fdl's, whose shapes and strides are as declared.

    Those of the arguments are in the signature. The checks take a third of the compile time.
    """
    targets = [node.target for node in nodes_of(module.graph, "call_function")]
    namespaces = {t.namespace for t in targets if isinstance(t, OpOverload)}
    children = [child for child in module.children() if isinstance(child, GraphModule)]
    return namespaces <= NAMESPACES and all(map(_is_known, children))


@cache
def _results_apart() -> Any:
    """Return `keep_results_apart` as a pass of Inductor, for branches and bodies of loops too."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class ResultsApart(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            keep_results_apart(graph)

        def uuid(self) -> str:
            return sources()

    return ResultsApart()


def kernels_written() -> int:
    """Return how many kernels Inductor has generated, or loaded from its cache, in this process."""
    metrics = sys.modules.get("torch._inductor.metrics")
    # Another thread may be importing it.
    return getattr(metrics, "generated_kernel_count", 0)


@cache
def missing_compiler() -> str:
    """Return a message if the C++ compiler that Inductor needs on the CPU is missing, else ''."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # its type depends on the platform and the release of torch
        return (
            "no C++ compiler was found, which functions of CPU tensors need; install g++ or "
            f"clang++, or set CXX ({error})"
        )
    return ""


@cache
def sources() -> str:
    """Return a hash of the sources of this package."""
    folder = Path(__file__).parent
    files = sorted([*folder.glob("*.py"), *folder.glob("blocks/*.h")])
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
