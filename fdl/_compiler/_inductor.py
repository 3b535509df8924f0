"""From a graph to a program: the one place that knows Inductor, torch's compiler."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from fdl._compiler._graph import nodes_of, results_of
from fdl._compiler._indices import OUT_OF_RANGE
from fdl._compiler._lowerings import register
from fdl._compiler._passes import rewrite

Compiled = Callable[[list[Tensor]], list[Tensor]]

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


def lower(graph: GraphModule, mode: FakeTensorMode, inputs: Sequence[Tensor]) -> Compiled:
    """Compile a graph of primitives for fake `inputs`; its last nodes may write to its inputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch about itself
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.fx_passes.joint_graph import joint_graph_passes
        from torch._inductor.virtualized import V

    register()
    on_cpu = not any(leaf.is_cuda for leaf in inputs)
    rewrite(graph, on_cpu)
    with (
        config.patch(_options(on_cpu)),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        warnings.catch_warnings(),
    ):
        # Float32 products are float32 unless somebody asks for less.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        _keep_strides(graph)
        joint_graph_passes(graph)
        compiled = compile_fx_inner(
            graph, list(inputs), cpp_wrapper=config.cpp_wrapper, is_inference=True
        )
    return _with_errors_of_torch(cast(Compiled, compiled))


def _with_errors_of_torch(compiled: Compiled) -> Compiled:
    """Raise what torch raises for an index that is out of range; C++ knows one kind of error."""

    def run(inputs: list[Tensor]) -> list[Tensor]:
        try:
            return compiled(inputs)
        except RuntimeError as error:
            if OUT_OF_RANGE in str(error):
                raise IndexError(str(error)) from None
            raise

    return run


def _keep_strides(graph: GraphModule) -> None:
    """Have results laid out as they were traced, since the next step of a loop takes them.

    Otherwise those of convolutions, or their weights, may come with channels last.
    """
    (output,) = nodes_of(graph.graph, "output")
    strides = [node.meta["val"].stride() for node in results_of(graph.graph)]
    output.meta["original_output_strides"] = strides
    output.meta["user_visible_output_idxs"] = list(range(len(strides)))


def _options(on_cpu: bool) -> dict[str, Any]:
    from torch._inductor import config

    options: dict[str, Any] = {
        # What is rounded to 16 bits is rounded, also where a kernel goes on with it in 32.
        "emulate_precision_casts": True,
        # Inductor copies a shared intermediate result into each of its users until it counts so
        # many operations. Twenty rounds of Threefry share so much that with the default, 30, a
        # draw takes ten times longer to compile; the program is as fast.
        "realize_opcount_threshold": 8,
        # Without this a program with a loop is not looked up in the cache on disk.
        "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.scan": torch.__version__},
    }
    if on_cpu:
        if config.cpp.vec_isa_ok is None:
            # Any compiler that reads torch's headers knows the instructions that torch itself looks
            # for; a trial of each with those headers takes two seconds.
            options["cpp.vec_isa_ok"] = True
        # Convolutions of a few channels are faster in the layout they have than with channels last.
        options["layout_optimization"] = False
    if on_cpu and RELEASE >= (2, 12):
        # Halves the cost of a step of a small model; with torch 2.11 `scan` fails in it.
        options["cpp_wrapper"] = True
        # Kernels, and the code around them, which needs less care, as two files: half the time.
        options["cpp_wrapper_build_separate"] = True
    return options


def kernels_written() -> int:
    """Count the kernels that Inductor wrote, or found in its cache, in this process."""
    metrics = sys.modules.get("torch._inductor.metrics")
    return metrics.generated_kernel_count if metrics else 0


@cache
def missing_compiler() -> str:
    """Look for the C++ compiler that Inductor needs on the CPU; say what to do if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # what it raises depends on the platform and the release of torch
        return (
            "no C++ compiler was found, and functions of CPU tensors need one; install g++ or "
            f"clang++, or set CXX ({error})"
        )
    return ""
