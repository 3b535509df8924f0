"""Recompute the running statistics of batch normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdl import random, tree
from fdl._compiler._scan import scan
from fdl._numerics import at_least_32_bits
from fdl._training._checks import as_batch
from fdl.data import Batch, Indices, batch, take
from fdl.data._rows import check_rows
from fdl.nn import StatefulModel
from fdl.nn._model import check_model, check_takes_mask
from fdl.tree import Tree

NAMES = ("running_mean", "running_var", "num_batches_tracked")
LARGE = 2.0**60


def update_bn(
    model: StatefulModel,
    params: Tree,
    buffers: Tree,
    dataset: tuple[Tree, Tree],
    indices: Indices | Tensor,
    key: Tensor | None = None,
) -> Tree:
    """Recompute the running statistics of batch normalisation at given parameters.

    Averaged parameters (`optim.params_ema`, the schedule-free optimizers) need their own
    statistics, since those of the training run belong to other parameters. The running mean and
    variance become the averages of the means and variances of all batches, whatever the momentum.
    Other buffers are returned unchanged. Equals `torch.optim.swa_utils.update_bn`.

    Args:
        model: a model with batch normalisation.
        params: the parameters to compute the statistics for.
        buffers: the buffers in which to replace the running statistics.
        dataset: x, leaves `[n, ...]`, as the model takes it (for uint8 images
            `data.to_float(dataset)`), and y, leaves `[n, ...]`, which is not used.
        indices: the batches, as for `data.batches`; masked rows do not count.
        key: used by dropout, which is on as in training; batch i gets `fold_in(key, i)`.

    Returns:
        Buffers of the same structure. `num_batches_tracked` is the number of batches with at least
        two values per feature, and so a variance; if there are none, the buffers are unchanged.

    Raises:
        TypeError: `model` is not a `StatefulModel`.
        ValueError: `buffers` contains no running statistics, or there is a mask that `model` does
            not take.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
    2018, https://arxiv.org/abs/1803.05407

    >>> from fdl import nn
    >>> from fdl.data import sequential_indices
    >>> norm = nn.batch_norm(1)
    >>> params, buffers = norm.init(random.key(0))
    >>> examples = (torch.tensor([[1.0], [3.0], [5.0], [7.0]]), torch.zeros(4))
    >>> buffers = update_bn(norm, params, buffers, examples, sequential_indices(4, 2))
    >>> [round(buffers[name].item(), 5) for name in ("running_mean", "running_var")]
    [4.0, 2.0]
    """
    check_model("update_bn", model)
    if not isinstance(model, StatefulModel):
        raise TypeError("update_bn: model must be a StatefulModel, got a Model, without buffers")
    check_rows("update_bn", "indices", tree.flatten_dict(indices))
    before = tree.flatten_dict(buffers)
    zeros = {path: torch.zeros_like(leaf) for path, leaf in before.items() if _last(path) in NAMES}
    averaged = {
        path: z.to(at_least_32_bits(z)) for path, z in zeros.items() if z.is_floating_point()
    }
    if not averaged:
        raise ValueError(f"update_bn: buffers has no running statistics, only {list(before)}")

    def after(old: Tree, examples: Batch, key: Tensor | None) -> dict[str, Tensor]:
        options: dict[str, Any] = {"train": True, "key": key}
        if isinstance(examples.mask, Tensor):
            check_takes_mask("update_bn", model)
            options["mask"] = examples.mask
        start = tree.unflatten_dict({**before, **zeros, **averaged, **old}, like=buffers)
        return tree.flatten_dict(model.apply(params, start, examples.x, **options)[1])

    # A layer computes new = (1 - rate) · old + rate · batch. Starting at a large power of two, to
    # which the batch adds nothing, reveals the rate; starting at 0 gives rate · batch.
    one = as_batch("update_bn", batch(dataset, take(indices, 0)))
    large: Tree = tree.map(lambda z: torch.full_like(z, LARGE), averaged)
    one = one._replace(mask=())
    moved = [after(large, one, key), after({}, one, key)]
    rates = {p: 1 - (moved[0][p] - moved[1][p]).double() / LARGE for p in averaged}

    def add(carry: Tree, row: Tree) -> tuple[Tree, tuple[()]]:
        step, sums = carry
        step_key = None if key is None else random.fold_in(key, step)
        new = after({}, as_batch("update_bn", batch(dataset, row)), step_key)
        # A batch without a variance leaves the statistics and the count at 0.
        return (step + 1, {path: s + new[path].to(s.dtype) for path, s in sums.items()}), ()

    step = torch.zeros((), dtype=torch.int64, device=tree.leaves(one.x)[0].device)
    start = {path: z.double() if path in averaged else z for path, z in zeros.items()}
    (steps, sums), _ = scan(add, (step, start), indices)
    result = dict(before)
    for path, total in sums.items():
        count = sums.get(path.replace(_last(path), NAMES[2]), steps)
        mean = total / (rates[path] * count) if path in averaged else total
        result[path] = torch.where(count > 0, mean, before[path]).to(before[path].dtype)
    return tree.unflatten_dict(result, like=buffers)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
