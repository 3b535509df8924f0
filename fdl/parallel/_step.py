"""`train_step` and `eval_step` on several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from fdl import _dtensor, random, tree
from fdl._compiler._scan import scan
from fdl._dtensor import is_dtensor
from fdl._numerics import at_least_32_bits
from fdl._training import TrainState, _step
from fdl._training._state import Metrics
from fdl.metrics import Mean
from fdl.optim import Optimizer
from fdl.optim._base import update_of
from fdl.parallel._group import Mesh, group_of
from fdl.parallel._shard import gather
from fdl.parallel._sums import sum_in_order, sum_over
from fdl.tree import Tree
from fdl.tree._paths import in_order


def train_step(
    loss: Callable[..., Any],
    opt: Optimizer,
    mesh: Mesh | None,
    grad_fn: Callable[..., Any] = grad_and_value,
    parts: int | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make `fdl.train_step` for a batch of which each process of a mesh holds a part.

    Gradients are averaged by the number of examples that each process counted, so parts may differ
    in length or in mask, or have no examples at all; metrics are summed. Then the update is that of
    the whole batch, to rounding, and the new state is the same in every process, to the bit. Leaves
    are matched by their paths, whatever the order in which dicts were filled.

    Two things belong to a part: random numbers, whose key is folded with the part's number, so that
    no two parts drop the same units; and the statistics that batch normalisation takes of a batch,
    whose running ones are averaged over the examples, and stay as they were where none counts. As
    in `DistributedDataParallel`, there are as many parts as processes, and another number of
    processes is another run.

    With `parts`, it is the same run, to the bit: a batch is always cut into so many parts, each
    process computes its share of them one after the other, and all are added in one fixed order.
    Sums then travel to every process and not just around, N/2 times the bytes.

    Args:
        loss: as for `fdl.train_step`; its metrics have a `"loss"` whose count says how many
            examples there were, as those of `fdl.supervised` do.
        opt: an optimizer that does not evaluate the loss itself.
        mesh: the processes, a `DeviceMesh` of one dimension; None is this process alone.
        grad_fn: how to differentiate within a part, as for `fdl.train_step`.
        parts: of a batch; a multiple of the number of processes by a power of two.

    Returns:
        The step `(state, batch) -> (state, metrics)`; every process must call it equally often.

    Raises:
        TypeError: `mesh` is no `DeviceMesh`.
        ValueError: a mesh of several dimensions, or one that this process is not part of; `parts`
            that cannot be shared out; a batch that cannot be cut so (when the step is called).
        KeyError: the loss gives no metric `"loss"` (likewise).
        NotImplementedError: the optimizer evaluates the loss, as L-BFGS does (likewise).

    Source: Li et al., PyTorch Distributed, 2020, https://arxiv.org/abs/2006.15704

    Example::

        mesh = torch.distributed.init_device_mesh("cpu", (4,))     # torchrun --nproc-per-node 4
        step = parallel.train_step(loss, opt, mesh)                # as fdl.train_step(loss, opt)
        rows = parallel.own_rows(data.epoch_indices(key, 60_000, 256), mesh)    # [steps, 64]
        state, metrics = fdl.scan(lambda s, r: step(s, data.gather(images, r)), state, rows)

    >>> from fdl import losses, nn, optim, supervised
    >>> model, opt = nn.sequential(nn.dropout(0.5), nn.linear(2, 1)), optim.sgd(0.1)
    >>> loss = supervised(model.apply, losses.mse)
    >>> step = train_step(loss, opt, None, parts=4)      # what 1, 2 and 4 processes compute alike
    >>> state = TrainState.create(model, opt, key=random.key(0))
    >>> state, metrics = step(state, (torch.ones(8, 2), torch.zeros(8, 1)))
    >>> metrics["loss"].count
    tensor(8., dtype=torch.float64)
    """
    group, rank, size = group_of(mesh, "train_step")
    if mesh is None and parts is None:
        return _step.train_step(loss, opt, grad_fn)
    own = _own_parts(parts, size)
    opt = Optimizer(opt.init, update_of("parallel.train_step", opt))

    def of_part(state: TrainState, batch: Any, key: random.Key) -> Tree:
        objective = _step.objective_of(loss, state, batch, key)
        grads, (value, (metrics, buffers)) = _step.differentiate(objective, state, grad_fn)
        count = _count(metrics)
        sums = {"grads": grads, "value": value, "buffers": buffers}
        sums = tree.map(lambda x: _weighted(x, count), sums)
        return {**sums, "parts": (count != 0).to(count.dtype), "metrics": _counted(metrics)}

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        _check_spread(state, mesh)
        key = random.fold_in(state.key, state.step)
        full = _whole(state)
        if parts is None:
            found = of_part(full, batch, random.fold_in(key, rank))
            total = sum_over(found, group, {**found, "grads": state.params})
        else:
            keys = torch.stack([random.fold_in(key, rank * own + i) for i in range(own)])
            _, each = scan(lambda _, part: ((), of_part(full, *part)), (), (_cut(batch, own), keys))
            total = sum_in_order(each, group, size)
            total = _dtensor.redistribute_like(total, {**total, "grads": state.params})
        count = _count(total["metrics"])
        with _dtensor.replicating(tree.leaves(state)):
            grads, value = tree.map(lambda x: _mean(x, count), (total["grads"], total["value"]))
            grads = tree.map(lambda g, p: g.to(p.dtype), grads, state.params)
            buffers = tree.map(
                lambda x, old: _buffer(x, count, total["parts"], old),
                total["buffers"],
                full.buffers,
            )
            # A norm over all leaves is a sum over them: to the bit the same only in one order.
            ordered, grads, buffers = in_order((state, grads, buffers))
            new = _step.updated(opt, ordered, grads, buffers, value, _refuse, count)
            new = _dtensor.redistribute_like(new, ordered)
            return tree.map(lambda _, leaf: leaf, state, new), total["metrics"]

    return step


