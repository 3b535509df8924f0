"""Kernels that fdl writes itself: their place in the programs that Inductor writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from fdl._compiler._short_vectors import narrowed


def realized(x: Any) -> Any:
    """Let an argument of a kernel be in memory, as numbers of its own dtype."""
    from torch._inductor.ir import ExternKernel

    x = ExternKernel.realize_input(x)
    buffer, _, _ = place(x)
    return x if buffer.get_dtype() == x.get_dtype() else ExternKernel.copy_input(x)


def place(x: Any) -> tuple[Any, Any, Sequence[Any]]:
    """Return the buffer that an argument of a kernel is in, where it starts, and its strides.

    In a loop, the start of a row is an expression.
    """
    from torch._inductor.ir import ReinterpretView, StorageBox, TensorBox

    while isinstance(x, TensorBox | StorageBox):
        x = x.data
    if not isinstance(x, ReinterpretView):
        return x, 0, x.get_stride()
    buffer, _, _ = place(x.data)
    return buffer, x.get_layout().offset, x.get_stride()  # counted from the start of the memory


def call_kernel(
    wrapper: Any, name: str, source: str, types: Sequence[str], arguments: Sequence[Any]
) -> None:
    """Write the call of a kernel, and the kernel itself unless the program has it.

    Args:
        wrapper: the code around the kernels.
        name: the beginning of the kernel's name.
        source: C++ of the function `KERNEL_NAME(PARAMETERS)`.
        types: types of its parameters, which are called a0, a1, …
        arguments: names of buffers, and numbers.
    """
    from torch._inductor import metrics
    from torch._inductor.virtualized import V

    kernel = wrapper.src_to_kernel.get(source)
    if kernel is None:
        kernel = f"cpp_{name}_{wrapper.next_kernel_suffix()}"
        wrapper.src_to_kernel[source] = kernel
        symbol = kernel if V.graph.cpp_wrapper else "kernel"
        parameters = ", ".join(f"{kind} a{i}" for i, kind in enumerate(types))
        text = narrowed(source).replace("KERNEL_NAME", symbol).replace("PARAMETERS", parameters)
        if not V.graph.cpp_wrapper:
            text = f"async_compile.cpp_pybinding({list(types)!r}, r'''{text}''')"
        definition = f'extern "C" void {symbol}({parameters});\n'
        wrapper.define_kernel(kernel, text, gpu=False, cpp_definition=definition)
        metrics.generated_kernel_count += 1
    wrapper.generate_kernel_call(kernel, arguments, triton=False, arg_types=list(types))


@cache
def kernel_that_returns() -> Any:
    """Return the class of the calls of kernels that compute a new, contiguous tensor."""
    from torch._inductor.ir import ExternKernel, FixedLayout
    from torch._inductor.virtualized import V

    class Returning(ExternKernel):
        """A call; a subclass writes it by `codegen`."""

        def __init__(self, size: Sequence[Any], dtype: torch.dtype, inputs: Sequence[Any]) -> None:
            layout = FixedLayout(device=torch.device("cpu"), dtype=dtype, size=list(size))
            super().__init__(None, layout, self.unwrap_storage([realized(x) for x in inputs]))
            self.name = V.graph.register_buffer(self)
            V.graph.register_operation(self)

        def should_allocate(self) -> bool:
            return True

    return Returning


@cache
def kernel_that_writes() -> Any:
    """Return the class of the calls of kernels that read some tensors and write to others."""
    from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
    from torch._inductor.ir import ExternKernel, MutationOutput, NoneLayout
    from torch._inductor.virtualized import V

    def in_memory(x: Any) -> Any:
        x = realized(ExternKernel.require_contiguous(x))
        _, start, _ = place(x)
        return x if not getattr(start, "free_symbols", ()) else ExternKernel.copy_input(x)

    class Writing(ExternKernel):
        """A call; a subclass has the `kind` of the kernel, and its source in `text`."""

        kind = ""

        def __init__(self, reads: Sequence[Any], writes: Sequence[Any]) -> None:
            own = {id(x): in_memory(x) for x in [*reads, *writes]}
            self.reads = [place(own[id(x)]) for x in reads]
            self.writes = [place(own[id(x)]) for x in writes]
            places = [*self.reads, *self.writes]
            self.buffers = {buffer.get_name(): buffer for buffer, _, _ in places}
            device = torch.device("cpu")
            super().__init__(None, NoneLayout(device=device), list(self.buffers.values()))
            self.name = V.graph.register_buffer(self)
            # What reads the old values, and is computed only where it is used, is computed now.
            self.mutation_outputs = [
                MutationOutput(NoneLayout(device=device), buffer, self)
                for buffer, _, _ in self.writes
            ]
            V.graph.register_operation(self)

        def text(self, reads: Sequence[str], writes: Sequence[str]) -> str:
            """Return the source, for the addresses of what is read and written."""
            raise NotImplementedError

        def get_outputs(self) -> list[Any]:
            return [self, *self.mutation_outputs]

        def should_allocate(self) -> bool:
            return False

        def has_side_effects(self) -> bool:
            return True

        def codegen(self, wrapper: Any) -> None:
            types = [f"{DTYPE_TO_CPP[buffer.get_dtype()]}*" for buffer in self.buffers.values()]
            names = [buffer.codegen_reference() for buffer in self.buffers.values()]
            variables = {name: f"a{i}" for i, name in enumerate(self.buffers)}
            reads, writes = (
                [f"{variables[buffer.get_name()]} + {start}" for buffer, start, _ in places]
                for places in (self.reads, self.writes)
            )
            call_kernel(wrapper, self.kind, self.text(reads, writes), types, names)

    return Writing
