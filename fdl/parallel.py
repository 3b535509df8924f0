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

from fdl import random, tree
from fdl import training as _training
from fdl.optim import Optimizer
from fdl.training import Metrics, TrainState, takes_buffers
from fdl.tree import Tree

__all__ = ["check_replicated", "eval_step", "own_rows", "train_step"]

T = TypeVar("T", bound=Tree)
Mesh = Any  # torch.distributed.device_mesh.DeviceMesh, whose import takes a second


def train_step(
    loss: Callable[..., Any],
    opt: Optimizer,
    mesh: Mesh,
    grad_fn: Callable[..., Any] = grad_and_value,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make `fdl.train_step` for a batch of which each process of a mesh holds a part.

    Gradients are averaged by the number of examples that each process counted, so parts may differ
    in length or in mask; metrics are summed. Then the update is that of the whole batch, to
    rounding, and the new state is the same in every process, to the bit.

    Two things are of a process alone, as in `DistributedDataParallel`: random numbers, whose key is
    folded with the rank, so that no two parts drop the same units; and the statistics that batch
    normalisation takes of a batch. The running statistics are averaged.

    Args:
        loss: as for `fdl.train_step`; its metrics have a `"loss"` whose count says how many
            examples there were, as those of `fdl.supervised` do.
        opt: an optimizer that does not evaluate the loss itself.
        mesh: the processes, a `DeviceMesh` of one dimension.
        grad_fn: how to differentiate within a process, as for `fdl.train_step`.

    Returns:
        The step `(state, batch) -> (state, metrics)`; every process must call it equally often.

    Raises:
        TypeError: `mesh` is no `DeviceMesh`.
        ValueError: a mesh of several dimensions, or one that this process is not part of.
        KeyError: the loss gives no metric `"loss"` (when the step is called).
        NotImplementedError: the optimizer evaluates the loss, as L-BFGS does (likewise).

    Source: Li et al., PyTorch Distributed, 2020, https://arxiv.org/abs/2006.15704

    Example::

        mesh = torch.distributed.init_device_mesh("cpu", (4,))     # torchrun --nproc-per-node 4
        step = parallel.train_step(loss, opt, mesh)                # as fdl.train_step(loss, opt)
        rows = parallel.own_rows(data.epoch_indices(key, 60_000, 256), mesh)    # [steps, 64]
        state, metrics = fdl.scan(lambda s, r: step(s, data.gather(images, r)), state, rows)
    """
    group, rank = _group(mesh, "train_step")

    def averaged(objective: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
        def call(params: Tree) -> tuple[Tree, Any]:
            grads, (value, (metrics, buffers)) = grad_fn(objective, has_aux=has_aux)(params)
            count = _count(metrics)
            weighted = tree.map(
                lambda x: x * count.to(x.dtype) if x.is_floating_point() else x,
                {"grads": grads, "value": value, "buffers": buffers},
            )
            total, metrics = _sum({"weighted": weighted, "metrics": metrics}, group).values()
            whole = _count(metrics).clamp(min=1)  # all padding: gradients of zero
            mean = tree.map(lambda x: x / whole.to(x.dtype), total)
            buffers = tree.map(
                lambda new, own: new if own.is_floating_point() else own,
                mean["buffers"],
                buffers,
            )
            return mean["grads"], (mean["value"], (metrics, buffers))

        return call

    return _training.train_step(_own_key(loss, rank), _without_value_fn(opt), averaged)


def eval_step(loss: Callable[..., Any], mesh: Mesh) -> Callable[[TrainState, Any], Metrics]:
    """Make `fdl.eval_step` for a batch of which each process holds a part; metrics are summed.

    Args:
        loss: as for `train_step`.
        mesh: the processes, a `DeviceMesh` of one dimension.

    Raises:
        TypeError: `mesh` is no `DeviceMesh`.
        ValueError: a mesh of several dimensions, or one that this process is not part of.

    Example::

        metrics = parallel.eval_step(loss, mesh)(state, own_part)    # the same in every process
    """
    group, _ = _group(mesh, "eval_step")
    step = _training.eval_step(loss)
    return lambda state, batch: _sum(step(state, batch), group)


def own_rows(indices: T, mesh: Mesh) -> T:
    """Take this process's columns of `[steps, batch]`, or of any leaves with those two axes first.

    Rank r of N has columns r·batch/N to (r + 1)·batch/N: what all have together is the whole.

    Args:
        indices: leaves [steps, batch, …], such as those of `data.epoch_indices`.
        mesh: the processes, a `DeviceMesh` of one dimension.

    Returns:
        Leaves [steps, batch / N, …].

    Raises:
        ValueError: the batch is not divisible by the number of processes.

    Example::

        rows = parallel.own_rows(data.epoch_indices(random.key(1), 60_000, 256), mesh)
    """
    _, rank = _group(mesh, "own_rows")
    size = mesh.size()

    def part(path: str, leaf: Tensor) -> Tensor:
        if leaf.ndim < 2 or leaf.shape[1] % size:
            raise ValueError(
                f"parallel.own_rows: {path or 'indices'} has the shape {list(leaf.shape)}; "
                f"expected [steps, batch, ...] with a batch divisible by {size} processes"
            )
        return leaf.chunk(size, dim=1)[rank].contiguous()

    flat = tree.flatten_dict(indices)
    parts = {path: part(path, leaf) for path, leaf in flat.items()}
    return tree.unflatten_dict(parts, like=indices)


def check_replicated(state: Tree, mesh: Mesh) -> None:
    """Compare a tree over the processes, and raise in each of them where any leaf differs.

    Call it once before training: a state made from another key or file in one process would train
    to nonsense without any other sign.

    Args:
        state: the tree that should be the same in every process: a `TrainState`, numbers, strings.
        mesh: the processes, a `DeviceMesh` of one dimension.

    Raises:
        ValueError: the trees differ; each path is listed, with what each process has.

    Example::

        parallel.check_replicated({"state": state, "lr": 0.1, "batch": 256}, mesh)
    """
    group, rank = _group(mesh, "check_replicated")
    mine = {path: _shown(leaf) for path, leaf in tree.flatten_dict(state).items()}
    gathered: list[Any] = [None] * mesh.size()
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


def _group(mesh: Mesh, caller: str) -> tuple[Any, int]:
    """Return the process group of a mesh and the rank of this process in it."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"parallel.{caller}: mesh must be a DeviceMesh, as torch.distributed."
            f"init_device_mesh('cpu', (processes,)) makes it, got {type(mesh).__name__}"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"parallel.{caller}: mesh must have one dimension, got {list(mesh.shape)}; take one of "
            f"its dimensions, mesh['name']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"parallel.{caller}: this process is not part of the mesh")
    return mesh.get_group(), mesh.get_local_rank()


def _count(metrics: Metrics) -> Tensor:
    if "loss" not in metrics:
        raise KeyError(
            "parallel.train_step: the loss must give a metric 'loss', whose count is the number of "
            f"examples, as fdl.supervised does; got {sorted(metrics)}"
        )
    return metrics["loss"].count


def _sum(summands: T, group: Any) -> T:
    """Sum every leaf over the processes, in one message for each dtype."""
    from torch.distributed._functional_collectives import all_reduce

    flat = tree.flatten_dict(summands)
    summed = {}
    for dtype in dict.fromkeys(leaf.dtype for leaf in flat.values()):
        leaves = {path: leaf for path, leaf in flat.items() if leaf.dtype == dtype}
        whole = all_reduce(torch.cat([leaf.reshape(-1) for leaf in leaves.values()]), "sum", group)
        parts = whole.split([leaf.numel() for leaf in leaves.values()])
        for (path, leaf), part in zip(leaves.items(), parts, strict=True):
            summed[path] = part.view(leaf.shape)
    return tree.unflatten_dict({path: summed[path] for path in flat}, like=summands)


def _own_key(loss: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """Fold the key that a loss gets with the rank."""

    def own(key: random.Key | None) -> random.Key | None:
        return None if key is None else random.fold_in(key, rank)

    def stateful(params: Tree, buffers: Tree, batch: Any, key: random.Key | None = None) -> Any:
        return loss(params, buffers, batch, own(key))

    def stateless(params: Tree, batch: Any, key: random.Key | None = None) -> Any:
        return loss(params, batch, own(key))

    return stateful if takes_buffers(loss) else stateless


def _without_value_fn(opt: Optimizer) -> Optimizer:
    """Refuse to evaluate the loss of one process, which would part the processes' states."""

    def refuse(params: Tree) -> Tensor:
        raise NotImplementedError(
            "parallel.train_step: the optimizer evaluates the loss itself (a line search), which "
            "is known to each process for its own part alone; use an optimizer that goes by "
            "gradients"
        )

    def update(grads: Tree, state: Tree, params: Tree, *, value: Tensor, value_fn: Any) -> Any:
        return opt.update(grads, state, params, value=value, value_fn=refuse)

    return Optimizer(opt.init, update)
