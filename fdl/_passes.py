"""Rewritings of a graph that make its program faster on the CPU, equal to rounding.

torch hands matrix products to MKL, which on processors of other makers falls back to older
instructions and is slow for narrow matrices everywhere. oneDNN, which torch uses for convolutions,
writes its kernels for the processor at hand: for the products of a classifier of ten classes it
took a half to a third of the time. And the tiniest products are not worth a call: as a sum of
products Inductor merges them with what surrounds them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["rewrite_for_cpu"]

aten = torch.ops.aten

TINY = 4096  # multiplications up to which a product is written out


def rewrite_for_cpu(module: GraphModule) -> None:
    """Replace matrix products and scatters, in a graph and in the bodies of its loops."""
    for child in module.children():
        rewrite_for_cpu(cast(GraphModule, child))
    for node in list(module.graph.nodes):
        if node.target is aten.mm.default:
            _replace(module, node, None, *node.args)
        elif node.target is aten.addmm.default and not node.kwargs:
            _replace(module, node, *node.args)
        elif node.target is aten.scatter_add.default:
            if _never_meet(node):
                node.target = aten.scatter.src
            else:
                _compare(module, node, *node.args)
    module.graph.eliminate_dead_code()
    module.recompile()


def _replace(module: GraphModule, node: Node, bias: Node | None, a: Node, b: Node) -> None:
    x, y = a.meta["val"], b.meta["val"]
    (m, k), n = x.shape, y.shape[1]
    call = _caller(module, node)
    if m * n * k <= TINY:
        # [m, k, 1] · [1, k, n], summed over k
        products = call(
            aten.mul.Tensor, call(aten.unsqueeze.default, a, 2), call(aten.unsqueeze.default, b, 0)
        )
        new = call(aten.sum.dim_IntList, products, [1])
        if bias is not None:
            new = call(aten.add.Tensor, new, bias)
    elif (
        x.dtype == torch.float32 and _has_onednn() and (bias is None or bias.meta["val"].ndim == 1)
    ):
        new = call(_linear(), a, call(aten.permute.default, b, [1, 0]), bias)
    else:
        return
    node.replace_all_uses_with(new)


def _never_meet(node: Node) -> bool:
    """Say whether a scatter is the derivative of pooling with windows that do not overlap.

    No two gradients go to one pixel then, and storing does what adding would, atomically.
    """
    into, _, index, _ = cast(Any, node.args)
    while index.target in (aten.view.default, aten.reshape.default):
        index = index.args[0]
    if index.target is not torch.ops.prims._low_memory_max_pool_offsets_to_indices.default:
        return False
    _, kernel, _, stride, padding, _ = index.args
    apart = all(k <= s for k, s in zip(kernel, stride, strict=True)) and not any(padding)
    return apart and into.target is aten.full.default and into.args[1] == 0


def _compare(
    module: GraphModule, node: Node, into: Node, dim: int, index: Node, source: Node
) -> None:
    """Write one entry of each row by comparison: the derivative of taking a label's log p.

    A scatter is a call, and a buffer filled before; a comparison merges with its surroundings.
    """
    shape = into.meta["val"].shape
    zeros = into.target is aten.full.default and into.args[1] == 0
    if not zeros or dim not in (-1, len(shape) - 1) or index.meta["val"].shape[-1] != 1:
        return
    if (
        index.meta["val"].shape != source.meta["val"].shape
        or index.meta["val"].shape[:-1] != shape[:-1]
    ):
        return
    call = _caller(module, node)
    columns = call(
        torch.ops.prims.iota.default,
        shape[-1],
        start=0,
        step=1,
        dtype=torch.int64,
        device=index.meta["val"].device,
        requires_grad=False,
    )
    zero = call(
        aten.full.default, [], 0, dtype=source.meta["val"].dtype, device=index.meta["val"].device
    )
    hit = call(aten.eq.Tensor, columns, index)
    node.replace_all_uses_with(call(aten.where.self, hit, source, zero))


def _caller(module: GraphModule, node: Node) -> Callable[..., Node]:
    """Make a function that adds a call before `node`."""

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        with module.graph.inserting_before(node), node.meta["val"].fake_mode:
            new = module.graph.call_function(op, args, kwargs)
            values = (z.meta["val"] if isinstance(z, Node) else z for z in args)
            new.meta["val"] = op(*values, **kwargs)
        return new

    return call


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _linear() -> Any:
    """Define x Wᵀ + b by oneDNN, of matrices with any strides, and say how Inductor calls it."""
    from torch._inductor.ir import FixedLayout, TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary

    @torch.library.custom_op("fdl::linear", mutates_args=())
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @linear.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    @register_lowering(torch.ops.fdl.linear.default, type_promotion_kind=None)
    def lower(x: TensorBox, weight: TensorBox, bias: TensorBox | None) -> TensorBox:
        size = [x.get_size()[0], weight.get_size()[0]]
        inputs = [LinearUnary.realize_input(z) for z in (x, weight, bias) if z is not None]
        constants: list[Any] = ["none", [-1], ""]
        call = LinearUnary(
            layout=FixedLayout(device=x.get_device_or_error(), dtype=x.get_dtype(), size=size),
            inputs=inputs,
            constant_args=constants if bias is not None else [None, *constants],
        )
        return TensorBox.create(call)

    return torch.ops.fdl.linear.default
