"""One process of several that share out a state: see tests/parallel/test_step.py.

`python -m tests.workers.forks shard_worker FOLDER SIZE DEVICE` runs all of them; DEVICE is cpu
or cuda.
"""

from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fdl
from fdl import TrainState, data, jit, losses, metrics, nn, optim, parallel, random, scan, tree
from fdl.checkpointing import Checkpointer, restore
from tests.support.optimizers import CASES, default_dtype, start
from tests.support.reports import report
from tests.support.soak import repeats
from tests.training.test_trajectories import RECIPES
from tests.workers.train_worker import EXACT, ROUTES, first_steps, join, on, padded, prepare

ROWS = {"*.weight": 0, "weight": 0, "*": None}
EVERY = {"*": 0}


def shared_out(state, opt, mesh, rules):
    """The same state with its parameters, and what the optimizer keeps of them, spread."""
    found = tree.flatten_dict(state.params)
    rules = {g: dim for g, dim in rules.items() if any(fnmatchcase(path, g) for path in found)}
    params = parallel.shard(state.params, mesh, rules)
    return state._replace(params=params, opt_state=opt.init(params))


def equal(one, other, rtol=1e-10, atol=1e-12):
    assert tree.diff(one, parallel.gather(other), rtol=rtol, atol=atol) == []


def trains_as_when_it_is_whole(mesh):
    """Steps of each recipe that draws nothing: sharded by rows, and all of it, against whole."""
    for name in EXACT:
        recipe = RECIPES[name]()
        loss = fdl.supervised(recipe.model, recipe.loss)
        begin = prepare(recipe.model, recipe.opt, mesh)
        batches = padded(first_steps(recipe.batches), mesh.size())
        mine = parallel.own_rows(on(mesh, batches), mesh)
        step = parallel.train_step(loss, recipe.opt, mesh, metrics=report)
        expected, history = scan(step, begin, mine)
        for rules in (ROWS, EVERY):
            spread = shared_out(begin, recipe.opt, mesh, rules)
            found, told = scan(step, spread, mine)
            equal(expected, found)
            equal(history, told)
            for before, after in zip(tree.leaves(spread), tree.leaves(found), strict=True):
                assert type(before) is type(after)
                assert not isinstance(before, DTensor) or before.placements == after.placements
        scored = parallel.eval_step(loss, mesh)(found, tree.map(lambda leaf: leaf[0], mine))
        whole = parallel.eval_step(loss, mesh)(expected, tree.map(lambda leaf: leaf[0], mine))
        equal(whole, scored)


def every_optimizer_updates_shards(mesh):
    """All of torch's configurations, and what has no twin there; norms go over all processes."""

    def loss(params, batch, **_):
        x, _ = batch
        wave = sum(((leaf - 0.3) * x.mean()).sin().pow(2).sum() for leaf in tree.leaves(params))
        count = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        return wave, {"loss": metrics.Mean(wave.detach() * count, count)}

    more = {
        "global norm": optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.1)),
        "adaptive clip": optim.chain(optim.adaptive_grad_clip(0.1), optim.sgd(0.1)),
        "noise": optim.chain(optim.add_noise(random.key(3), eta=0.1), optim.sgd(0.1)),
        "centralize": optim.chain(optim.centralize(), optim.sgd(0.1)),
        "finite": optim.apply_if_finite(optim.adam(0.1)),
        "accumulate": optim.accumulate(optim.adam(0.1), 2),
        "lookahead": optim.lookahead(optim.sgd(0.1)),
        "schedule free": optim.schedule_free_adamw(0.1),
        "loss scale": optim.loss_scale(optim.sgd(0.1)),
        "plateau": optim.reduce_on_plateau(optim.sgd(0.1), patience=1),
        "schedule": optim.adam(optim.schedules.cosine_annealing(0.1, 10)),
        "frozen": optim.freeze(optim.adam(0.1), "nested.kernel"),
        **{name: getattr(optim, name)(0.1) for name in ("lamb", "lars", "lion", "adan")},
    }
    opts = {case.id: (case.ours(), case.shapes) for case in CASES}
    opts |= {name: (opt, None) for name, opt in more.items()}
    x = random.normal(random.key(5), (4, 2 * mesh.size(), 3), torch.float64)
    mine = parallel.own_rows(on(mesh, (x, x)), mesh)
    with default_dtype(torch.float64):
        for name, (opt, shapes) in opts.items():
            params = on(mesh, start(shapes=shapes))
            key, none = on(mesh, (random.key(0), torch.zeros((), dtype=torch.int64)))
            begin = TrainState(params, {}, opt.init(params), key, none)
            step = parallel.train_step(loss, opt, mesh)
            rules = {"scalar": None, "*": 0} if "scalar" in params else {"*": 0}
            spread = shared_out(begin, opt, mesh, rules)
            for i in range(repeats(2, 4)):
                batch = tree.map(lambda leaf, i=i: leaf[i], mine)
                begin, _ = step(begin, batch)
                spread, _ = step(spread, batch)
            atol = 1e-3 if name.startswith("muon") else 1e-11  # which computes in bfloat16
            lines = tree.diff(begin, parallel.gather(spread), rtol=1e-9, atol=atol)
            assert lines == [], f"{name}: {lines}"


