"""The same pure step on many processes: each takes its part of a batch, all take one update.

Every process runs the same program on the same state, from the same files with the same key, under
`torchrun`. What passes between them are functional collectives of `torch.distributed`, which
`fdl.jit` compiles with the rest: an epoch with its communication is still one program.
"""

from __future__ import annotations  # Dynamo would run those of nested functions

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import grad_and_value

from fdl import _dtensors, _once, random, tree
from fdl import training as _training
from fdl._collectives import group_of, sum_in_order, sum_over
from fdl._dtensors import is_spread
from fdl._numerics import at_least_32_bits
from fdl._paths import in_order
from fdl._scan import scan
from fdl._shard import gather, shard
from fdl.metrics import Mean
from fdl.optim import Optimizer
from fdl.optim.base import update_of
from fdl.training import Metrics, TrainState
from fdl.tree import Tree

__all__ = [
    "check_replicated",
    "eval_step",
    "gather",
    "load_once",
    "own_rows",
    "shard",
    "train_step",
]

T = TypeVar("T", bound=Tree)
Mesh = Any  # torch.distributed.device_mesh.DeviceMesh, whose import takes a second


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

    >>> from fdl import losses, nn, optim
    >>> model, opt = nn.sequential(nn.dropout(0.5), nn.linear(2, 1)), optim.sgd(0.1)
    >>> loss = _training.supervised(model.apply, losses.mse)
    >>> step = train_step(loss, opt, None, parts=4)      # what 1, 2 and 4 processes compute alike
    >>> state = TrainState.create(model, opt, key=random.key(0))
    >>> state, metrics = step(state, (torch.ones(8, 2), torch.zeros(8, 1)))
    >>> metrics["loss"].count
    tensor(8., dtype=torch.float64)
    """
    group, rank, size = group_of(mesh, "train_step")
    if mesh is None and parts is None:
        return _training.train_step(loss, opt, grad_fn)
    own = _own_parts(parts, size)
    opt = Optimizer(opt.init, update_of("parallel.train_step", opt))

    def of_part(state: TrainState, batch: Any, key: random.Key) -> Tree:
        objective = _training.objective_of(loss, state, batch, key)
        grads, (value, (metrics, buffers)) = _training.differentiate(objective, state, grad_fn)
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
            total = _dtensors.as_before(total, {**total, "grads": state.params})
        count = _count(total["metrics"])
        with _dtensors.replicating(tree.leaves(state)):
            grads, value = tree.map(lambda x: _mean(x, count), (total["grads"], total["value"]))
            grads = tree.map(lambda g, p: g.to(p.dtype), grads, state.params)
            buffers = tree.map(
                lambda x, old: _buffer(x, count, total["parts"], old),
                total["buffers"],
                full.buffers,
            )
            # A norm over all leaves is a sum over them: to the bit the same only in one order.
            ordered, grads, buffers = in_order((state, grads, buffers))
            new = _training.updated(opt, ordered, grads, buffers, value, _refuse, count)
            new = _dtensors.as_before(new, ordered)
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
    step = _training.eval_step(loss)
    return lambda state, batch: sum_over(_counted(step(_whole(state), batch)), group)


def _check_spread(state: TrainState, mesh: Mesh | None) -> None:
    for path, leaf in tree.flatten_dict(state).items():
        if is_spread(leaf) and leaf.device_mesh != mesh:
            raise ValueError(
                f"parallel.train_step: {path} is spread over {leaf.device_mesh}, the step is one "
                f"of {mesh}; make both for the same mesh"
            )


def _whole(state: TrainState) -> TrainState:
    """Gather what a loss needs."""
    return state._replace(params=gather(state.params), buffers=gather(state.buffers))


def own_rows(indices: T, mesh: Mesh | None) -> T:
    """Take this process's columns of `[steps, batch]`, or of any leaves with those two axes first.

    Rank r of N has columns r·batch/N to (r + 1)·batch/N: what all have together is the whole.

    Args:
        indices: leaves [steps, batch, …], such as those of `data.epoch_indices`.
        mesh: the processes, a `DeviceMesh` of one dimension; None is this process alone.

    Returns:
        Leaves [steps, batch / N, …].

    Raises:
        ValueError: the batch is not divisible by the number of processes.

    Example::

        rows = parallel.own_rows(data.epoch_indices(random.key(1), 60_000, 256), mesh)
    """
    _, rank, size = group_of(mesh, "own_rows")

    def part(path: str, leaf: Tensor) -> Tensor:
        if leaf.ndim < 2 or leaf.shape[1] % size:
            raise ValueError(
                f"parallel.own_rows: {path or 'indices'} has the shape {list(leaf.shape)}; "
                f"expected [steps, batch, ...] with a batch divisible by {size} processes"
            )
        own = leaf.chunk(size, dim=1)[rank]
        return own if size == 1 else own.clone(memory_format=torch.contiguous_format)

    flat = tree.flatten_dict(indices)
    parts = {path: part(path, leaf) for path, leaf in flat.items()}
    return tree.unflatten_dict(parts, like=indices)


def load_once(load: Callable[[], T], mesh: Mesh | None) -> T:
    """Load data in one process of each host, for all of its processes: they share the memory.

    The tensors are files in memory (where it has no room for them, in the temporary folder), which
    all processes map, and which have no name from then on: they go with the last process.

    Args:
        load: reads the data, a tree of tensors on the CPU and of anything that can be pickled.
        mesh: the processes, a `DeviceMesh` of one dimension; None is this process alone.

    Returns:
        What `load` returned, to be read only. Writing in place is seen by nobody else.

    Raises:
        Exception: what `load` raised; an `OSError` that says so in processes that did not call it.

    Example::

        images = parallel.load_once(lambda: data.fashion_mnist(train=True), mesh)

    >>> load_once(lambda: {"x": torch.ones(2), "name": "ones"}, None)
    {'x': tensor([1., 1.]), 'name': 'ones'}
    """
    group, _, _ = group_of(mesh, "load_once")
    return load() if group is None else _once._load_per_host(load, group)


def check_replicated(state: Tree, mesh: Mesh | None) -> None:
    """Compare a tree over the processes, and raise in each of them where any leaf differs.

    Call it once before training: a state made from another key or file in one process would train
    to nonsense without any other sign.

    Args:
        state: the tree that should be the same in every process: a `TrainState`, numbers, strings.
        mesh: the processes, a `DeviceMesh` of one dimension; None is this process alone.

    Raises:
        ValueError: the trees differ; each path is listed, with what each process has.

    Example::

        parallel.check_replicated({"state": state, "lr": 0.1, "batch": 256}, mesh)
    """
    group, rank, size = group_of(mesh, "check_replicated")
    if group is None:
        return
    mine = {path: _shown(leaf) for path, leaf in tree.flatten_dict(state).items()}
    gathered: list[Any] = [None] * size
    torch.distributed.all_gather_object(gathered, mine, group)
    lines = [
        f"{path}: " + ", ".join(f"{has.get(path, 'missing')} on rank {r}" for r, has in who)
        for path in dict.fromkeys(path for has in gathered for path in has)
        if (who := _unequal([has.get(path) for has in gathered], gathered))
    ]
    if lines:
        raise ValueError(
            f"parallel.check_replicated: the processes differ (this is rank {rank}); make it from "
            "the same key, file and options in each:\n  " + "\n  ".join(lines)
        )


def _unequal(values: list[Any], gathered: list[Any]) -> list[tuple[int, Any]]:
    """Give the first process and the first that differs from it, with what they have."""
    other = next((r for r, value in enumerate(values) if value != values[0]), None)
    return [] if other is None else [(0, gathered[0]), (other, gathered[other])]


def _shown(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:8]
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} with SHA-256 {digest}"


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
