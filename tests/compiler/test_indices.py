"""Indices out of range raise, whatever an operation does with them.

An index that a parallel kernel finds to be out of range would end the process.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from fdl import jit
from fdl._compiler._decompositions import decompositions
from fdl._compiler._indices import LISTS, RULES

ROWS = 100_000  # enough for several threads


def margin(x: Tensor, labels: Tensor) -> Tensor:
    return F.multi_margin_loss(x, labels)


def margins(x: Tensor, labels: Tensor) -> Tensor:
    return F.multilabel_margin_loss(x, labels[:, None].expand(x.shape))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [4, -7])
@pytest.mark.parametrize("loss", [margin, margins])
def test_labels_of_margin_losses(loss: Callable[..., Tensor], wrong: int) -> None:
    x = torch.linspace(-1, 1, 4 * ROWS).view(ROWS, 4)
    labels = torch.arange(ROWS) % 4
    for fn in (loss, grad(loss)):
        jitted = jit(fn, strict=True)
        torch.testing.assert_close(jitted(x, labels), fn(x, labels), rtol=1e-5, atol=1e-8)
        bad = labels.index_fill(0, torch.tensor([ROWS - 2]), wrong)
        for f in (jitted, fn):
            with pytest.raises((IndexError, RuntimeError), match="out of range"):
                f(x, bad)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("n", [None, 1, 40])
def test_sets_of_labels_end_at_the_first_minus_one(
    n: int | None, reduction: str, plain_backend: None
) -> None:
    shape = (5,) if n is None else (n, 5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    labels = torch.randint(-1, 5, shape, generator=generator)

    def loss(x: Tensor) -> Tensor:
        return F.multilabel_margin_loss(x, labels, reduction=reduction)

    for fn in (loss, grad(lambda x: (loss(x) ** 2).sum())):
        torch.testing.assert_close(jit(fn)(x), fn(x), rtol=1e-12, atol=1e-14)


# Arguments that are integers, of operations whose decomposition does not read at them: it compares
# or computes with them, hands them on to an operation with a rule, or has computed them itself.
WITHOUT_RULE = [
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "cosine_embedding_loss",
    "covers_topk",
    "cross_entropy_loss",
    "ctc_loss",
    "cummaxmin_backward",
    "embedding_backward",
    "embedding_bag",
    "embedding_sparse_backward",
    "gather_backward",
    "hinge_embedding_loss",
    "index_select_backward",
    "margin_ranking_loss",
    "max_pool2d_with_indices",
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices",
    "multilabel_margin_loss",
    "nll_loss",
    "nll_loss2d",
    "nll_loss_nd",
    "searchsorted",
    "take_along_dim",
    "value_selecting_reduction_backward",
]
FLOATS = re.compile("_like|kl_div|huber|l1_loss|mse_loss|soft_margin|cross_entropy|poisson")
INDEX = re.compile("index|indices|target|labels?|sorter")


def test_no_decomposition_reads_at_an_index_that_is_not_checked() -> None:
    """A new release may have more; each needs a rule in `_indices.py` or a reason above."""
    unknown = {
        op._opname
        for op in decompositions()
        if isinstance(op, torch._ops.OpOverload)
        and not FLOATS.search(op._opname)
        and "sparse" not in op._opname
        and any(
            "Tensor" in str(argument.type) and INDEX.fullmatch(argument.name)
            for argument in op._schema.arguments
        )
    }
    unknown -= {*WITHOUT_RULE, *RULES, *LISTS, *(f"{name}_" for name in RULES)}
    assert not unknown
