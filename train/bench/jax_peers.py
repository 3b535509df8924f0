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
    buffers: Params
    opt_state: Any
    steps: jax.Array  # done, int32 []


def dense(params: Params, name: str, x: jax.Array) -> jax.Array:
    """Apply a linear layer whose weight is `[out, in]`."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def conv(params: Params, name: str, x: jax.Array, padding: str = "VALID") -> jax.Array:
    """Convolve `NCHW` with `OIHW`."""
    y = lax.conv_general_dilated(
        x, params[f"{name}.weight"], (1, 1), padding, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return y + params[f"{name}.bias"][:, None, None]


def max_pool(x: jax.Array) -> jax.Array:
    """Take the maximum of each 2 × 2."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def dropout(key: jax.Array, rate: float, x: jax.Array) -> jax.Array:
    """Drop what fdl drops from this key."""
    return jnp.where(jax.random.uniform(key, x.shape) >= rate, x / (1 - rate), 0.0)


def batch_norm(params: Params, buffers: Params, name: str, x: jax.Array) -> jax.Array:
    """Normalise over all axes but the channels, and replace the running statistics in `buffers`.

    The variance is computed as in Flax, by one pass over x.
    """
    axes, shape = (0, *range(2, x.ndim)), (-1, *(1,) * (x.ndim - 2))
    mean = x.mean(axes)
    var = jnp.maximum(0.0, (x * x).mean(axes) - mean * mean)
    n = x.size // len(mean)
    for statistic, now in (("mean", mean), ("var", var * (n / (n - 1)))):
        running = buffers[f"{name}.running_{statistic}"]
        buffers[f"{name}.running_{statistic}"] = 0.9 * running + 0.1 * lax.stop_gradient(now)
    buffers[f"{name}.num_batches_tracked"] += 1
    scale = params[f"{name}.weight"] * lax.rsqrt(var + 1e-5)
    return (x - mean.reshape(shape)) * scale.reshape(shape) + params[f"{name}.bias"].reshape(shape)


def forward(task: Task, params: Params, buffers: Params, x: jax.Array, key: jax.Array) -> jax.Array:
    """Apply the model of a task in training; replaces the running statistics in `buffers`."""
    flat = x.reshape(len(x), -1)

    def normed(h: jax.Array, name: str) -> jax.Array:
        return batch_norm(params, buffers, name, h)

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
        case "lenet-bn":
            h = max_pool(jax.nn.sigmoid(normed(conv(params, "conv.0", x), "conv.1")))
            h = max_pool(jax.nn.sigmoid(normed(conv(params, "conv.4", h), "conv.5")))
            h = jax.nn.sigmoid(normed(dense(params, "fc.0", h.reshape(len(x), -1)), "fc.1"))
            h = jax.nn.sigmoid(normed(dense(params, "fc.3", h), "fc.4"))
            return dense(params, "fc.6", h)
        case "cnn":
            for name in ("conv.0", "conv.3", "conv.6"):
                x = max_pool(jax.nn.relu(conv(params, name, x, "SAME")))
            return dense(params, "fc", x.reshape(len(x), -1))
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

    def objective(
        params: Params, buffers: Params, x: jax.Array, y: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        buffers = dict(buffers)
        prediction = forward(task, params, buffers, x, key)
        if task.model == "linreg":
            return jnp.mean((prediction - y) ** 2) / 2, buffers
        return optax.softmax_cross_entropy_with_integer_labels(prediction, y).mean(), buffers

    def step(
        carry: Carry, images: jax.Array, labels: jax.Array, key: jax.Array, rows: jax.Array
    ) -> tuple[Carry, jax.Array]:
        x = images[rows]
        if task.images:
            x = x[:, None].astype(jnp.float32) / 255
        key = jax.random.fold_in(key, carry.steps)
        run = jax.value_and_grad(objective, has_aux=True)
        (loss, buffers), grads = run(carry.params, carry.buffers, x, labels[rows], key)
        updates, opt_state = opt.update(grads, carry.opt_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, buffers, opt_state, carry.steps + 1), loss

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
        """Copy the initial weights and buffers to the device."""
        params = {name: jnp.array(p) for name, p in self.task.params.items()}
        buffers = {
            name: jnp.array(p, jnp.int32 if p.dtype == np.int64 else p.dtype)
            for name, p in self.task.buffers.items()
        }
        opt_state = optimizer(self.task).init(params)
        self.carry = Carry(params, buffers, opt_state, jnp.zeros((), jnp.int32))

    def wait(self, losses: Any) -> None:
        """Wait for losses and parameters."""
        jax.block_until_ready((losses, self.carry))

    def params(self) -> dict[str, Array]:
        """Copy the parameters and buffers to the host."""
        leaves = self.carry.params | self.carry.buffers
        return {name: np.array(p) for name, p in leaves.items()}

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
