"""One process of several that train together: see tests/parallel/test_step.py.

`python -m tests.workers.forks train_worker FOLDER SIZE DEVICE` runs all of them; DEVICE is cpu
or cuda.
"""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.func import grad

import fdl
import models
from fdl import TrainState, data, jit, losses, metrics, nn, optim, parallel, random, scan, tree
from tests.support.reports import report
from tests.support.soak import repeats
from tests.training.test_trajectories import RECIPES, images
from train.bench.scaling import all_reduce_bytes, sent_bytes

STEPS = repeats(8, 50)
ROUTES = {"cpu": "one program", "cuda": "CUDA graph"}
EXACT = ["linreg", "linreg-decay", "weight-decay", "softmax", "mlp", "lenet"]


def first_steps(batches):
    return tree.map(lambda leaf: leaf[:STEPS], batches)


def padded(batches, size):
    """A mask, and rows to be skipped, so that the batch divides: the last process has fewer."""
    steps, length = batches.x.shape[:2]
    more = -length % size or size // 2
    more += -(length + more) % size
    mask = torch.ones(steps, length + more, dtype=torch.bool)
    mask[:, length:] = False
    rows = [torch.cat([leaf, leaf[:, :more]], 1) for leaf in (batches.x, batches.y)]
    return data.Batch(*rows, mask)


def join(folder, rank, size, device):
    """The mesh of all processes; on CUDA each has a GPU of its own."""
    store = f"file://{folder}/store-{size}"
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[device]
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    torch.set_num_threads(1)
    return dist.init_device_mesh(device, (size,))


def on(mesh, values):
    """The same values, on the device of this process."""
    return tree.to(values, mesh.device_type)


def prepare(model, opt, mesh):
    state = TrainState.create(model, opt, key=random.key(0, mesh.device_type))
    params = tree.cast(state.params, torch.float64)
    buffers = tree.cast(state.buffers, torch.float64)
    return state._replace(params=params, buffers=buffers, opt_state=opt.init(params))


def trains_as_one_process(mesh):
    """Steps of each recipe that draws nothing, in parts of unequal length, against the whole."""
    for name in EXACT:
        recipe = RECIPES[name]()
        loss = fdl.supervised(recipe.model, recipe.loss)
        start = prepare(recipe.model, recipe.opt, mesh)
        whole = on(mesh, padded(first_steps(recipe.batches), mesh.size()))
        alone, expected = scan(fdl.train_step(loss, recipe.opt, metrics=report), start, whole)
        mine = parallel.own_rows(whole, mesh)
        step = parallel.train_step(loss, recipe.opt, mesh, metrics=report)
        state, found = scan(step, start, mine)
        assert found.keys() == {"loss", "grad_norm", "weight_norm", "lr"}
        parallel.check_replicated((state, found), mesh)
        assert tree.diff(alone, state, rtol=1e-10, atol=1e-12) == [], name
        assert tree.diff(expected, found, rtol=1e-10, atol=1e-12) == [], name
        moved = tree.map(lambda a, b: (a - b).abs().max(), start.params, state.params)
        assert min(tree.leaves(moved)) > 1e-6, name
        scored = parallel.eval_step(loss, mesh)(state, tree.map(lambda leaf: leaf[0], mine))
        every = fdl.eval_step(loss)(state, tree.map(lambda leaf: leaf[0], whole))
        assert tree.diff(every, scored, rtol=1e-10, atol=1e-12) == [], name


