"""Inductor lowerings of the operations that fdl adds to torch."""

from __future__ import annotations

from functools import cache, partial, wraps
from typing import Any, cast

import torch
from torch import Tensor

from fdl._compiler._blocks import register_blocks
from fdl._compiler._callbacks import CALLBACK
from fdl._compiler._compile_time import compile_faster
from fdl._compiler._divisors import BY_ZERO, NONZERO
from fdl._compiler._draws import register_draws
from fdl._compiler._graph import COND, WHILE
from fdl._compiler._indices import IN_RANGE, range_error
from fdl._compiler._interrupt import CHECK_SIGNALS, signal_check
from fdl._compiler._leafwise import register_leafwise
from fdl._compiler._loop_code import allocate_only_what_is_stored, makes_a_turn
from fdl._compiler._products import NARROW, has_short_vectors, register_product
from fdl._compiler._program_errors import CHECK as FACTORIZED
from fdl._compiler._program_errors import check_code
from fdl._compiler._rows import register_rows
from fdl._compiler._short_vectors import use_short_vectors
from fdl._compiler._small_buffers import keep_small_buffers_on_the_stack
from fdl._compiler._threads import start_fewer_threads

aten = torch.ops.aten


@cache
def has_onednn() -> bool:
    """Check that torch was built with oneDNN, and with the product that `fdl::linear` calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_for_onednn(rows: int, terms: int, columns: int) -> bool:
    """Check for a product in float32 that oneDNN computes faster than MKL.

    With AVX2 alone these are only the narrow ones of long rows, on which MKL is slow.
    """
    narrow = columns <= NARROW and rows * terms >= 1 << 16
    return has_onednn() and (narrow or not has_short_vectors())


@torch.library.custom_op("fdl::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + b by oneDNN, for any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@cache
def register() -> None:
    """Register the lowerings with Inductor, and import it."""
    from torch._inductor.dependencies import ReadWrites, StarDep
    from torch._inductor.ir import (
        BaseView,
        ExternKernel,
        FallbackKernel,
        FixedLayout,
        NoneLayout,
        Pointwise,
        TensorBox,
        WhileLoop,
    )
    from torch._inductor.lowering import lowerings, register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary
    from torch._inductor.virtualized import V, ops

    @register_lowering(torch.ops.fdl.linear.default, type_promotion_kind=None)
    def lower_linear(x: TensorBox, weight: TensorBox, bias: TensorBox | None) -> TensorBox:
        size = [x.get_size()[0], weight.get_size()[0]]
        inputs = [LinearUnary.realize_input(z) for z in (x, weight, bias) if z is not None]
        constants: list[Any] = ["none", [-1], ""]
        call = LinearUnary(
            layout=FixedLayout(device=x.get_device_or_error(), dtype=x.get_dtype(), size=size),
            inputs=inputs,
            constant_args=constants if bias is not None else [None, *constants],
        )
        return TensorBox.create(call)

    compile_faster()
    start_fewer_threads()
    use_short_vectors()
    register_leafwise()
    register_blocks()
    register_product()
    register_draws()
    register_rows()
    _declare_loop_outputs_once()
    _call_kernels_of_torch()
    allocate_only_what_is_stored()
    keep_small_buffers_on_the_stack()
    loop = lowerings[WHILE]

    @register_lowering(WHILE, type_promotion_kind=None)
    def lower_while_loop(condition: Any, body: Any, carry: Any, constants: Any, *rest: Any) -> Any:
        # torch frees a constant that is a view at each turn: the process would crash.
        copies = (
            ExternKernel.copy_input(x) if isinstance(getattr(x, "data", None), BaseView) else x
            for x in constants
        )
        results = loop(condition, body, carry, type(constants)(copies), *rest)
        lowered = next(op for op in reversed(V.graph.operations) if isinstance(op, WhileLoop))
        carried = [x.get_name() for x in cast(Any, lowered).carried_inputs]
        names = [x.get_name() for x in results]
        if makes_a_turn(condition.graph_module.graph, V.graph.current_node):
            # The loop writes them in place. Inductor would reuse their memory for other values
            # while they are still read.
            V.graph.never_reuse_buffers.update({*carried} & {*names})
            return results
        # Otherwise a result may be in the memory of what the loop starts from.
        V.graph.never_reuse_buffers.update((*carried, *names))
        return type(results)(map(ExternKernel.copy_input, results))

    class Statement(ExternKernel):
        """Writes code between kernels, and has no result."""

        def __init__(self, device: torch.device, inputs: list[Any]) -> None:
            super().__init__(None, NoneLayout(device=device), inputs)
            self.name = V.graph.register_buffer(self)
            V.graph.register_operation(self)

        def should_allocate(self) -> bool:
            return False

        def has_side_effects(self) -> bool:
            return True

    class RaiseIf(Statement):
        """Raises between kernels: an error inside a kernel would abort a multithreaded process."""

        def __init__(self, flag: TensorBox, message: str) -> None:
            flag.realize()
            super().__init__(flag.get_device_or_error(), list(self.unwrap_storage([flag])))
            self.message = message

        def codegen(self, wrapper: Any) -> None:
            flag = cast(Any, self.inputs[0]).codegen_reference()
            if V.graph.cpp_wrapper:
                wrapper.writeline(
                    f"if (*static_cast<bool*>({flag}.data_ptr())) "
                    f'throw std::runtime_error("{self.message}");'
                )
            else:
                wrapper.writeline(f"if {flag}.item():")
                wrapper.writeline(f'    raise RuntimeError("{self.message}")')

    class CheckFactorization(Statement):
        """Raises if a matrix could not be factorized."""

        def __init__(self, info: TensorBox, function: str, one: bool) -> None:
            dense = cast(TensorBox, ExternKernel.require_contiguous(info))
            dense.realize()
            super().__init__(info.get_device_or_error(), list(self.unwrap_storage([dense])))
            self.count = V.graph.sizevars.guard_int(info.get_numel())
            self.function, self.one = function, one

        def codegen(self, wrapper: Any) -> None:
            info = cast(Any, self.inputs[0]).codegen_reference()
            if V.graph.cpp_wrapper:
                wrapper.writeline(check_code(info, self.count, self.function, self.one))
            else:
                call = f"({info}, {self.function!r}, is_matrix={self.one})"
                wrapper.writeline(f"torch.ops.aten._linalg_check_errors.default{call}")

    class CheckSignals(Statement):
        """Writes the code of `fdl::check_signals`."""

        def __init__(self, intact: bool) -> None:
            super().__init__(torch.device("cpu"), [])
            self.intact = intact

        def codegen(self, wrapper: Any) -> None:
            if V.graph.cpp_wrapper:  # a wrapper in Python sees signals by itself
                wrapper.writeline(signal_check(self.intact))

    class Callback(FallbackKernel):
        """Calls `fdl::callback` in Python, after the callbacks and loops before it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            ordered = (Callback, WhileLoop)
            self.before = [op.get_name() for op in V.graph.operations if isinstance(op, ordered)]
            super().__init__(*args, **kwargs)

        def has_side_effects(self) -> bool:
            return True

        def get_read_writes(self) -> ReadWrites:
            accesses = super().get_read_writes()
            accesses.reads.update(StarDep(name) for name in self.before)
            return accesses

    @register_lowering(CALLBACK, type_promotion_kind=None)
    def lower_callback(values: list[TensorBox], number: int, batches: int) -> None:
        Callback.create(cast(Any, CALLBACK), values, number, batches)

    branch = lowerings[COND]

    @register_lowering(COND, type_promotion_kind=None)
    def lower_cond(*args: Any) -> Any:
        # A branch may hold callbacks: it runs after those before it.
        before = [op.get_name() for op in V.graph.operations if isinstance(op, Callback)]
        count = len(V.graph.operations)
        results = branch(*args)
        for op in V.graph.operations[count:]:
            V.graph.additional_buffer_deps[op.get_operation_name()].update(before)
        return results

    @register_lowering(CHECK_SIGNALS, type_promotion_kind=None)
    def lower_check_signals(intact: bool) -> None:
        CheckSignals(intact)

    def replacing(x: TensorBox, replacement: Any) -> TensorBox:
        """Replace elements before they are used, even if that is before the check."""
        load = x.make_loader()
        result = Pointwise.create(
            device=x.get_device_or_error(),
            dtype=x.get_dtype(),
            inner_fn=lambda at: replacement(load(at)),
            ranges=list(x.get_size()),
        )
        result.realize()
        return result

    @register_lowering(NONZERO, type_promotion_kind=None)
    def lower_nonzero(divisor: TensorBox) -> TensorBox:
        RaiseIf(lowerings[aten.any](lowerings[aten.eq](divisor, 0)), BY_ZERO)
        dtype = divisor.get_dtype()

        def with_one_for_zero(y: Any) -> Any:
            return ops.where(ops.eq(y, ops.constant(0, dtype)), ops.constant(1, dtype), y)

        return replacing(divisor, with_one_for_zero)

    @register_lowering(FACTORIZED, type_promotion_kind=None)
    def lower_factorized(info: TensorBox, function: str, *, is_matrix: bool) -> None:
        if info.get_device_or_error().type == "cpu":
            CheckFactorization(info, function, is_matrix)
        else:
            FallbackKernel.create(cast(Any, FACTORIZED), info, function, is_matrix=is_matrix)

    @register_lowering(IN_RANGE, type_promotion_kind=None)
    def lower_in_range(index: TensorBox, low: int, high: int) -> TensorBox:
        below, above = lowerings[aten.lt](index, low), lowerings[aten.ge](index, high)
        outside = lowerings[aten.logical_or](below, above)
        RaiseIf(lowerings[aten.any](outside), range_error(low, high))
        dtype = index.get_dtype()

        def clamped(i: Any) -> Any:  # Inductor adds no check
            at_least = ops.maximum(i, ops.constant(low, dtype))
            return ops.minimum(at_least, ops.constant(high - 1, dtype))

        return replacing(index, clamped)


def _declare_loop_outputs_once() -> None:
    """Tell Inductor's C++ wrapper that the outputs of a loop exist.

    It declares them before the loop; when a later kernel reuses the memory of one that is not read,
    it would declare that one a second time, which does not compile.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    wrapper: Any = CppWrapperCpu
    names = getattr(wrapper, "_get_while_loop_carried_output_names", None)
    if names is None:  # torch 2.11, where loops have no C++ wrapper
        return
    write = wrapper.codegen_while_loop

    @wraps(write)
    def codegen_while_loop(self: Any, while_loop: Any, *args: Any, **kwargs: Any) -> Any:
        self.allocated.update(names(while_loop))
        return write(self, while_loop, *args, **kwargs)

    wrapper.codegen_while_loop = codegen_while_loop


def _call_kernels_of_torch() -> None:
    """Let a program call torch's kernel of an operation that has a decomposition too.

    Inductor does so, but fails where the environment has `CI`, as a check of torch's own tests.
    """
    from torch._inductor import graph

    module: Any = graph
    module.make_fallback = partial(module.make_fallback, warn=False)
