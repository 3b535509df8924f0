"""The peers in JAX: a jitted step with optax in a Python loop, and `lax.scan` over the epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from train.bench.runner import Loop, Runner
from train.bench.task import Array, Task

__all__ = ["Scan", "Step"]

Params = dict[str, jax.Array]


class Carry(NamedTuple):
    """The values that a step changes; donated."""

    params: Params
    opt_state: Any
    steps: jax.Array  # done, int32 []


def dense(params: Params, name: str, x: jax.Array) -> jax.Array:
    """Apply a linear layer whose weight is `[out, in]`."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def conv(params: Params, name: str, x: jax.Array) -> jax.Array:
    """Convolve `NCHW` with `OIHW`, without padding."""
    y = lax.conv_general_dilated(
        x, params[f"{name}.weight"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return y + params[f"{name}.bias"][:, None, None]


def max_pool(x: jax.Array) -> jax.Array:
    """Take the maximum of each 2 × 2."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def dropout(key: jax.Array, rate: float, x: jax.Array) -> jax.Array:
    """Drop what fdl drops from this key."""
    return jnp.where(jax.random.uniform(key, x.shape) >= rate, x / (1 - rate), 0.0)


def forward(task: Task, params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    """Apply the model of a task in training."""
    flat = x.reshape(len(x), -1)
    match task.model:
        case "linreg":
            return x @ params["weight"].T + params["bias"]
        case "softmax":
            return dense(params, "1", flat)
        case "mlp":
            return dense(params, "output", jax.nn.relu(dense(params, "hidden0", flat)))
        case "dropout":
            # The dropouts are children 3 and 6 of fdl's `sequential`: child i folds in i.
            h = jax.nn.relu(dense(params, "hidden0", flat))
            h = dropout(jax.random.fold_in(key, 3), task.rates[0], h)
            h = jax.nn.relu(dense(params, "hidden1", h))
            h = dropout(jax.random.fold_in(key, 6), task.rates[1], h)
            return dense(params, "output", h)
        case "lenet":
            h = max_pool(jax.nn.sigmoid(conv(params, "conv.0", x)))
            h = max_pool(jax.nn.sigmoid(conv(params, "conv.3", h))).reshape(len(x), -1)
            h = jax.nn.sigmoid(dense(params, "fc.0", h))
            h = jax.nn.sigmoid(dense(params, "fc.2", h))
            return dense(params, "fc.4", h)
    raise ValueError(f"no model for {task.model!r}")


def optimizer(task: Task) -> optax.GradientTransformation:
    """Make the optimizer equal to torch's: the weight decay of SGD goes into the momentum."""
    if task.adam:
        return optax.adam(task.lr)
    decay = [optax.add_decayed_weights(task.weight_decay)] if task.weight_decay else []
    return optax.chain(*decay, optax.sgd(task.lr, momentum=task.momentum or None))


def make_step(task: Task) -> Callable[..., tuple[Carry, jax.Array]]:
    """Make the step `(carry, images, labels, key, rows) -> (carry, loss)`."""
    opt = optimizer(task)

    def objective(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        prediction = forward(task, params, x, key)
        if task.model == "linreg":
            return jnp.mean((prediction - y) ** 2) / 2
        return optax.softmax_cross_entropy_with_integer_labels(prediction, y).mean()

    def step(
        carry: Carry, images: jax.Array, labels: jax.Array, key: jax.Array, rows: jax.Array
    ) -> tuple[Carry, jax.Array]:
        x = images[rows]
        if task.images:
            x = x[:, None].astype(jnp.float32) / 255
        key = jax.random.fold_in(key, carry.steps)
        loss, grads = jax.value_and_grad(objective)(carry.params, x, labels[rows], key)
        updates, opt_state = opt.update(grads, carry.opt_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, opt_state, carry.steps + 1), loss

    return step


class JaxRunner(Runner):
    """Base of the runners in JAX, with the examples on the device and the carry."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        jax.config.update("jax_default_matmul_precision", "highest")  # float32, like all runners
        self.data = (
            jnp.asarray(task.x),
            jnp.asarray(task.y.astype(np.int32) if task.images else task.y),
            jax.random.wrap_key_data(jnp.asarray(task.key), impl="threefry2x32"),
        )
        self.reset()

    def reset(self) -> None:
        """Copy the initial weights to the device."""
        params = {name: jnp.array(p) for name, p in self.task.params.items()}
        self.carry = Carry(params, optimizer(self.task).init(params), jnp.zeros((), jnp.int32))

    def wait(self, losses: Any) -> None:
        """Wait for losses and parameters."""
        jax.block_until_ready((losses, self.carry))

    def params(self) -> dict[str, Array]:
        """Copy the parameters to the host."""
        return {name: np.array(p) for name, p in self.carry.params.items()}

    def _memory(self, name: str) -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get(name)

    def memory(self) -> int | None:
        """Ask XLA's allocator, which does not count on the host."""
        return self._memory("bytes_in_use")

    def peak(self) -> int | None:
        """Ask XLA's allocator."""
        return self._memory("peak_bytes_in_use")


class Step(JaxRunner, Loop):
    """`jax.jit` of one step."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.rows = [jnp.asarray(row.astype(np.int32)) for row in task.rows]
        self.program = jax.jit(make_step(task), donate_argnums=0)

    def step(self, i: int) -> jax.Array:
        """Call the program."""
        self.carry, loss = self.program(self.carry, *self.data, self.rows[i])
        return loss


class Scan(JaxRunner):
    """`jax.jit` of `lax.scan` over the rows."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.rows = jnp.asarray(task.rows.astype(np.int32))
        step = make_step(task)

        def epoch(
            carry: Carry, images: jax.Array, labels: jax.Array, key: jax.Array, rows: jax.Array
        ) -> tuple[Carry, jax.Array]:
            return lax.scan(lambda c, row: step(c, images, labels, key, row), carry, rows)

        self.program = jax.jit(epoch, donate_argnums=0)

    def epoch(self) -> jax.Array:
        """Call the program."""
        self.carry, losses = self.program(self.carry, *self.data, self.rows)
        return losses

    def losses(self, losses: jax.Array) -> list[float]:
        """Copy all losses at once."""
        values: list[float] = np.asarray(losses, np.float64).tolist()
        return values
