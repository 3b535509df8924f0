"""One of two processes whose dicts were filled in other orders: see tests/parallel/test_step.py.

`python -m tests.workers.forks order_worker FOLDER 2 cpu` runs both. The second process has the keys
of every dict reversed: parameters, buffers, metrics, batches. Nothing may come of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import fdl
from fdl import TrainState, jit, metrics, nn, optim, parallel, random, scan, tree
from fdl.checkpointing import Checkpointer
from fdl.data import Batch
from fdl.nn import StatefulModel
from fdl.tree import Tree
from tests.workers.train_worker import join

STEPS, ROWS = 5, 8
x = random.normal(random.key(1), (STEPS, ROWS, 4), torch.float64)
BATCHES = Batch(x, x.flip(-1).cos())


def own(t: Tree) -> Tree:
    """The tree as this process fills it: in the second one from the last key to the first."""
    if isinstance(t, dict):
        keys = list(t) if dist.get_rank() == 0 else list(reversed(t))
        return {key: own(t[key]) for key in keys}
    if isinstance(t, tuple) and hasattr(t, "_fields"):
        return type(t)(*(own(child) for child in t))
    return type(t)(own(child) for child in t) if isinstance(t, (list, tuple)) else t


def same_keys(one: Tree, other: Tree) -> bool:
    """Whether two trees have their leaves in one order."""
    return list(tree.flatten_dict(one)) == list(tree.flatten_dict(other))


def init(key: random.Key) -> tuple[Tree, Tree]:
    """Leaves of one shape, so that every confusion of two of them fits."""
    draws = random.normal(key, (2, 4, 4), torch.float64)
    params = {side: {"w": w, "b": w[0] / 8} for side, w in zip(["left", "right"], draws)}  # noqa: B905
    buffers = {"mean": torch.zeros(4).double(), "steps": torch.tensor(0), "some": torch.tensor(0)}
    return own(params), own(
        buffers | {"seen": torch.tensor(False), "square": torch.ones(4).double()}
    )


@fdl.StatefulLoss
def loss(
    params: Tree, buffers: Tree, batch: Batch, *, train: bool, key: Tensor | None
) -> tuple[Tensor, tuple[dict[str, Any], Tree]]:
    left, right = params["left"], params["right"]
    prediction = (batch.x @ left["w"] + left["b"]).tanh() @ right["w"] + right["b"]
    square = (prediction - batch.y).square()
    counts = None if batch.mask == () else batch.mask
    weights = torch.ones(len(batch.x)) if counts is None else counts
    n = weights.double().sum()
    value = (square.mean(-1) * weights).sum() / n  # NaN where nothing counts, as many have it
    new = {
        "mean": 0.9 * buffers["mean"] + 0.1 * (batch.x * weights[:, None]).sum(0) / n,
        "square": 0.9 * buffers["square"] + 0.1 * (batch.x**2 * weights[:, None]).sum(0) / n,
        "steps": buffers["steps"] + (n > 0),
        "some": buffers["some"] + 3 * (n > 0),
        "seen": buffers["seen"] | (n > 0),
    }
    found: dict[str, Any] = {"loss": metrics.Mean(value.detach() * n, n)}
    found["error"] = metrics.mean(square, counts)
    logits, labels = prediction.detach(), batch.y.argmax(-1)
    found["matrix"] = metrics.confusion_matrix(logits, labels, counts)
    found["scores"] = metrics.precision_recall_f1(logits, labels, counts)
    found["calibration"] = metrics.calibration_error(logits, labels, counts, bins=3)
    return value, (own(found | {"size": metrics.mean(batch.x.abs(), counts)}), own(new))


OPT = optim.chain(optim.clip_by_global_norm(0.5), optim.adam(0.1))
MODEL = StatefulModel(init, lambda params, buffers, x, **_: (x, buffers))


def start() -> TrainState:
    return TrainState.create(MODEL, OPT, key=random.key(0))


def alone(batches: Batch = BATCHES) -> tuple[TrainState, Tree]:
    return scan(fdl.train_step(loss, OPT), start(), batches)


def check_equal(expected: Tree, got: Tree, rtol: float = 1e-12) -> None:
    got = parallel.gather(got)
    assert tree.diff(expected, got, rtol=rtol, atol=1e-14) == []


def trains(mesh: DeviceMesh) -> None:
    expected, found = alone()
    for spread in (False, True):
        state = start()
        if spread:
            params = parallel.shard(state.params, mesh, {"*.w": 0, "*": None})
            state = state._replace(params=params, opt_state=OPT.init(params))
        for parts in (None, 4):
            step = parallel.train_step(loss, OPT, mesh, microbatches=parts)
            new, means = scan(step, state, parallel.own_rows(BATCHES, mesh))
            check_equal((expected, found), (new, means))
            parallel.check_replicated((parallel.gather(new), means), mesh)  # to the bit
            assert same_keys(state, new)
    compiled = jit(lambda state, batches: scan(step, state, batches), strict=True)
    check_equal((expected, found), compiled(start(), parallel.own_rows(BATCHES, mesh)), 1e-10)


def counts_nothing(mesh: DeviceMesh) -> None:
    """The second process, or the second part of each, or all of them have nothing but padding."""
    half = torch.arange(ROWS) < ROWS // 2
    last_of_each = torch.arange(ROWS) % (ROWS // 2) < ROWS // 4
    for mask, parts in [(half, None), (half, 2), (last_of_each, 4), (half, 4)]:
        padded = BATCHES._replace(mask=mask.expand(STEPS, ROWS))
        # What is counted is the first half of the rows; the mean over no parts is left out.
        expected, found = alone(tree.map(lambda leaf, m=mask: leaf[:, m], BATCHES))
        step = parallel.train_step(loss, OPT, mesh, microbatches=parts)
        check_equal((expected, found), scan(step, start(), parallel.own_rows(padded, mesh)))
    rows = ROWS if dist.get_rank() == 0 else 0  # no rows at all
    some = tree.map(lambda leaf: leaf[:, :rows], BATCHES)
    step = parallel.train_step(loss, OPT, mesh)
    check_equal(alone(), scan(step, start(), some))
    one = tree.map(lambda leaf: leaf[0], some)
    every = fdl.eval_step(loss)(start(), tree.map(lambda leaf: leaf[0], BATCHES))
    check_equal(every, parallel.eval_step(loss, mesh)(start(), one))
    nothing = one._replace(mask=torch.zeros(rows, dtype=torch.bool))
    for parts in (None, 2):
        step = parallel.train_step(loss, OPT, mesh, microbatches=parts)
        new, means = step(start(), nothing)
        assert tree.diff(start().buffers, new.buffers) == []
        assert tree.diff(start().params, new.params) == []  # Adam's first step by gradients of 0
        assert not any(leaf.any() for leaf in tree.leaves(means))


def sixteen_bits(mesh: DeviceMesh) -> None:
    """A sum of gradients times counts would overflow in float16, and round in bfloat16."""

    def steep(params: Tree, batch: Batch, **_: Any) -> tuple[Tensor, Tree]:
        n = torch.tensor(float(len(batch[0])), dtype=torch.float64)
        return (params["w"] * 300).sum(), {"loss": metrics.Mean(n, n)}

    for dtype in (torch.float16, torch.bfloat16):
        state = TrainState.create(
            nn.Model(lambda key, dtype=dtype: {"w": torch.zeros(3, dtype=dtype)}, lambda *_: None),
            optim.sgd(1.0),
            key=random.key(0),
        )
        batch = (torch.zeros(400 + dist.get_rank(), 1), torch.zeros(400 + dist.get_rank()))
        new, _ = parallel.train_step(steep, optim.sgd(1.0), mesh)(state, batch)
        assert new.params["w"].dtype == dtype and (new.params["w"] == -300).all()


def evaluates(mesh: DeviceMesh) -> None:
    mine = tree.map(lambda leaf: leaf[0], parallel.own_rows(BATCHES, mesh))
    every = fdl.eval_step(loss)(start(), tree.map(lambda leaf: leaf[0], BATCHES))
    got = parallel.eval_step(loss, mesh)(start(), mine)
    check_equal(every, got)
    parallel.check_replicated(got, mesh)


def cuts_rows(mesh: DeviceMesh) -> None:
    whole = {"a": torch.arange(8).view(2, 4), "b": torch.arange(8, 16).view(2, 4)}
    got = parallel.own_rows(own(whole), mesh)
    r = dist.get_rank()
    assert tree.diff(tree.map(lambda leaf: leaf[:, 2 * r : 2 * r + 2], whole), got) == []
    assert same_keys(own(whole), got)


def loads(mesh: DeviceMesh) -> None:
    data = {"a": torch.arange(3), "b": -torch.arange(3), "c": {"name": "x", "n": 1}}
    assert tree.diff(data, parallel.load_once(lambda: own(data), mesh)) == []


def compares(mesh: DeviceMesh) -> None:
    parallel.check_replicated(start(), mesh)
    swapped = {"a": torch.tensor(1), "b": torch.tensor(2)}
    if dist.get_rank():
        swapped = {"b": torch.tensor(1), "a": torch.tensor(2)}
    with pytest.raises(ValueError, match=r"(?s)a: .* on rank 0.*b: .* on rank 0"):
        parallel.check_replicated(swapped, mesh)


def spreads(mesh: DeviceMesh) -> None:
    params = start().params
    spread = parallel.shard(params, mesh, {"*.w": 0, "*.b": 0})
    assert same_keys(params, spread) and same_keys(params, parallel.gather(spread))
    check_equal(params, spread, 0)


def saves(mesh: DeviceMesh, folder: Path) -> None:
    state = start()._replace(params=parallel.shard(start().params, mesh, {"*": 0}))
    with Checkpointer(folder / "ordered", group=mesh.get_group()) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        found = checkpoints.restore(like=state)
    assert found is not None
    check_equal(start(), found.state, 0)


OF: dict[str, list[Callable[[DeviceMesh], None]]] = {
    "check_replicated": [compares],
    "eval_step": [evaluates],
    "gather": [spreads],
    "load_once": [loads],
    "own_rows": [cuts_rows],
    "shard": [spreads],
    "train_step": [trains, counts_nothing, sixteen_bits],
}


def main(folder: Path, rank: int, size: int, device: str) -> None:
    assert sorted(OF) == parallel.__all__, "a function without a check"
    mesh = join(folder, rank, size, device)
    for check in dict.fromkeys(check for checks in OF.values() for check in checks):
        check(mesh)
    saves(mesh, folder)
    dist.barrier()
    dist.destroy_process_group()
