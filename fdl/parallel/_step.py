"""`train_step` and `eval_step` on several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from fdl import _dtensor, random, tree
from fdl._checks import describe
from fdl._compiler._scan import scan
from fdl._dtensor import is_dtensor
from fdl._numerics import at_least_32_bits
from fdl._training import TrainState, _step
from fdl._training._checks import check_loss, check_step_metrics
from fdl._training._loss import Loss
from fdl._training._state import Metrics
from fdl.metrics import Mean
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.parallel._group import Mesh, group_of
from fdl.parallel._shard import gather
from fdl.parallel._sums import sum_in_order, sum_over
from fdl.tree import Tree
from fdl.tree._paths import in_order


def train_step(
    loss: Loss,
    opt: OptimizerLike,
    mesh: Mesh | None,
    grad_fn: Callable[..., Any] = grad_and_value,
    microbatches: int | None = None,
    metrics: _step.StepMetrics | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make `fdl.train_step` for batches of which each process of a mesh holds a part.

    Gradients are averaged, weighted by the number of examples that each process counted, so parts
    may differ in length or mask, or be empty; metrics are summed. The update is that of the whole
    batch, up to rounding, and the new state is the same in every process, to the bit. Leaves are
    matched by path, whatever the order in which dicts were filled.

    By default, as in `DistributedDataParallel`, two things depend on the number of processes. Each
    process folds its rank into the key, so that dropout masks differ between parts. Each process
    normalises with the batch statistics of its own part; the running statistics are averaged over
    the examples, and unchanged if no example counts.

    With `microbatches`, a run gives the same bits on any number of processes: every batch is cut
    into so many microbatches, each with a key of its own; each process computes its share of them
    one after the other, and the results are added in a fixed order. This replaces the ring
    all-reduce by an all-gather, which moves N/2 times as many bytes. On one process it is gradient
    accumulation.

    Args:
        loss: as for `fdl.train_step`; its metrics need a `"loss"` whose count is the number of
            examples, as those of `fdl.supervised` have.
        opt: an optimizer that does not evaluate the loss itself.
        mesh: the processes, a `DeviceMesh` of one dimension; None for this process alone.
        grad_fn: differentiates within a part, as for `fdl.train_step`.
        microbatches: number of microbatches in a batch, over all processes: the number of processes
            times a power of two (any number on one process).
        metrics: of the step itself, as for `fdl.train_step`: a function of the state before the
            update, sharded as it is, and the gradients of the whole batch. The norm of sharded
            leaves is a sum over the parts, whose last bits depend on their number.

    Returns:
        The step `(state, batch) -> (state, metrics)`; every process must call it the same number
        of times.

    Raises:
        TypeError: `mesh` is not a `DeviceMesh`.
        ValueError: `mesh` has several dimensions or does not include this process, or
            `microbatches` cannot be divided among the processes. When the step is called: the batch
            cannot be divided into microbatches, or the state is sharded over another mesh.
        KeyError: when the step is called: the loss has no metric `"loss"`.
        NotImplementedError: when the step is called: the optimizer evaluates the loss, as L-BFGS.

    Source: Li et al., PyTorch Distributed, 2020, https://arxiv.org/abs/2006.15704

    Example::

        mesh = torch.distributed.init_device_mesh("cpu", (4,))     # torchrun --nproc-per-node 4
        step = parallel.train_step(loss, opt, mesh)                # as fdl.train_step(loss, opt)
        rows = parallel.own_rows(data.epoch_indices(key, 60_000, 256), mesh)    # [steps, 64]
        state, metrics = fdl.scan(lambda s, r: step(s, data.batch(points, r)), state, rows)

    >>> from fdl import losses, nn, optim, supervised
    >>> model, opt = nn.sequential(nn.dropout(0.5), nn.linear(2, 1)), optim.sgd(0.1)
    >>> loss = supervised(model, losses.mse)
    >>> step = train_step(loss, opt, None, microbatches=4)  # the same bits on 1, 2 and 4 processes
    >>> state = TrainState.create(model, opt, key=random.key(0))
    >>> state, metrics = step(state, (torch.ones(8, 2), torch.zeros(8, 1)))
    >>> metrics["loss"].count
    tensor(8., dtype=torch.float64)
    """
    group, rank, size = group_of(mesh, "train_step")
    if mesh is None and microbatches is None:
        return _step.train_step(loss, opt, grad_fn, metrics)
    check_loss("parallel.train_step", loss)
    check_step_metrics("parallel.train_step", metrics)
    own = _own_microbatches(microbatches, size)
    checked = as_optimizer("parallel.train_step", opt)

    def of_part(state: TrainState, batch: Any, key: random.Key) -> Tree:
        objective = _step.make_objective(loss, state, batch, key)
        grads, (value, (found, buffers)) = _step.differentiate(objective, state, grad_fn)
        count = _count(found)
        sums = {"grads": grads, "value": value, "buffers": buffers}
        sums = tree.map(lambda x: _weighted(x, count), sums)
        return {**sums, "parts": (count != 0).to(count.dtype), "metrics": _counted(found)}

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        _check_meshes(state, mesh)
        key = random.fold_in(state.key, state.step)
        full = _whole(state)
        if microbatches is None:
            sums = of_part(full, batch, random.fold_in(key, rank))
            total = sum_over(sums, group, {**sums, "grads": state.params})
        else:
            keys = torch.stack([random.fold_in(key, rank * own + i) for i in range(own)])
            _, each = scan(lambda _, part: ((), of_part(full, *part)), (), (_cut(batch, own), keys))
            total = sum_in_order(each, group, size)
            total = _dtensor.redistribute_like(total, {**total, "grads": state.params})
        found = total["metrics"]
        count = _count(found)
        with _dtensor.replicating(tree.leaves(state)):
            grads, value = tree.map(lambda x: _mean(x, count), (total["grads"], total["value"]))
            grads = tree.map(lambda g, p: g.to(p.dtype), grads, state.params)
            buffers = tree.map(
                lambda x, old: _buffer(x, count, total["parts"], old),
                total["buffers"],
                full.buffers,
            )
            # A norm over all leaves is a sum, whose bits depend on the order of the leaves.
            ordered, grads, buffers = in_order((state, grads, buffers))
            new = _step.apply_gradients(checked, ordered, grads, buffers, value, _refuse, count)
            new = _dtensor.redistribute_like(new, ordered)
            found = _step.measure("parallel.train_step", metrics, ordered, grads, found)
            return tree.map(lambda _, leaf: leaf, state, new), gather(found)

    return step