def keeps_a_part_only(mesh):
    """What stays between steps, in bytes: 1/N of what is spread, rounded up to whole rows."""
    model, opt = nn.linear(64, 10 * mesh.size()), optim.adam(0.1)
    state = TrainState.create(model, opt, key=random.key(0, mesh.device_type))
    spread = shared_out(state, opt, mesh, EVERY)

    def kept(state):
        parts = [x.to_local() if isinstance(x, DTensor) else x for x in tree.leaves(state)]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in parts)  # no views of the whole
        return sum(part.nbytes for part in parts)

    assert kept(spread.params) == kept(state.params) / mesh.size()
    assert kept(spread) <= kept(state) / mesh.size() + 100  # key, counts and rates are everywhere


def in_parts_it_is_the_same_run_to_the_bit(mesh):
    net = nn.sequential(
        nn.linear(6, 8), nn.batch_norm(8), nn.relu, nn.dropout(0.5), nn.linear(8, 3)
    )
    opt = optim.sgd(0.1, momentum=0.9)
    loss = fdl.supervised(net, losses.cross_entropy, {"accuracy": metrics.accuracy})
    x = random.normal(random.key(1), (10, 32, 6))
    y = random.randint(random.key(2), (10, 32), 0, 3)
    x, y = on(mesh, (x, y))
    begin = TrainState.create(net, opt, key=random.key(0, mesh.device_type))
    alone = scan(parallel.train_step(loss, opt, None, microbatches=8), begin, (x, y))
    step = parallel.train_step(loss, opt, mesh, microbatches=8)
    found = scan(step, shared_out(begin, opt, mesh, ROWS), parallel.own_rows((x, y), mesh))
    equal(alone, found, rtol=0, atol=0)


def an_epoch_is_one_program(mesh):
    model = nn.sequential(nn.flatten(), nn.linear(784, 30), nn.relu, nn.linear(30, 10))
    opt = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(1e-3))
    step = parallel.train_step(fdl.supervised(model, losses.cross_entropy), opt, mesh)
    images = on(mesh, data.fashion_mnist_sample())
    rows = data.epoch_indices(random.key(1, mesh.device_type), 500, 64)
    rows = parallel.own_rows(rows, mesh)

    def epoch(state, rows):
        return scan(lambda s, row: step(s, data.to_float(data.batch(images, row))), state, rows)

    begin = TrainState.create(model, opt, key=random.key(0, mesh.device_type))
    spread = shared_out(begin, opt, mesh, ROWS)
    expected = epoch(begin, rows)
    compiled = jit(epoch, strict=True)
    found = compiled(spread, rows)
    equal(expected, found, rtol=1e-4, atol=1e-6)
    (report,) = compiled.report()
    assert report.route == ROUTES[mesh.device_type] and report.fallbacks == ()
    compiled(found[0], rows)
    assert len(compiled.report()) == 1  # of the same form
    donating = jit(epoch, strict=True, donate_argnums=0)
    after = tree.map(torch.clone, found[0])
    one, other = compiled(found[0], rows), donating(after, rows)
    equal(parallel.gather(one), other, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="donated"):
        after.params["1"]["weight"].to_local().sum()


