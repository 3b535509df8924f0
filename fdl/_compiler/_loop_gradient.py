"""The gradient of a loop is a loop from the last step to the first.

The forward loop also returns the carry that each step starts from, and the values in the step that
are costly to compute. The backward loop runs each step again from there, and pulls back its
cotangents; what it would compute again although it was returned, it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.func import vjp
from torch.fx import GraphModule, Node

from fdl._compiler._closed_body import closed_graph
from fdl._compiler._graph import nodes_of, reached, results_of, with_results, worth_keeping
from fdl._compiler._loops import Loop, replaced, run_below, run_graph, run_loop


def under_grad(loop: Loop, operands: list[Tensor], interpreter: Any) -> list[Tensor]:
    """Run a loop under `grad` or `vjp`."""
    graph, n_operands = loop.body.graph, len(operands)
    kept = [*nodes_of(graph, "placeholder")[: loop.carry], *worth_keeping(graph)]
    with_kept = loop._replace(body=with_results(loop.body, kept))
    n_results = len(results_of(graph))

    class Scan(_SingleLevelFunction):
        @staticmethod
        def forward(*operands: Tensor) -> tuple[Tensor, ...]:
            return run_below(interpreter, partial(run_loop, with_kept), operands)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs, *output[n_results:])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = [functorch.unwrap_if_dead(x) for x in ctx.saved_tensors]
            needed = [i for i, x in enumerate(ctx.needs_input_grad) if x]
            backward = _Backward.of(with_kept, needed, cotangents)
            grads = backward.run(saved[:n_operands], saved[n_operands:], cotangents)
            return tuple(grads.get(i) for i in range(n_operands))

    with enable_single_level_autograd_function():
        return list(cast(Any, Scan).apply(*operands))[:n_results]


class _Backward(NamedTuple):
    """Which gradients the backward loop computes, from which cotangents.

    All are indices of operands or results of the forward loop.
    """

    loop: Loop  # forward
    carry: list[int]  # leaves whose cotangents are carried from step to step
    xs: list[int]  # operands with a gradient for each row
    constants: list[int]  # operands whose gradients are summed over the steps
    ys: list[int]  # results with a cotangent for each row

    @classmethod
    def of(cls, loop: Loop, needed: list[int], cotangents: Sequence[Tensor | None]) -> _Backward:
        n, m = loop.carry, loop.carry + loop.xs
        inputs, outputs = reached(loop.body.graph, needed, n, smooth=True)
        return cls(
            loop,
            carry=[i for i in range(n) if i in inputs],
            xs=[i for i in needed if n <= i < m],
            constants=[i for i in needed if i >= m],
            ys=[i for i in range(n, len(outputs)) if outputs[i] and cotangents[i] is not None],
        )

    def run(
        self, operands: list[Tensor], kept: list[Tensor], cotangents: Sequence[Tensor | None]
    ) -> dict[int, Tensor]:
        """Return the gradients of operands, by index.

        Args:
            operands: those of the forward loop.
            kept: the carry at the start of each step, and the values that are `worth_keeping`.
            cotangents: of its results; None stands for zeros.
        """
        if not self.carry and not self.ys:  # nothing that depends on the operands is used
            return {}
        _, xs, constants = self.loop.split(operands)
        init = [_or_zeros(cotangents[i], operands[i]) for i in self.carry]
        init += [torch.zeros_like(operands[i]) for i in self.constants]
        rows = [*kept, *xs, *(cast(Tensor, cotangents[i]) for i in self.ys)]
        new = Loop(self.loop.body, len(init), len(rows), self.loop.length)
        all_operands = [*init, *(x.flip(0) for x in rows), *constants]
        body, more = self.body(new, new.examples(all_operands), len(kept))
        results = run_loop(new._replace(body=body), [*all_operands, *more])
        grads = dict(zip([*self.carry, *self.constants], results, strict=False))
        stacked = zip(self.xs, results[len(init) :], strict=True)
        return grads | {i: x.flip(0) for i, x in stacked}

    def body(
        self, new: Loop, examples: list[Tensor], n_kept: int
    ) -> tuple[GraphModule, list[Tensor]]:
        """Trace one step of the backward loop.

        `(*cotangents, *sums, *kept, *row, *cotangents of y, *constants)` to
        `[*cotangents, *sums, *gradients of row]`.
        """
        n, n_carry = self.loop.carry, len(self.carry)
        n_read = n_kept + self.loop.xs
        wanted = [*self.carry, *self.xs, *self.constants]
        n_single = n_carry + len(self.xs)
        computed: dict[Node, Node] = {}

        def fn(*leaves: Tensor) -> list[Tensor]:
            carry, row, constants = new.split(leaves)
            arguments = [*row[:n], *row[n_kept:n_read], *constants]

            def step(*chosen: Tensor) -> tuple[Tensor, ...]:
                values = replaced(arguments, wanted, chosen)
                results = run_graph(self.loop.body, values, computed)
                return tuple(results[i] for i in [*self.carry, *self.ys])

            pull_back = vjp(step, *(arguments[i] for i in wanted))[1]
            grads = pull_back((*carry[:n_carry], *row[n_read:]))
            sums = [a + b for a, b in zip(carry[n_carry:], grads[n_single:], strict=True)]
            return [*grads[:n_carry], *sums, *grads[n_carry:n_single]]

        graph, closed_over = closed_graph(fn, examples)
        arguments = nodes_of(graph.graph, "placeholder")[new.carry + n : new.carry + n_kept]
        for node, argument in zip(worth_keeping(self.loop.body.graph), arguments, strict=True):
            if node in computed:
                computed[node].replace_all_uses_with(argument)
        graph.graph.eliminate_dead_code()
        return graph, closed_over


def _or_zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x