def eval_step(loss: Loss, mesh: Mesh | None) -> Callable[[TrainState, Any], Metrics]:
    """Make `fdl.eval_step` for a batch of which each process holds a part; metrics are summed.

    Args:
        loss: as for `train_step`.
        mesh: the processes, a `DeviceMesh` of one dimension; None for this process alone.

    Raises:
        TypeError: `mesh` is not a `DeviceMesh`.
        ValueError: `mesh` has several dimensions or does not include this process.

    Example::

        metrics = parallel.eval_step(loss, mesh)(state, own_part)    # the same in every process
    """
    group, _, _ = group_of(mesh, "eval_step")
    step = _step.eval_step(loss)
    return lambda state, batch: sum_over(_counted(step(_whole(state), batch)), group)


def _check_meshes(state: TrainState, mesh: Mesh | None) -> None:
    lines = [
        f"{path}: {leaf.device_mesh}"
        for path, leaf in tree.flatten_dict(state).items()
        if is_dtensor(leaf) and leaf.device_mesh != mesh
    ]
    if lines:
        raise ValueError(
            f"parallel.train_step: the step is for {mesh}, but leaves are sharded over another "
            "mesh; use the same one for both:\n  " + "\n  ".join(lines)
        )


def _whole(state: TrainState) -> TrainState:
    """Gather the parameters and buffers for the loss."""
    return state._replace(params=gather(state.params), buffers=gather(state.buffers))


def _count(metrics: Metrics) -> Tensor:
    if "loss" not in metrics:
        raise KeyError(
            "parallel.train_step: the loss must have a metric 'loss' whose count is the number of "
            f"examples, as that of fdl.supervised has; got {sorted(metrics)}"
        )
    return metrics["loss"].count


def _counted(metrics: Metrics) -> Metrics:
    """Set totals over no examples to 0, since they may be NaN."""
    return {
        name: Mean(torch.where(mean.count != 0, mean.total, 0), mean.count)
        if isinstance(mean, Mean)
        else mean
        for name, mean in metrics.items()
    }


def _weighted(x: Tensor, count: Tensor) -> Tensor:
    """Multiply by the number of examples; over no examples `x` may be NaN, and becomes 0.

    Integers are the same in every part with examples, and are added unweighted.
    """
    if not x.is_floating_point():
        return torch.where(count != 0, x, 0).to(torch.int64)
    x = x.to(at_least_32_bits(x))
    return torch.where(count != 0, x * count.to(x.dtype), 0)


def _mean(x: Tensor, count: Tensor) -> Tensor:
    """Divide a weighted sum by the number of examples; without any, return 0."""
    return x / torch.where(count > 0, count, 1).to(x.dtype)


def _buffer(x: Tensor, count: Tensor, parts: Tensor, old: Tensor) -> Tensor:
    """Average a buffer over the parts with examples; without any, return the old one."""
    if x.is_floating_point():
        mean = _mean(x, count)
    else:
        mean = x // torch.where(parts > 0, parts, 1).to(x.dtype)
    return torch.where(count > 0, mean, old).to(old.dtype)


def _own_microbatches(microbatches: int | None, size: int) -> int:
    """Return the number of microbatches that each process computes."""
    if microbatches is None:
        return 1
    if not isinstance(microbatches, int):
        got = describe(microbatches)
        raise TypeError(f"parallel.train_step: microbatches must be an int, got {got}")
    own, rest = divmod(microbatches, size)
    # Pairwise sums do not depend on `size` if the share of each process is a whole subtree.
    if rest or own < 1 or (size > 1 and own & (own - 1)):
        raise ValueError(
            f"parallel.train_step: microbatches must be a power of two times the {size} processes, "
            f"got {microbatches}"
        )
    return own


def _cut(batch: Any, count: int) -> Any:
    """Cut the leaves [batch, …] of a process into [count, batch / count, …]."""
    lines = [
        f"{path or 'batch'}: {list(leaf.shape)}"
        for path, leaf in tree.flatten_dict(batch).items()
        if not leaf.ndim or leaf.shape[0] % count
    ]
    if lines:
        raise ValueError(
            f"parallel.train_step: expected leaves [batch, ...] with a batch divisible by the "
            f"{count} microbatches of a process, got\n  " + "\n  ".join(lines)
        )
    return tree.map(lambda leaf: leaf.unflatten(0, (count, leaf.shape[0] // count)), batch)


def _refuse(params: Tree) -> Tensor:
    """Refuse to evaluate the loss of one part, which would let the states diverge."""
    raise NotImplementedError(
        "parallel.train_step: the optimizer evaluates the loss itself (a line search), but each "
        "process only has the loss of its own part; use an optimizer that only needs gradients"
    )
