"""Lower a step for CUDA on a machine without a GPU, to count its kernels.

A step is traced for the CPU, its graph is moved to fake tensors on `cuda`, and Inductor writes the
program for a GPU with the properties of an H100, which is then neither compiled nor run. Inductor
asks the driver for little: the properties, and the target of Triton.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule

from fdl import tree
from fdl._compiler import _inductor
from fdl._compiler._decompose import decompose
from fdl._compiler._graph import nodes_of
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace

__all__ = ["count"]

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    type="cuda",
    major=9,
    minor=0,
    gcnArchName="",
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65_536,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
)
CALL = re.compile(r"(\w+)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.([\w.]+?)(?:\.default)?\(")


class Written(Exception):
    """Raised where Inductor would load the program; the argument is the code."""


def count(fn: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Count the kernels of `fn(*args)` on CUDA, and list what the program calls.

    Args:
        fn: the function, not jitted.
        args: its arguments, on the CPU.

    Returns:
        `triton`: kernels that Inductor wrote; `library`: calls of cuBLAS and cuDNN, each of one
        kernel or more; `calls`: their names in order.

    Raises:
        ImportError: Triton is not installed, as with the CPU build of torch.
        RuntimeError: Inductor cannot lower it here, or this machine has a GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: profile what it launches")
    leaves, spec = flatten((args, {}))
    traced = decompose(trace(fn, leaves, spec))
    calls = [next(filter(None, groups)) for groups in CALL.findall(lower(traced))]
    triton = sum(name.startswith("triton_") for name in calls)
    return {"triton": triton, "library": len(calls) - triton, "calls": calls}


def lower(traced: Any) -> str:
    """Return the code of the function that calls the kernels of a traced graph."""
    _inductor.import_inductor()
    from torch._inductor.compile_fx import compile_fx_inner

    with (
        _inductor.without_cache(),
        _inductor.prepared(traced.graph, traced.mode, on_cpu=False, cpp_wrapper=False) as graph,
        pretend_gpu(),
    ):
        move(graph, traced.mode)  # constants are folded by now, for which they are computed
        inputs = [node.meta["val"] for node in nodes_of(graph.graph, "placeholder")]
        try:
            compile_fx_inner(graph, inputs, cpp_wrapper=False, is_inference=True)
        except Exception as error:
            for cause in causes(error):
                if isinstance(cause, Written):
                    code: str = cause.args[0]
                    return code[code.rindex("def call(") :]
            raise RuntimeError(f"Inductor cannot lower it for CUDA here: {error}") from error
    raise AssertionError("it was loaded without a GPU")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def move(graph: GraphModule, mode: Any) -> None:
    """Change the device of all values and arguments of a graph, which it does not run."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            with mode:
                return torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cuda"
                )
        return torch.device("cuda", 0) if value == torch.device("cpu") else value

    for module in graph.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if "val" in node.meta:
                    node.meta["val"] = tree.map(moved, node.meta["val"])
                node.kwargs = {name: moved(value) for name, value in node.kwargs.items()}
            module.recompile()


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Let Inductor find an H100, and raise `Written` where it would load its program."""
    import torch._inductor.scheduler
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.graph import GraphLowering

    driver = import_module("triton.runtime.driver").driver
    new_target = import_module("triton.backends.compiler").GPUTarget

    def stop(lowering: Any) -> NoReturn:
        code, _ = lowering.codegen()
        raise Written(getattr(code, "value", code))

    def properties(device: Any = None) -> SimpleNamespace:
        return H100

    target = new_target("cuda", 10 * H100.major + H100.minor, H100.warp_size)
    stand_in = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    with ExitStack() as stack:
        for place in (torch.cuda, CudaInterface, CudaInterface.Worker):
            stack.enter_context(patch.object(place, "get_device_properties", properties))
            stack.enter_context(patch.object(place, "current_device", lambda: 0))
        major_minor = H100.major, H100.minor
        for name, value in (
            ("get_device_capability", lambda device=None: major_minor),
            ("device_count", lambda: 1),
        ):
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch._inductor.scheduler, "has_triton", lambda *_: True))
        stack.enter_context(patch.object(GraphLowering, "compile_to_module", stop))
        driver.set_active(stand_in)
        stack.callback(driver.set_active, None)  # found anew when it is asked for
        yield
