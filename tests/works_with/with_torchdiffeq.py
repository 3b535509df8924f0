"""Train through an adaptive solver: its functions want the gradients of `torch.autograd`."""

import torch
from torchdiffeq import odeint

import fdl
from fdl import losses, nn, optim, random, transforms

field, opt = nn.sequential(nn.linear(2, 8), nn.tanh, nn.linear(8, 2)), optim.adam(0.01)
times, y0, target = torch.linspace(0, 1, 11), torch.ones(5, 2), torch.zeros(5, 2)


# Recipe
def dopri5(params, y, **_):
    return odeint(lambda t, y: field.apply(params, y), y, times, method="dopri5")[-1]


loss = fdl.supervised(nn.Model(field.init, dopri5), losses.mse)
step = fdl.train_step(loss, opt, grad_fn=transforms.autograd_grad_and_value)
state = fdl.TrainState.create(field, opt, key=random.key(0))
later, metrics = step(state, (y0, target))


# Check: fixed steps of rk4 by `scan` give the same, and compile
def rk4(params, y, **_):
    def advance(y, h):
        a = field.apply(params, y)
        b = field.apply(params, y + h / 2 * a)
        c = field.apply(params, y + h / 2 * b)
        d = field.apply(params, y + h * c)
        return y + h / 6 * (a + 2 * b + 2 * c + d), ()

    return fdl.scan(advance, y, times.diff())[0]


loss = fdl.supervised(nn.Model(field.init, rk4), losses.mse)
compiled = fdl.jit(fdl.train_step(loss, opt))
same, expected = compiled(state, (y0, target))
torch.testing.assert_close(metrics["loss"].value, expected["loss"].value, atol=1e-6, rtol=0)
