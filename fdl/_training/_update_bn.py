"""The running statistics of batch normalisation at parameters other than those of the last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdl import random, tree
from fdl._compiler._scan import scan
from fdl._numerics import at_least_32_bits
from fdl._training._checks import as_batch, check_apply
from fdl.data import Batch, Indices, gather
from fdl.nn._model import check_takes_mask
from fdl.tree import Tree

NAMES = ("running_mean", "running_var", "num_batches_tracked")
LARGE = 2.0**60


def update_bn(
    apply: Callable[..., Any],
    params: Tree,
    buffers: Tree,
    dataset: tuple[Tensor, Tensor],
    indices: Indices | Tensor,
    key: Tensor | None = None,
) -> Tree:
    """Recompute the running statistics of batch normalisation at given parameters.

    Averaged parameters (`optim.params_ema`, the schedule-free optimizers) need statistics of their
    own: those of the training run belong to the parameters that were averaged. The running means
    and variances become the averages of those of all batches, whatever the momentum; equals
    `torch.optim.swa_utils.update_bn`. Other buffers stay as they are.

    Args:
        apply: of a `StatefulModel`.
        params: the parameters to evaluate with.
        buffers: the buffers whose running statistics are replaced.
        dataset: x `[n, ...]` and y `[n, ...]`; y is not used.
        indices: the batches, as for `data.batches`; masked rows do not count.
        key: draws dropout masks, batch i from `fold_in(key, i)`; needed by models with dropout,
            which is on as in training.

    Returns:
        Buffers of the same structure. `num_batches_tracked` counts the batches that had a variance:
        at least two values per feature; if none had, all is as before.

    Raises:
        TypeError: `apply` is not the `apply` of a model.
        ValueError: `buffers` has no running statistics, or there is a mask and `apply` takes none.

    Source: Izmailov et al., 2018, https://arxiv.org/abs/1803.05407

    >>> from fdl import nn
    >>> from fdl.data import sequential_indices
    >>> norm = nn.batch_norm(1)
    >>> params, buffers = norm.init(random.key(0))
    >>> examples = (torch.tensor([[1.0], [3.0], [5.0], [7.0]]), torch.zeros(4))
    >>> buffers = update_bn(norm.apply, params, buffers, examples, sequential_indices(4, 2))
    >>> [round(buffers[name].item(), 5) for name in ("running_mean", "running_var")]
    [4.0, 2.0]
    """
    check_apply("update_bn", apply)
    before = tree.flatten_dict(buffers)
    zeros = {path: torch.zeros_like(leaf) for path, leaf in before.items() if _last(path) in NAMES}
    averaged = {
        path: z.to(at_least_32_bits(z)) for path, z in zeros.items() if z.is_floating_point()
    }
    if not averaged:
        raise ValueError(f"update_bn: buffers has no running statistics, only {list(before)}")

    def after(old: Tree, batch: Batch, key: Tensor | None) -> dict[str, Tensor]:
        options: dict[str, Any] = {"train": True, "key": key}
        if isinstance(batch.mask, Tensor):
            check_takes_mask(apply, "update_bn")
            options["mask"] = batch.mask
        given = tree.unflatten_dict({**before, **zeros, **averaged, **old}, like=buffers)
        return tree.flatten_dict(apply(params, given, batch.x, **options)[1])

    # A layer moves its statistics by new = (1 - rate) · old + rate · batch. What comes of a large
    # power of two, to which the batch adds nothing, tells the rate; old = 0 tells the rest.
    one = as_batch("update_bn", gather(dataset, tree.map(lambda leaf: leaf[0], indices)))
    large: Tree = tree.map(lambda z: torch.full_like(z, LARGE), averaged)
    one = one._replace(mask=())
    moved = [after(large, one, key), after({}, one, key)]
    rates = {p: 1 - (moved[0][p] - moved[1][p]).double() / LARGE for p in averaged}

    def add(carry: Tree, row: Tree) -> tuple[Tree, tuple[()]]:
        step, sums = carry
        own = None if key is None else random.fold_in(key, step)
        new = after({}, as_batch("update_bn", gather(dataset, row)), own)
        # A batch without a variance leaves zeros, and its number, as they were.
        return (step + 1, {path: s + new[path].to(s.dtype) for path, s in sums.items()}), ()

    step = torch.zeros((), dtype=torch.int64, device=one.x.device)
    start = {path: z.double() if path in averaged else z for path, z in zeros.items()}
    (steps, sums), _ = scan(add, (step, start), indices)
    found = dict(before)
    for path, total in sums.items():
        count = sums.get(path.replace(_last(path), NAMES[2]), steps)
        mean = total / (rates[path] * count) if path in averaged else total
        found[path] = torch.where(count > 0, mean, before[path]).to(before[path].dtype)
    return tree.unflatten_dict(found, like=buffers)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
