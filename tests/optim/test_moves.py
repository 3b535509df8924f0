"""Runs of other libraries that continue here with the losses that they would have had.

The oracle is the original, which goes on beside ours.
"""

import numpy as np
import pytest
import torch

import fdl
from fdl import losses, nn, optim, random, tree
from tests.support.asserts import close
from tests.support.jax import x64

BEFORE, AFTER = 8, 12
X = random.normal(random.key(1), (16, 3), dtype=torch.float64)
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 1.0


def mse(params):
    return ((X @ params["w"] + params["b"] - Y) ** 2).mean()


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str
)
def test_a_torch_run_with_a_tensor_rate_and_a_plateau_goes_on(dtype, rtol):
    """With a float32 rate torch rounds each step's rate over 1 − β₁ᵗ to float32."""
    net = torch.nn.Linear(3, 1).double()
    for name, p in net.named_parameters():
        p.data = random.normal(random.key(len(name)), p.shape, dtype=torch.float64)
    adamw = torch.optim.AdamW(net.parameters(), lr=torch.tensor(2.0, dtype=dtype), weight_decay=0.1)
    options = {"factor": 0.5, "patience": 1, "threshold": 0.05}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(adamw, **options)

    def torch_step():
        adamw.zero_grad()
        loss = torch.nn.functional.mse_loss(net(X), Y)
        loss.backward()
        adamw.step()
        scheduler.step(loss.item())
        return loss.item()

    for _ in range(BEFORE):
        torch_step()
    assert adamw.param_groups[0]["lr"] < 2.0 and scheduler.num_bad_epochs == 1

    own = tree.unflatten_dict(dict(net.named_parameters()))
    inner, state = optim.from_torch(adamw, own)
    params = tree.map(lambda p: p.detach().clone(), own)
    opt = optim.reduce_on_plateau(inner, **options)
    plateau = opt.init(params)._replace(
        inner=state,
        best=torch.tensor(scheduler.best, dtype=torch.float64),
        bad=torch.tensor(scheduler.num_bad_epochs),
        cooldown=torch.tensor(scheduler.cooldown_counter),
    )
    model = nn.linear(3, 1)
    loss = fdl.supervised(model, losses.mse)
    run = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
    run = run._replace(opt_state=plateau)
    step = fdl.train_step(loss, opt)
    for _ in range(AFTER):
        run, metrics = step(run, (X, Y))
        close(metrics["loss"].value, torch.tensor(torch_step(), dtype=torch.float64), rtol)
        close(optim.hyperparams(run.opt_state)["lr"].item(), adamw.param_groups[0]["lr"].item())
    assert adamw.param_groups[0]["lr"] < 0.5
    close(run.params, tree.map(torch.Tensor.detach, own), rtol)


def test_an_optax_run_with_schedule_free_goes_on():
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    jnp = jax.numpy
    with x64():
        theirs = optax.contrib.schedule_free_adamw(0.3, weight_decay=0.1)
        x, y = jnp.asarray(X.numpy()), jnp.asarray(Y.numpy())
        loss = jax.value_and_grad(lambda p: ((x @ p["w"] + p["b"] - y) ** 2).mean())
        there = {"w": jnp.ones((3, 1)), "b": jnp.zeros(1)}
        their_state = theirs.init(there)

        def optax_step():
            nonlocal there, their_state
            value, grads = loss(there)
            updates, their_state = theirs.update(grads, their_state, there)
            there = optax.apply_updates(there, updates)
            return float(value)

        for _ in range(BEFORE):
            optax_step()

        def ours(arrays):
            return {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}

        params = ours(there)
        opt = optim.schedule_free_adamw(0.3, weight_decay=0.1)
        second = ours(optax.tree_utils.tree_get(their_state, "nu"))
        state = continued(opt.init(params), their_state, second, ours(their_state.z))
        for _ in range(AFTER):
            grads, value = torch.func.grad_and_value(mse)(params)
            close(value, torch.tensor(optax_step(), dtype=torch.float64))
            updates, state = opt.update(grads, state, params)
            params = optim.apply_updates(params, updates)
        close(params, ours(there))
        mean = ours(optax.contrib.schedule_free_eval_params(their_state, there))
        close(optim.schedule_free_params(state, params), mean)


def continued(fresh, theirs, second, z):
    """The state of `schedule_free_adamw` with the numbers of optax's."""
    count = torch.tensor(int(theirs.step_count) - 1)
    direction, *between, free = fresh
    direction = direction._replace(
        hyper=direction.hyper._replace(count=count), slots={"exp_avg_sq": second}
    )
    steps = free.steps
    free = free._replace(
        steps=steps._replace(hyper=steps.hyper._replace(count=count.clone()), slots={"z": z}),
        weight_sum=torch.tensor(float(theirs.weight_sum), dtype=torch.float64),
        lr_max=torch.tensor(float(theirs.max_lr), dtype=torch.float64),
        beta=torch.tensor(float(theirs.b1), dtype=torch.float64),
    )
    return (direction, *between, free)
