"""Adaptive steps by torchdiffeq, fixed ones in a program of their own by `scan`."""

import torch
from torchdiffeq import odeint

import fdl
from fdl import losses, nn, optim, random, transforms

field, opt = nn.sequential(nn.linear(2, 8), nn.tanh, nn.linear(8, 2)), optim.adam(0.01)
times, y0, target = torch.linspace(0, 1, 11), torch.ones(5, 2), torch.zeros(5, 2)


# Recipe
def dopri5(params, y0, **_):
    return odeint(lambda t, y: field.apply(params, y), y0, times, method="dopri5")[-1]


model = nn.Model(field.init, dopri5)
grad_fn = transforms.autograd_grad_and_value
step = fdl.train_step(fdl.supervised(model, losses.mse), opt, grad_fn=grad_fn)
state, metrics = step(fdl.TrainState.create(model, opt, key=random.key(0)), (y0, target))


def rk4(params, y, **_):
    def advance(y, h):
        a = field.apply(params, y)
        b = field.apply(params, y + h / 2 * a)
        c = field.apply(params, y + h / 2 * b)
        d = field.apply(params, y + h * c)
        return y + h / 6 * (a + 2 * b + 2 * c + d), ()

    return fdl.scan(advance, y, times.diff())[0]


model = nn.Model(field.init, rk4)
compiled = fdl.jit(fdl.train_step(fdl.supervised(model, losses.mse), opt))
same, also = compiled(fdl.TrainState.create(model, opt, key=random.key(0)), (y0, target))

# Check
torch.testing.assert_close(metrics["loss"].value, also["loss"].value, atol=1e-6, rtol=0)