def refuses(mesh):
    params = {"fc": {"weight": torch.ones(4, 2), "bias": torch.ones(4)}, "scale": torch.ones(())}
    for rules, message in [
        ({"*weight": 0}, r"fc\.bias: no rule matches; add.*\n.*scale: no rule"),
        ({"*": 0}, r"scale: has 0 dimensions, but '\*' shards dimension 0"),
        ({"fc.*": 1, "*": None}, r"fc\.bias: has 1 dimensions, but 'fc\.\*' shards dimension 1"),
        ({"wieght": 0, "*": None}, r"wieght: this rule matches no leaf"),
    ]:
        with pytest.raises(ValueError, match=message):
            parallel.shard(params, mesh, rules)
        with pytest.raises(ValueError, match=message):
            parallel.shard(params, None, rules)
    rules = {"fc.weight": 1, "fc.*": 0, "*": None}
    spread = parallel.shard(params, mesh, rules)
    assert spread["fc"]["weight"].placements == (Shard(1),)
    assert spread["fc"]["bias"].placements == (Shard(0),) and type(spread["scale"]) is torch.Tensor
    equal(params, spread, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"fc\.weight: expected a plain tensor, got DTensor"):
        parallel.shard(spread, mesh, rules)
    leaf = spread["fc"]["weight"]
    with pytest.raises(TypeError, match=r"xs must not be sharded, got DTensors at w;"):
        scan(lambda carry, x: (carry, ()), torch.ones(()), {"w": leaf})
    for run in (lambda f: f(leaf), lambda f: jit(f)(leaf)):
        with pytest.raises(ValueError, match=r"placements .* the carry: expected \(Shard"):
            run(lambda w: scan(lambda w, _: (w.redistribute(mesh, [Shard(0)]), ()), w, length=3))
        with pytest.raises(TypeError, match="y must not be sharded"):
            run(lambda w: scan(lambda w, _: (w, {"w": w}), w, length=3))
    with pytest.raises(NotImplementedError, match=r"DTensor of shape \[4, 2\] requires grad"):
        jit(lambda w: w * 2)(leaf.detach().requires_grad_())
    model, opt = nn.linear(2, 4), optim.sgd(0.1)
    loss = fdl.supervised(model, losses.mse)
    state = TrainState.create(model, opt, key=random.key(0))
    state = shared_out(state, opt, mesh, EVERY)
    batch = (torch.ones(2, 2), torch.ones(2, 4))
    listed = r"for None, .* both:\n  params\.weight: .*\n  params\.bias: \S"
    with pytest.raises(ValueError, match=listed):
        parallel.train_step(loss, opt, None, microbatches=2)(state, batch)


def is_saved_for_any_number_of_processes(mesh, folder):
    """On 4, 2 and 1, all written, the last one read by each: the same to the bit."""
    state = on(mesh, whole_state())
    spread = shared_out(state, ADAM, mesh, EVERY)

    def distribute(leaf, like):
        spread = isinstance(like, DTensor)
        return distribute_tensor(leaf, mesh, like.placements) if spread else leaf

    opt_state = tree.map(distribute, state.opt_state, spread.opt_state)
    spread = spread._replace(opt_state=opt_state)
    equal(state, spread, rtol=0, atol=0)
    with Checkpointer(folder, group=mesh.get_group()) as checkpointer:
        if checkpointer.latest() is not None:
            found = checkpointer.restore(like=spread)
            equal(state._replace(step=found.state.step), found.state, rtol=0, atol=0)
            for leaf, like in zip(tree.leaves(found.state), tree.leaves(spread), strict=True):
                assert type(leaf) is type(like)
                assert not isinstance(like, DTensor) or leaf.placements == like.placements
        checkpointer.save(spread._replace(step=torch.tensor(mesh.size())))
    equal(state._replace(step=torch.tensor(mesh.size())), restore(folder).state, rtol=0, atol=0)


ADAM = optim.adam(1e-3)


def whole_state():
    """10 and 6 rows do not divide by 4; nor do 3, of which the last process has none."""
    model = nn.sequential(nn.linear(7, 10), nn.relu, nn.linear(10, 6), nn.relu, nn.linear(6, 3))
    state = TrainState.create(model, ADAM, key=random.key(0))
    slots = tree.map(lambda x: x + 1 if x.is_floating_point() else x, state.opt_state)
    return state._replace(opt_state=slots)


def main(folder: Path, rank: int, size: int, device: str) -> None:
    mesh = join(folder, rank, size, device)
    checks = [trains_as_when_it_is_whole]
    if size == 2 or device == "cuda":
        checks += [
            every_optimizer_updates_shards,
            keeps_a_part_only,
            in_parts_it_is_the_same_run_to_the_bit,
            an_epoch_is_one_program,
        ]
    if size == 2 and device == "cpu":
        checks.append(refuses)
    for check in [*checks, partial(is_saved_for_any_number_of_processes, folder=folder / "saved")]:
        check(mesh)
    dist.barrier()
    dist.destroy_process_group()