def draws_its_own_and_averages_statistics(mesh):
    """Dropout and batch normalisation, against what one process computes part by part."""
    net = nn.sequential(
        nn.linear(6, 8), nn.batch_norm(8), nn.relu, nn.dropout(0.5), nn.linear(8, 3)
    )
    opt = optim.sgd(0.3, momentum=0.9)
    loss = fdl.supervised(net, losses.cross_entropy, {"accuracy": metrics.accuracy})
    size, rows = mesh.size(), 8
    x = random.normal(random.key(1), (5, size * rows, 6), torch.float64)
    y = random.randint(random.key(2), (5, size * rows), 0, 3)
    mask = random.uniform(random.key(3), (5, size * rows)) < 0.8
    batches = on(mesh, data.Batch(x, y, mask))
    start = prepare(net, opt, mesh)
    state, step = start, parallel.train_step(loss, opt, mesh)
    for i in range(5):
        state, found = step(
            state, tree.map(lambda leaf, i=i: leaf[i], parallel.own_rows(batches, mesh))
        )
    parallel.check_replicated(state, mesh)

    params, buffers, opt_state = start.params, start.buffers, start.opt_state
    for i in range(5):
        key, counts, grads, after = random.fold_in(start.key, i), [], [], []
        for rank in range(size):
            part = tree.map(lambda leaf, i=i, r=rank: leaf[i].chunk(size)[r], batches)

            def objective(params, part=part, rank=rank, key=key, buffers=buffers):
                value, aux = loss(params, buffers, part, train=True, key=random.fold_in(key, rank))
                return value, aux

            g, (found_there, new) = grad(objective, has_aux=True)(params)
            counts.append(found_there["loss"].count)
            grads.append(g)
            after.append(new)
        share = torch.stack(counts) / sum(counts)

        def mean(*leaves, share=share):
            if not leaves[0].is_floating_point():
                return leaves[0]
            return sum(s * leaf for s, leaf in zip(share, leaves, strict=True))

        updates, opt_state = opt.update(tree.map(mean, *grads), opt_state, params)
        params, buffers = optim.apply_updates(params, updates), tree.map(mean, *after)
    assert tree.diff(params, state.params, rtol=1e-10, atol=1e-12) == []
    assert tree.diff(buffers, state.buffers, rtol=1e-10, atol=1e-12) == []
    assert found["accuracy"].count == mask[4].sum()


def in_parts_every_number_of_processes_is_the_same_run(mesh):
    """Dropout and batch normalisation in float32: on one process and on several, bit for bit."""
    net = nn.sequential(
        nn.linear(6, 8), nn.batch_norm(8), nn.relu, nn.dropout(0.5), nn.linear(8, 3)
    )
    opt = optim.adam(0.1)
    loss = fdl.supervised(net, losses.cross_entropy, {"accuracy": metrics.accuracy})
    x = random.normal(random.key(1), (20, 32, 6))
    y = random.randint(random.key(2), (20, 32), 0, 3)
    mask = random.uniform(random.key(3), (20, 32)) < 0.8
    whole = on(mesh, data.Batch(x, y, mask))
    mine = parallel.own_rows(whole, mesh)
    start = TrainState.create(net, opt, key=random.key(0, mesh.device_type))
    single = parallel.train_step(loss, opt, None, microbatches=8, metrics=report)
    alone, expected = scan(single, start, whole)
    step = parallel.train_step(loss, opt, mesh, microbatches=8, metrics=report)
    assert tree.diff((alone, expected), scan(step, start, mine), rtol=0, atol=0) == []
    by_rank, _ = scan(parallel.train_step(loss, opt, mesh), start, mine)
    assert tree.diff(alone.params, by_rank.params, rtol=1e-3, atol=1e-3) != []
    if mesh.size() == 2:
        compiled = jit(lambda state, batches: scan(step, state, batches), strict=True)
        once = jit(lambda state, batches: scan(single, state, batches), strict=True)
        assert tree.diff(once(start, whole), compiled(start, mine), rtol=0, atol=0) == []


def recipes_that_draw_or_take_statistics_are_the_same_in_parts(mesh):
    """The rest of the recipes: steps in float64, on one process and on several."""
    dropout = RECIPES["dropout"]()
    found = {
        "dropout": (dropout.model, dropout.opt, dropout.batches),
        "lenet-bn": (models.lenet_bn(), optim.sgd(0.9), images(16)),
    }
    for name, (model, opt, batches) in found.items():
        loss = fdl.supervised(model, losses.cross_entropy)
        begin, batches = prepare(model, opt, mesh), on(mesh, first_steps(batches))
        alone = scan(parallel.train_step(loss, opt, None, microbatches=4), begin, batches)
        step = parallel.train_step(loss, opt, mesh, microbatches=4)
        together = scan(step, begin, parallel.own_rows(batches, mesh))
        assert tree.diff(alone, together, rtol=1e-10, atol=1e-12) == [], name
        moved = tree.map(lambda a, b: (a - b).abs().max(), begin.params, alone[0].params)
        assert max(tree.leaves(moved)) > 1e-3, name