def eval_step(loss: Callable[..., Any], mesh: Mesh | None) -> Callable[[TrainState, Any], Metrics]:
    """Make `fdl.eval_step` for a batch of which each process holds a part; metrics are summed.

    Args:
        loss: as for `train_step`.
        mesh: the processes, a `DeviceMesh` of one dimension; None is this process alone.

    Raises:
        TypeError: `mesh` is no `DeviceMesh`.
        ValueError: a mesh of several dimensions, or one that this process is not part of.

    Example::

        metrics = parallel.eval_step(loss, mesh)(state, own_part)    # the same in every process
    """
    group, _, _ = group_of(mesh, "eval_step")
    step = _step.eval_step(loss)
    return lambda state, batch: sum_over(_counted(step(_whole(state), batch)), group)


def _check_spread(state: TrainState, mesh: Mesh | None) -> None:
    for path, leaf in tree.flatten_dict(state).items():
        if is_dtensor(leaf) and leaf.device_mesh != mesh:
            raise ValueError(
                f"parallel.train_step: {path} is spread over {leaf.device_mesh}, the step is one "
                f"of {mesh}; make both for the same mesh"
            )


def _whole(state: TrainState) -> TrainState:
    """Gather what a loss needs."""
    return state._replace(params=gather(state.params), buffers=gather(state.buffers))


def _count(metrics: Metrics) -> Tensor:
    if "loss" not in metrics:
        raise KeyError(
            "parallel.train_step: the loss must give a metric 'loss', whose count is the number of "
            f"examples, as fdl.supervised does; got {sorted(metrics)}"
        )
    return metrics["loss"].count


def _counted(metrics: Metrics) -> Metrics:
    """Leave out what counts nothing: the total of no examples may be NaN."""
    return {
        name: Mean(torch.where(mean.count != 0, mean.total, 0), mean.count)
        if isinstance(mean, Mean)
        else mean
        for name, mean in metrics.items()
    }


def _weighted(x: Tensor, count: Tensor) -> Tensor:
    """Weigh what a part found by how many examples it counted; of none it may be NaN.

    Integers are the same in every part that counts, and are added as they are.
    """
    if not x.is_floating_point():
        return torch.where(count != 0, x, 0).to(torch.int64)
    x = x.to(at_least_32_bits(x))
    return torch.where(count != 0, x * count.to(x.dtype), 0)


def _mean(x: Tensor, count: Tensor) -> Tensor:
    """Divide a sum over parts by how many examples they counted; nothing but padding gives 0."""
    return x / torch.where(count > 0, count, 1).to(x.dtype)


def _buffer(x: Tensor, count: Tensor, parts: Tensor, old: Tensor) -> Tensor:
    """Average a buffer over the parts that count; it stays as it was where there are none."""
    if x.is_floating_point():
        mean = _mean(x, count)
    else:
        mean = x // torch.where(parts > 0, parts, 1).to(x.dtype)
    return torch.where(count > 0, mean, old).to(old.dtype)


def _own_parts(parts: int | None, size: int) -> int:
    """Say how many parts of a batch a process takes."""
    if parts is None:
        return 1
    own, rest = divmod(parts, size)
    # Sums by pairs of neighbours are the same for all when each share is a whole branch.
    if rest or own < 1 or (size > 1 and own & (own - 1)):
        raise ValueError(
            f"parallel.train_step: parts must be {size} processes times a power of two, so that "
            f"each takes as many of them; got {parts}"
        )
    return own


def _cut(batch: Any, count: int) -> Any:
    """Cut the leaves [batch, …] of a process into [count, batch / count, …]."""

    def cut(path: str, leaf: Tensor) -> Tensor:
        if not leaf.ndim or leaf.shape[0] % count:
            raise ValueError(
                f"parallel.train_step: {path or 'the batch'} has the shape {list(leaf.shape)}; "
                f"expected [batch, ...] with a batch divisible into {count} parts"
            )
        return leaf.unflatten(0, (count, leaf.shape[0] // count))

    flat = {path: cut(path, leaf) for path, leaf in tree.flatten_dict(batch).items()}
    return tree.unflatten_dict(flat, like=batch)


def _refuse(params: Tree) -> Tensor:
    """Refuse to evaluate the loss of one part, which would part the processes' states."""
    raise NotImplementedError(
        "parallel.train_step: the optimizer evaluates the loss itself (a line search), which is "
        "known to each process for its own part alone; use an optimizer that goes by gradients"
    )
