"""Derivatives of higher order of every layer and loss, forward and reverse in any order.

torch has operations whose derivative is right and the derivative of whose derivative is not; each
composition is compared with central differences of the function itself.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from fdl import random, tree
from tests.laws.test_public_functions import TABLE, example, scalar

Function = Callable[[Tensor], Tensor]
CASES = {
    f"{group}.{name}": case
    for group in ("nn", "losses")
    for name, case in TABLE[group].items()
    if case.grads and name != "with_policy"  # float32: too coarse for differences
}
NORM = CASES["nn.batch_norm"]
CASES["nn.batch_norm"] = NORM._replace(f=lambda *inputs: NORM.f(*inputs)[0])  # buffers have none
COMPOSITIONS = [*itertools.product("fr", repeat=2), *itertools.product("fr", repeat=3)]


def forward(f: Function, v: Tensor) -> Function:
    return lambda x: jvp(f, (x,), (v,))[1]


def reverse(f: Function, v: Tensor) -> Function:
    return lambda x: grad(f)(x) @ v


def central(f: Function, v: Tensor) -> Function:
    """The derivative along v to the sixth order, so that three may be nested."""
    h, weights = 0.005, ((1, 45 / 60), (2, -9 / 60), (3, 1 / 60))
    return lambda x: sum(w * (f(x + k * h * v) - f(x - k * h * v)) for k, w in weights) / h


def of_a_vector(case) -> tuple[Function, Tensor]:
    """The case as a number that depends on one vector: all that it is differentiated by."""
    inputs = example(case)
    chosen = tree.leaves([inputs[i] for i in case.grads])
    whole = scalar(case)

    def f(x: Tensor) -> Tensor:
        parts = iter(x.split([leaf.numel() for leaf in chosen]))
        own = [
            tree.map(lambda leaf: next(parts).view(leaf.shape), given) if i in case.grads else given
            for i, given in enumerate(inputs)
        ]
        return whole(*own)

    return f, torch.cat([leaf.flatten() for leaf in chosen])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_derivatives_of_second_and_third_order(case):
    f, x = of_a_vector(case)
    vs = [random.normal(random.key(i), x.shape, torch.float64) for i in range(3)]
    vs = [v / v.norm() for v in vs]
    for composition in COMPOSITIONS:
        found, expected = f, f
        for kind, v in zip(composition, vs, strict=False):
            found = (forward if kind == "f" else reverse)(found, v)
            expected = central(expected, v)
        tolerance = {2: 1e-8, 3: 1e-6}[len(composition)]
        torch.testing.assert_close(
            found(x),
            expected(x),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, c=composition: f"{c}: {m}",
        )