def in_parts_the_gradient_is_that_of_the_whole(mesh):
    """What draws nothing does not care how it is cut."""
    recipe = RECIPES["mlp"]()
    loss = fdl.supervised(recipe.model, recipe.loss)
    start = prepare(recipe.model, recipe.opt, mesh)
    whole = on(mesh, padded(first_steps(recipe.batches), 8))
    alone, expected = scan(fdl.train_step(loss, recipe.opt), start, whole)
    mine = parallel.own_rows(whole, mesh)
    found = scan(parallel.train_step(loss, recipe.opt, mesh, microbatches=8), start, mine)
    assert tree.diff((alone, expected), found, rtol=1e-10, atol=1e-12) == []


def an_epoch_is_one_program(mesh):
    model, opt = models.softmax_regression(), optim.sgd(0.1, momentum=0.9)
    step = parallel.train_step(fdl.supervised(model, losses.cross_entropy), opt, mesh)
    sample = on(mesh, data.fashion_mnist_sample())
    indices = data.epoch_indices(random.key(1, mesh.device_type), 500, 64)  # a short last batch
    rows = parallel.own_rows(indices, mesh)

    def epoch(state, images, rows):
        return scan(lambda s, row: step(s, data.to_float(data.batch(images, row))), state, rows)

    start = TrainState.create(model, opt, key=random.key(0, mesh.device_type))
    expected = epoch(start, sample, rows)
    compiled = jit(epoch, strict=True)
    assert tree.diff(expected, compiled(start, sample, rows), rtol=1e-5, atol=1e-6) == []
    (report,) = compiled.report()
    assert report.route == ROUTES[mesh.device_type] and report.fallbacks == ()


def sends_each_gradient_once(mesh):
    sent = []

    def counting(tensor, *args, real=collectives.all_reduce):
        sent.append((tensor.dtype, tensor.numel() * tensor.element_size()))
        return real(tensor, *args)

    model, opt = models.mlp(), optim.sgd(0.1)
    step = parallel.train_step(fdl.supervised(model, losses.cross_entropy), opt, mesh)
    state = TrainState.create(model, opt, key=random.key(0, mesh.device_type))
    collectives.all_reduce = counting
    step(state, on(mesh, (torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64))))
    gradients = 4 * tree.size(state.params)
    # The value; total and count of the metric, and how many processes count anything.
    assert dict(sent) == {torch.float32: gradients + 4, torch.float64: 24}


def sends_what_theory_says(mesh):
    """By the kernel's own count of the bytes that left this process."""
    model, opt = models.mlp(), optim.sgd(0.1)
    step = parallel.train_step(fdl.supervised(model, losses.cross_entropy), opt, mesh)
    state = TrainState.create(model, opt, key=random.key(0, mesh.device_type))
    batch = (torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64))
    state, _ = step(state, batch)  # connects
    dist.barrier()  # nothing is under way
    before = sent_bytes()
    for _ in range(5):
        state, _ = step(state, batch)
    dist.barrier()
    expected = all_reduce_bytes(mesh.size(), 4 * (tree.size(state.params) + 1))
    sent = (sent_bytes() - before) / 5
    assert sent == pytest.approx(expected, rel=0.005), (sent, expected)


def loads_once(mesh, folder):
    """One of them reads; all of them have it, in the same memory."""
    tensors = {"x": torch.arange(2.0**16).view(256, 256), "y": (torch.tensor([True, False]), [])}
    tensors |= {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0, 3)}

    def load():
        (folder / f"loaded-{mesh.size()}-{dist.get_rank()}").touch()
        return tensors | {"name": "some"}

    found = parallel.load_once(load, mesh)
    assert found["name"] == "some" and tree.diff(found, tensors | {"name": "some"}) == []
    assert [p.name for p in folder.glob(f"loaded-{mesh.size()}-*")] == [f"loaded-{mesh.size()}-0"]
    dist.barrier()  # the first has taken the names away
    if sys.platform == "linux":
        mapped = [
            line
            for line in Path("/proc/self/maps").read_text().splitlines()
            if re.search(r"/fdl-\w{8}/", line)  # a temporary folder
        ]
        assert len(mapped) == 3 and all("(deleted)" in line for line in mapped)
        places: list = [None] * mesh.size()
        dist.all_gather_object(places, {line.split()[4] for line in mapped})  # inodes
        assert all(place == places[0] for place in places)
    found["x"].zero_()  # is seen by nobody else
    dist.barrier()
    assert found["x"].sum() == 0
    error, text = (FileNotFoundError, "nowhere") if dist.get_rank() == 0 else (OSError, "process 0")
    with pytest.raises(error, match=text):
        parallel.load_once(lambda: Path("nowhere").read_bytes(), mesh)


