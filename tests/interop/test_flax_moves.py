"""Nets of Flax go on training in fdl with the losses that they have there."""

import pytest
import torch
import torch.nn.functional as F

import fdl
from fdl import interop, losses, nn, optim, random, tree
from tests.support.asserts import close, draw
from tests.support.jax import x64

jax = pytest.importorskip("jax")
linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Block(linen.Module):
    """A residual block of stride 2, as in a ResNet."""

    @linen.compact
    def __call__(self, x, train):
        norm = {"use_running_average": not train, "momentum": 0.9}
        y = linen.Conv(4, (3, 3), (2, 2), use_bias=False)(x)
        y = linen.relu(linen.BatchNorm(**norm)(y))
        y = linen.BatchNorm(**norm)(linen.Conv(4, (3, 3), use_bias=False)(y))
        x = linen.BatchNorm(**norm)(linen.Conv(4, (1, 1), (2, 2), use_bias=False, name="proj")(x))
        return linen.Dense(3)(linen.relu(x + y).mean((1, 2)))


def block():
    """The same in fdl; `SAME` of stride 2 pads an even size at the end only."""
    norm = {"eps": 1e-5, "momentum": 0.1}
    main = nn.sequential(
        lambda x: F.pad(x, (0, 1, 0, 1)),
        nn.conv2d(2, 4, 3, stride=2, bias=False),
        nn.batch_norm(4, **norm),
        nn.relu,
        nn.conv2d(4, 4, 3, padding=1, bias=False),
        nn.batch_norm(4, **norm),
    )
    short = nn.sequential(nn.conv2d(2, 4, 1, stride=2, bias=False), nn.batch_norm(4, **norm))
    return nn.sequential(
        both=nn.parallel(main=main, short=short),
        add=lambda ys: F.relu(ys[0] + ys[1]).mean((2, 3)),
        out=nn.linear(4, 3),
    )


NAMES = {
    "Conv_0": "both.main.1",
    "BatchNorm_0": "both.main.2",
    "Conv_1": "both.main.4",
    "BatchNorm_1": "both.main.5",
    "proj": "both.short.0",
    "BatchNorm_2": "both.short.1",
    "Dense_0": "out",
}


def test_a_residual_block_of_stride_2():
    """In float64, with batch statistics: outputs, losses of ten steps, parameters, statistics."""
    x, y = draw(0, 8, 6, 6, 2), torch.arange(8) % 3
    with x64():
        images, labels, sgd = interop.to_jax(x), interop.to_jax(y), optax.sgd(0.1, momentum=0.9)
        shapes = jax.eval_shape(lambda key: Block().init(key, images, False), jax.random.key(0))
        leaves, form = jax.tree.flatten(shapes)
        values = [interop.to_jax(draw(i, *leaf.shape).abs() + 0.1) for i, leaf in enumerate(leaves)]
        variables = jax.tree.unflatten(form, values)

        @jax.jit
        def train(variables, state):
            def loss(params):
                logits, new = Block().apply(
                    {**variables, "params": params}, images, True, mutable="batch_stats"
                )
                value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                return value, new

            value_and_grad = jax.value_and_grad(loss, has_aux=True)
            (value, new), grads = value_and_grad(variables["params"])
            updates, state = sgd.update(grads, state)
            return (
                {"params": optax.apply_updates(variables["params"], updates), **new},
                state,
                value,
            )

        model = block()
        like = tree.cast(model.init(random.key(0)), torch.float64)
        params, buffers = interop.from_flax(
            interop.from_jax(variables), kind={"proj": "Conv"}, like=like, names=NAMES
        )
        batch = x.movedim(-1, 1), y
        evaluated = interop.from_jax(
            jax.jit(Block().apply, static_argnums=2)(variables, images, False)
        )
        close(model.apply(params, buffers, batch[0])[0], evaluated)

        opt = optim.sgd(0.1, momentum=0.9)
        state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
        state = state._replace(buffers=buffers)
        step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
        opt_state = sgd.init(variables["params"])
        for _ in range(10):
            state, metrics = step(state, batch)
            variables, opt_state, loss = train(variables, opt_state)
            close(metrics["loss"].value.item(), loss.item())
        expected = interop.from_flax(
            interop.from_jax(variables), kind={"proj": "Conv"}, like=like, names=NAMES
        )
    close(state.params, expected[0])
    close(state.buffers["both"]["main"]["2"]["running_mean"],
          expected[1]["both"]["main"]["2"]["running_mean"])  # fmt: skip


class Small(nnx.Module):
    """A net of nnx, whose names are those of its attributes."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.ups = nnx.List([nnx.ConvTranspose(4, 4, (2, 2), (2, 2), rngs=rngs)])
        self.out = nnx.Linear(4 * 8 * 8, 3, rngs=rngs)


def test_a_net_of_nnx_whose_modules_tell_their_classes():
    net = nnx.eval_shape(lambda: Small(nnx.Rngs(0)))
    kinds = {
        ".".join(map(str, path)): type(module).__name__ for path, module in nnx.iter_modules(net)
    }
    shapes = nnx.to_pure_dict(nnx.state(net, nnx.Any(nnx.Param, nnx.BatchStat)))
    leaves, form = jax.tree.flatten(shapes)
    values = [draw(i, *leaf.shape).float() for i, leaf in enumerate(leaves)]
    layers = jax.tree.unflatten(form, values)
    model = nn.sequential(
        conv=nn.conv2d(2, 4, 3),
        norm=nn.batch_norm(4),
        ups=nn.sequential(nn.conv_transpose2d(4, 4, 2, stride=2)),
        flatten=nn.flatten(),
        out=nn.linear(4 * 8 * 8, 3),
    )
    like, image = model.init(random.key(0)), (4, 8, 8)
    with pytest.raises(ValueError, match=r"at 'ups.0': a kernel \[2, 2, 4, 4\] may be"):
        interop.from_flax(layers, like=like)
    params, buffers = interop.from_flax(layers, {"out": image}, kinds, like=like)
    expected = {
        "conv": interop.from_flax(layers["conv"], kind="Conv"),
        "norm": {"weight": layers["norm"]["scale"], "bias": layers["norm"]["bias"]},
        "ups": {"0": interop.from_flax(layers["ups"][0], kind="ConvTranspose")},
        "out": interop.from_flax(layers["out"], image),
    }
    close(params, expected, rtol=0, atol=0)
    close(buffers["norm"]["running_var"], layers["norm"]["var"], rtol=0, atol=0)
