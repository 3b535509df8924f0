"""`train_step(metrics=)`: what a step reports of itself, against torch."""

import pytest
import torch
from torch.func import vmap

import fdl
from fdl import losses, metrics, nn, optim, parallel, random, scan, tree
from fdl.metrics import Mean
from tests.support.asserts import close, draw
from tests.support.reports import report

NET = nn.sequential(nn.linear(3, 5), nn.tanh, nn.linear(5, 2))
LOSS = fdl.supervised(NET, losses.mse, {"mean": lambda p, y, w: metrics.mean(p, w)})
X, Y = draw(0, 6, 8, 3), draw(1, 6, 8, 2)
RATE = optim.schedules.exponential(0.1, 0.9)


def start(opt, seed=0, dtype=torch.float64):
    params = tree.cast(NET.init(random.key(seed)), dtype)
    return fdl.TrainState.create(NET, opt, key=random.key(seed), params=params)


def train_torch(clip=None):
    """A module of torch with a scheduler: the norms and rates of six steps."""
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
    ).double()
    net.load_state_dict(tree.flatten_dict(start(optim.sgd()).params))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    rows = []
    for x, y in zip(X, Y, strict=True):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        with torch.no_grad():
            weights = torch.nn.utils.get_total_norm([p.detach() for p in net.parameters()])
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip or torch.inf)
        rows.append([norm, weights, scheduler.get_last_lr()[0]])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rows, dtype=torch.float64)


def table(found):
    return torch.stack([found[name].value for name in ("grad_norm", "weight_norm", "lr")], -1)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_norms_and_rates_equal_those_of_torch(clip):
    opt = optim.sgd(RATE, 0.9)
    opt = opt if clip is None else optim.chain(optim.clip_by_global_norm(clip), opt)
    state, found = scan(fdl.train_step(LOSS, opt, metrics=report), start(opt), (X, Y))
    assert list(found) == ["loss", "mean", "grad_norm", "weight_norm", "lr"]
    expected = train_torch(clip)
    close(table(found), expected)
    close(table({name: mean.sum() for name, mean in found.items()}), expected.mean(0))
    plain, without = scan(fdl.train_step(LOSS, opt), start(opt), (X, Y))
    assert tree.diff((plain, without), (state, {n: found[n] for n in without})) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_scale_does_not_count(dtype):
    batch = tree.map(lambda leaf: leaf[0].to(dtype), (X, Y))
    norms = []
    for opt in (optim.sgd(0.1), optim.loss_scale(optim.sgd(0.1), init=2.0**10)):
        step = fdl.train_step(LOSS, opt, metrics=report)
        norms.append(step(start(opt, dtype=dtype), batch)[1]["grad_norm"].value)
    close(norms[1], norms[0], rtol=1e-12 if dtype == torch.float64 else 1e-2)
    close(norms[0], train_torch()[0, 0], rtol=1e-12 if dtype == torch.float64 else 2e-2)


def test_an_overflow_is_reported():
    opt = optim.loss_scale(optim.sgd(0.1), init=2.0**20)
    batch = tree.map(lambda leaf: leaf[0].half(), (X, Y))
    step = fdl.train_step(LOSS, opt, metrics=report)
    assert not step(start(opt, dtype=torch.float16), batch)[1]["grad_norm"].value.isfinite()


def test_gradients_are_those_that_the_optimizer_receives():
    """Those of SAM are taken elsewhere; accumulated ones are one batch's each."""
    opt, seen = optim.sgd(0.1), []
    spy = optim.Optimizer(
        opt.init, lambda grads, *args, **_: (seen.append(grads), opt.update(grads, *args))[1]
    )
    step = fdl.train_step(LOSS, spy, optim.sam(0.5), lambda state, grads: {"norm": keep(grads)})
    given = []

    def keep(grads):
        given.append(grads)
        return optim.global_norm(grads)

    step(start(opt), (X[0], Y[0]))
    assert tree.diff(given, seen) == []
    plain = fdl.train_step(LOSS, opt, metrics=report)(start(opt), (X[0], Y[0]))[1]["grad_norm"]
    assert (optim.global_norm(given[0]) - plain.value).abs() > 1e-3


@pytest.mark.parametrize("parts", [1, 4])
def test_microbatches_report_the_norm_of_the_whole_batch(parts):
    opt = optim.loss_scale(optim.sgd(0.1), init=8.0)
    alone = fdl.train_step(LOSS, opt, metrics=report)(start(opt), (X[0], Y[0]))
    step = parallel.train_step(LOSS, opt, None, microbatches=parts, metrics=both)
    _, found = step(start(opt), (X[0], Y[0]))
    for name, mean in alone[1].items():
        close(found[name], mean, rtol=1e-10)
    assert found["counted"] == Mean(torch.tensor(3.0), torch.tensor(2.0))


def both(state, grads):
    """A mean of one's own stays what it is."""
    return {**report(state, grads), "counted": Mean(torch.tensor(3.0), torch.tensor(2.0))}


def test_a_population_has_the_reports_of_its_members():
    opt = optim.sgd(RATE, 0.9)
    step = fdl.train_step(LOSS, opt, metrics=report)
    members = [start(opt, seed) for seed in range(3)]
    _, found = vmap(step, (0, None))(tree.stack(members), (X[0], Y[0]))
    alone = tree.stack([step(member, (X[0], Y[0]))[1] for member in members])
    close(found, alone)
    assert found["lr"].count.shape == (3,)


@pytest.mark.slow
def test_compiled():
    opt = optim.loss_scale(optim.adam(RATE), init=8.0)
    step = fdl.train_step(LOSS, opt, metrics=report)
    run = lambda state: scan(step, state, (X, Y))  # noqa: E731
    close(fdl.jit(run, strict=True)(start(opt)), run(start(opt)))


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("make", [fdl.train_step, parallel.train_step])
@pytest.mark.parametrize("wrong", [{"accuracy": metrics.accuracy}, ("grad_norm", "lr")])
def test_what_is_not_a_function_is_refused(make, wrong):
    args = (LOSS, optim.sgd(0.1), *([None] if make is parallel.train_step else []))
    with pytest.raises(TypeError, match=r"train_step: metrics must be a function .*supervised"):
        make(*args, metrics=wrong)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        ([], TypeError, "metrics must return a dict of scalars, got a list"),
        (
            {"loss": torch.tensor(1.0)},
            ValueError,
            "metrics returned 'loss', which is a metric of the loss already",
        ),
        ({"g": torch.ones(2)}, TypeError, r"metrics\['g'\] must be a 0-d tensor or a Mean, got"),
        ({"lr": 0.1}, TypeError, r"metrics\['lr'\] must be a 0-d tensor or a Mean, got"),
    ],
)
@pytest.mark.parametrize("microbatches", [None, 2])
def test_what_is_not_a_scalar_is_refused(returned, error, words, microbatches):
    opt = optim.sgd(0.1)
    step = parallel.train_step(
        LOSS, opt, None, microbatches=microbatches, metrics=lambda state, grads: returned
    )
    caller = "parallel.train_step" if microbatches else "^train_step"
    with pytest.raises(error, match=f"{caller}: {words}"):
        step(start(opt), (X[0], Y[0]))