def refuses(mesh):
    model = nn.linear(2, 1)
    loss = fdl.supervised(model, losses.mse)
    state = TrainState.create(model, optim.sgd(0.1), key=random.key(dist.get_rank()))
    with pytest.raises(ValueError, match=r"weight: float32\[1, 2\] with SHA-256 \w+ on rank 0"):
        parallel.check_replicated(state, mesh)
    with pytest.raises(ValueError, match=r"lr: 0 on rank 0, 1 on rank 1"):
        parallel.check_replicated({"lr": dist.get_rank(), "seed": 3}, mesh)
    with pytest.raises(
        ValueError, match=r"by the \d processes, got\n  index: \[3, 9\]\n  mask: \[3, 7\]$"
    ):
        parallel.own_rows(data.Indices(torch.zeros(3, 9), torch.zeros(3, 7)), mesh)
    with pytest.raises(TypeError, match=r"mesh must be a DeviceMesh.*got ProcessGroup"):
        parallel.train_step(loss, optim.sgd(0.1), mesh.get_group())
    for parts in (0, 3, 5, 6):
        with pytest.raises(ValueError, match=rf"a power of two times the 2 processes, got {parts}"):
            parallel.train_step(loss, optim.sgd(0.1), mesh, microbatches=parts)
    step = parallel.train_step(loss, optim.sgd(0.1), mesh, microbatches=4)
    with pytest.raises(
        ValueError, match=r"the 2 microbatches of a process, got\n  0: \[3, 2\]\n  1: \[3, 1\]$"
    ):
        step(state, (torch.ones(3, 2), torch.ones(3, 1)))
    square = dist.init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"one dimension, got \[1, \d\]"):
        parallel.train_step(loss, optim.sgd(0.1), square)
    parallel.train_step(loss, optim.sgd(0.1), square["b"])
    batch = (torch.ones(2, 2), torch.ones(2, 1))
    line_search = optim.lbfgs(1.0, line_search_fn="strong_wolfe")
    state = TrainState.create(model, line_search, key=random.key(0))
    with pytest.raises(NotImplementedError, match="the optimizer evaluates the loss itself"):
        parallel.train_step(loss, line_search, mesh)(state, batch)
    state = TrainState.create(model, optim.sgd(0.1), key=random.key(0))
    with pytest.raises(KeyError, match=r"must have a metric 'loss'.*got \['other'\]"):
        parallel.train_step(
            lambda params, batch, **_: (params["weight"].sum(), {"other": state.step}),
            optim.sgd(0.1),
            mesh,
        )(state, batch)


def main(folder: Path, rank: int, size: int, device: str) -> None:
    mesh = join(folder, rank, size, device)
    checks = [
        trains_as_one_process,
        recipes_that_draw_or_take_statistics_are_the_same_in_parts,
        in_parts_every_number_of_processes_is_the_same_run,
    ]
    if sys.platform == "linux" and device == "cpu":
        checks.append(sends_what_theory_says)
    if size == 2 or device == "cuda":
        checks += [
            in_parts_the_gradient_is_that_of_the_whole,
            draws_its_own_and_averages_statistics,
            sends_each_gradient_once,
            an_epoch_is_one_program,
        ]
    if size == 2 and device == "cpu":
        checks += [partial(loads_once, folder=folder), refuses]
    for check in checks:
        check(mesh)
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"parallel\.own_rows: no process group is initialised"):
        parallel.own_rows(torch.zeros(1, size), mesh)
