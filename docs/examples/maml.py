"""MAML on sine curves (Finn et al., 2017, section 5.1): `python docs/examples/maml.py`.

A task is a sine curve of some amplitude and phase, known at K points. Training looks for initial
parameters from which *one gradient step* on those points fits the whole curve. The baseline, with
the same network and data, learns the mean of all curves and is fine-tuned in the same way.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import grad, vmap

import fdl
from fdl import losses, metrics, nn, optim, random, tree

ALPHA = 0.01  # step size of the inner gradient step
TASKS = 25  # in a meta-batch

net = nn.sequential(nn.linear(1, 40), nn.relu, nn.linear(40, 40), nn.relu, nn.linear(40, 1))


def draw_task(key: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Points `x`, `y` `[points, 1]` of y = a · sin(x − φ), a ~ U[0.1, 5], φ ~ U[0, π]."""
    k_amplitude, k_phase, k_x = random.split(key, 3)
    amplitude = random.uniform(k_amplitude, (), minval=0.1, maxval=5.0)
    phase = random.uniform(k_phase, (), minval=0.0, maxval=torch.pi)
    x = random.uniform(k_x, (points, 1), minval=-5.0, maxval=5.0)
    return x, amplitude * torch.sin(x - phase)


def loss(params, x, y):
    """Mean squared error."""
    return losses.mse(net.apply(params, x), y)


def adapt(params, x, y):
    """One gradient step on the K points of a task."""
    return tree.map(lambda p, g: p - ALPHA * g, params, grad(loss)(params, x, y))


def maml_loss(params, batch, *, train, key, shots):
    """Mean over tasks of the loss on K new points, after a step on K others."""

    def of_task(key):
        x, y = draw_task(key, 2 * shots)
        return loss(adapt(params, x[:shots], y[:shots]), x[shots:], y[shots:])

    value = vmap(of_task)(random.split(key, TASKS)).mean()
    return value, {"loss": metrics.mean(value.detach()[None])}


def pretraining_loss(params, batch, *, train, key, shots):
    """Mean over tasks of the loss on 2K points, without adapting."""
    x, y = vmap(partial(draw_task, points=2 * shots))(random.split(key, TASKS))
    value = loss(params, x.flatten(0, 1), y.flatten(0, 1))
    return value, {"loss": metrics.mean(value.detach()[None])}


def train(objective, shots, steps, seed=0):
    """Adam on an objective that draws its own tasks, many steps as one program."""
    opt = optim.adam(1e-3)
    state = fdl.TrainState.create(net, opt, key=random.key(seed))
    step = fdl.train_step(partial(objective, shots=shots), opt)
    at_once = min(steps, 1000)
    many = fdl.jit(
        lambda state: fdl.scan(lambda state, _: step(state, ()), state, length=at_once),
        donate_argnums=0,
    )
    for _ in range(steps // at_once):
        state, found = many(state)
    print(f"{objective.__name__}, {shots} shots: {found['loss'].sum().value:.3f}", flush=True)
    return state.params


def adaptation(params, shots, key, steps=10, tasks=600):
    """Mean squared error on 100 points of each new task after 0, 1, … gradient steps on K."""

    def of_task(key):
        x, y = draw_task(key, shots + 100)
        now, found = params, []
        for _ in range(steps + 1):
            found.append(loss(now, x[shots:], y[shots:]))
            now = adapt(now, x[:shots], y[:shots])
        return torch.stack(found)

    return vmap(of_task)(random.split(key, tasks))  # [tasks, steps + 1]


def plot(learned, curves, path):
    """Draw error against steps, and the curves that a network fits to one task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, *right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for (name, shots), curve in curves.items():
        style = {"marker": "o" if shots == 5 else "s", "ls": "-" if name == "MAML" else ":"}
        left.plot(curve.mean(0), label=f"{name}, {shots} shots", **style)
    left.set(xlabel="gradient steps", ylabel="mean squared error", ylim=(0, None))
    left.set_title("600 new tasks")
    left.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.32))

    x, y = draw_task(random.key(7), 405)
    order = x[5:, 0].argsort()
    for panel, name in zip(right, ("MAML", "pretrained"), strict=True):
        panel.plot(x[5:][order], y[5:][order], "k", lw=1, label="the task")
        panel.plot(x[:5], y[:5], "k^", label="5 points given")
        now = learned[name, 5]
        for step in range(11):
            if step in (0, 1, 10):
                panel.plot(x[5:][order], net.apply(now, x[5:][order]), label=f"{step} steps")
            now = adapt(now, x[:5], y[:5])
        panel.set(title=f"{name}, one task", xlabel="x")
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main(steps: int, path: Path) -> dict[tuple[str, int], Tensor]:
    """Train both ways for 5 and 10 shots, print the errors and draw them."""
    objectives = {"MAML": maml_loss, "pretrained": pretraining_loss}
    ways = [(name, shots) for shots in (5, 10) for name in objectives]
    learned = {(name, shots): train(objectives[name], shots, steps) for name, shots in ways}
    curves = {way: adaptation(learned[way], way[1], random.key(100)) for way in ways}
    for (name, shots), curve in curves.items():
        errors = [f"{curve[:, i].mean():.2f}" for i in (0, 1, 5, 10)]
        spread = 1.96 * curve[:, 1].std() / len(curve) ** 0.5
        print(f"| {name} | {shots} | {' | '.join(errors)} | ± {spread:.2f} |")
    plot(learned, curves, path)
    return curves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15_000, help="meta-steps; at least 1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "maml.png")
    args = parser.parse_args()
    main(args.steps, args.out)
