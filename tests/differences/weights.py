"""Layers of other libraries beside those of torch: layouts, conventions and padding, as observed.

A layout is found by trying: of those in `LAYOUTS`, a row names the one that makes torch's layer
give what the other library's layer gives, to 1e-5.
"""

import functools
import importlib.util
import os

import numpy as np
import torch
import torch.nn.functional as F

from fdl.interop import from_flax
from tests.differences.tables import Table

LIBRARIES = ("torch", "jax", "flax", "dm-haiku", "equinox", "keras")


def flipped(w):
    """Turn the window around."""
    return w.flip(tuple(range(2, w.ndim)))


LAYOUTS = {
    "as it is": lambda w: w,
    "[…, a, b] → [b, a, …]": lambda w: w.movedim((-1, -2), (0, 1)),
    "[…, a, b] → [b, a, …], window flipped": lambda w: flipped(w.movedim((-1, -2), (0, 1))),
    "[…, a, b] → [a, b, …]": lambda w: w.movedim((-2, -1), (0, 1)),
    "[…, a, b] → [a, b, …], window flipped": lambda w: flipped(w.movedim((-2, -1), (0, 1))),
    "[a, b, …] → [b, a, …]": lambda w: w.transpose(0, 1),
    "[a, b, …] → [b, a, …], window flipped": lambda w: flipped(w.transpose(0, 1)),
}


def numbers(*shape):
    """Float32 numbers that depend on the shape alone."""
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


def library(name):
    """A library, imported when a row needs it; None if it is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    os.environ.setdefault("KERAS_BACKEND", "torch")  # as in walks.py
    return importlib.import_module(name)


def needs(name):
    """Leave a row as it is where its library is not installed."""

    def decorate(row):
        @functools.wraps(row)
        def measured(*args, **options):
            return {} if library(name) is None else row(*args, **options)

        return measured

    return decorate


# Each returns the weights by name, and the output [batch, *positions, channels] for an input.
@needs("flax")
def of_flax(kind, x, *args, **options):
    import jax
    from flax import linen

    layer = getattr(linen, kind)(*args, **options)
    return filled(jax.eval_shape(layer.init, jax.random.key(0), x)["params"],
                  lambda params: jax.jit(layer.apply)({"params": params}, x))  # fmt: skip


@needs("haiku")
def of_haiku(kind, x, *args, **options):
    import haiku
    import jax

    net = haiku.without_apply_rng(
        haiku.transform(lambda x: getattr(haiku, kind)(*args, name="layer", **options)(x))
    )
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    return filled(params["layer"], lambda found: jax.jit(net.apply)({"layer": found}, x))


@needs("keras")
def of_keras(kind, x, *args, **options):
    import keras

    layer = getattr(keras.layers, kind)(*args, **options)
    layer.build(x.shape)
    values = {v.name: numbers(*v.shape) for v in layer.weights}
    for v in layer.weights:
        v.assign(values[v.name])
    return values, keras.ops.convert_to_numpy(layer(x))


@needs("equinox")
def of_equinox(kind, x, *args, **options):
    import equinox
    import jax

    shapes = equinox.filter_eval_shape(
        lambda key: getattr(equinox.nn, kind)(*args, key=key, **options), jax.random.key(0)
    )
    names = {name: getattr(shapes, name) for name in ("weight", "bias")}
    values = {name: numbers(*x.shape) for name, x in names.items()}
    layer = equinox.tree_at(lambda net: [net.weight, net.bias], shapes, [*values.values()])
    if kind == "Linear":
        return values, np.array(jax.vmap(layer)(x))
    y = jax.jit(jax.vmap(layer))(np.moveaxis(x, -1, 1))
    return values, np.moveaxis(np.array(y), 1, -1)


def filled(shapes, run):
    """Numbers for the shapes of a layer, and what it gives with them."""
    values = {name: numbers(*leaf.shape) for name, leaf in shapes.items()}
    return values, np.array(run(values))


def layout(make, kind, f, x, *args, **options):
    """Name the leaves of a layer, and find how torch's function takes its weight."""
    found = make(kind, x, *args, **options)
    if not found:
        return {}
    values, y = found
    name, bias_name = sorted(values, key=lambda name: name in ("b", "bias"))
    kernel, bias = (torch.from_numpy(values[n]) for n in (name, bias_name))
    ours = torch.from_numpy(x).movedim(-1, 1) if x.ndim > 2 else torch.from_numpy(x)
    fits = []
    for how, convert in LAYOUTS.items():
        try:
            got = f(ours, convert(kernel).contiguous(), bias.flatten())
        except RuntimeError:  # other sizes
            continue
        got = got.movedim(1, -1) if got.ndim > 2 else got
        if got.shape == y.shape and np.allclose(got, y, rtol=1e-5, atol=1e-5):
            fits.append(how)
    shape = f" {list(bias.shape)}" if bias.ndim > 1 else ""
    how = (fits or ["none of these layouts"])[0]
    return {
        "weights there": f"`{name}` {list(kernel.shape)}, `{bias_name}`{shape}",
        "weight in torch and fdl": how,
        "converted by fdl": conversion(kernel, bias, how),
    }


def conversion(kernel, bias, how):
    """Name the kind of `from_flax` that makes this layout, perhaps with the last axes exchanged."""
    if how in ("as it is", "none of these layouts"):
        return "–"
    wanted = LAYOUTS[how](kernel)
    for kind in ("Dense", "Conv", "ConvTranspose", "ConvTranspose(transpose_kernel=True)"):
        for name, theirs in (("", kernel), (" of `w.mT`", kernel.mT)):
            try:
                found = from_flax({"kernel": theirs, "bias": bias.flatten()}, kind=kind)["weight"]
            except ValueError:  # another number of axes, or of outputs
                continue
            if found.shape == wanted.shape and torch.equal(found, wanted):
                return f'`kind="{kind}"`{name}'
    return "by hand"


def affine(make, kind, *args):
    return lambda: layout(make, kind, F.linear, numbers(4, 3), *args)


def convolution(make, axes, kind, *args, **options):
    """A window of 2, or 2 and more in other directions, no padding; 3 channels to 5."""
    f = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    return lambda: layout(make, kind, f, numbers(2, *(4, 5, 6)[:axes], 3), *args, **options)


def transposed(make, kind, *args, **options):
    def f(x, w, b):
        return F.conv_transpose2d(x, w, b, stride=2)

    return lambda: layout(make, kind, f, numbers(2, 4, 5, 3), *args, **options)


VALID = {"padding": "VALID"}
WINDOW, STRIDE = (2, 3), (2, 2)
LAYERS = {
    "Flax `Dense(5)`": affine(of_flax, "Dense", 5),
    "Flax `Conv(5, (2,))`": convolution(of_flax, 1, "Conv", 5, (2,), **VALID),
    "Flax `Conv(5, (2, 3))`": convolution(of_flax, 2, "Conv", 5, WINDOW, **VALID),
    "Flax `Conv(5, (2, 3, 2))`": convolution(of_flax, 3, "Conv", 5, (2, 3, 2), **VALID),
    "Flax `ConvTranspose(5, (2, 3), (2, 2))`": transposed(
        of_flax, "ConvTranspose", 5, WINDOW, STRIDE, **VALID
    ),
    "Flax `ConvTranspose(…, transpose_kernel=True)`": transposed(
        of_flax, "ConvTranspose", 5, WINDOW, STRIDE, transpose_kernel=True, **VALID
    ),
    "Haiku `Linear(5)`": affine(of_haiku, "Linear", 5),
    "Haiku `Conv2D(5, (2, 3))`": convolution(of_haiku, 2, "Conv2D", 5, WINDOW, **VALID),
    "Haiku `Conv2DTranspose(5, (2, 3), 2)`": transposed(
        of_haiku, "Conv2DTranspose", 5, WINDOW, 2, **VALID
    ),
    "Equinox `Linear(3, 5)`": affine(of_equinox, "Linear", 3, 5),
    "Equinox `Conv2d(3, 5, (2, 3))`": convolution(of_equinox, 2, "Conv2d", 3, 5, WINDOW),
    "Equinox `ConvTranspose2d(3, 5, (2, 3), 2)`": transposed(
        of_equinox, "ConvTranspose2d", 3, 5, WINDOW, 2
    ),
    "Keras `Dense(5)`": affine(of_keras, "Dense", 5),
    "Keras `Conv1D(5, 2)`": convolution(of_keras, 1, "Conv1D", 5, 2),
    "Keras `Conv2D(5, (2, 3))`": convolution(of_keras, 2, "Conv2D", 5, WINDOW),
    "Keras `Conv2DTranspose(5, (2, 3), 2)`": transposed(of_keras, "Conv2DTranspose", 5, WINDOW, 2),
}


def norm_of_torch(x):
    layer = torch.nn.BatchNorm1d(1)
    y = layer(torch.from_numpy(x))
    return y.detach().numpy(), layer.running_mean.item(), layer.running_var.item()


@needs("flax")
def norm_of_flax(x):
    import jax
    from flax import linen

    layer = linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    y, new = layer.apply(variables, x, mutable="batch_stats")
    return y, *(float(new["batch_stats"][name][0]) for name in ("mean", "var"))


@needs("flax")
def norm_of_nnx(x):
    from flax import nnx

    layer = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    y = layer(x)
    return y, float(layer.mean[...][0]), float(layer.var[...][0])


@needs("haiku")
def norm_of_haiku(x):
    """Its defaults ask for a rate of decay; of 0.9 it makes the weight that torch has."""
    import haiku
    import jax

    net = haiku.transform_with_state(lambda x: haiku.BatchNorm(True, True, 0.9)(x, True))
    params, state = net.init(jax.random.key(0), x)
    y, state = net.apply(params, state, None, x)
    found = [state[f"batch_norm/~/{name}_ema"]["average"].item() for name in ("mean", "var")]
    return y, *found


def norm_of_equinox(mode):
    @needs("equinox")
    def run(x):
        import equinox
        import jax

        layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(1, "batch", mode=mode)
        call = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = call(x, state)
        quiet = jax.vmap(
            equinox.nn.inference_mode(layer),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )
        # What it evaluates with: y(0) = −mean / √(var + ε), y(1) = (1 − mean) / √(var + ε).
        zero, one = (float(quiet(np.full((1, 1), v, "float32"), state)[0][0, 0]) for v in (0, 1))
        return y, -zero / (one - zero), (one - zero) ** -2

    return run


@needs("keras")
def norm_of_keras(x):
    import keras

    layer = keras.layers.BatchNormalization()
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    return y, float(layer.moving_mean[0]), float(layer.moving_variance[0])


def convention(run):
    """Observe ε, the weight of a new batch, and what becomes the running variance."""

    def row():
        x = np.array([[1.0], [3.0], [5.0], [11.0]], "float32")  # mean 5, variances 14 and 56 / 3
        found = run(x)
        if not found:
            return {}
        _, mean, var = found
        small = np.array([[-0.01], [0.01]], "float32")
        y = abs(float(np.asarray(run(small)[0])[1, 0]))
        weight = mean / 5
        sums = {"biased": 14.0, "unbiased": 56 / 3}
        moved = {
            f"{name}, with that weight": (1 - weight) + weight * value
            for name, value in sums.items()
        } | {f"{name}, plus 0.99 / 0.01": 99 + value for name, value in sums.items()}
        nearest = min(moved, key=lambda name: abs(moved[name] - var))
        close = abs(moved[nearest] - var) < 1e-3 * var
        return {
            "ε": f"{1e-4 / y**2 - 1e-4:.0e}",
            "weight of the first batch": f"{weight:.2f}",
            "running variance after variances 1, then 14 (biased) or 18.67": f"{var:.2f}",
            "which is": nearest if close else "another",
        }

    return row


NORMS = {
    "torch and fdl": convention(norm_of_torch),
    "Flax linen": convention(norm_of_flax),
    "Flax nnx": convention(norm_of_nnx),
    "Haiku, decay 0.9": convention(norm_of_haiku),
    'Equinox `mode="ema"`': convention(norm_of_equinox("ema")),
    'Equinox `mode="batch"`': convention(norm_of_equinox("batch")),
    "Keras": convention(norm_of_keras),
}


def padded(run, size, window, stride):
    """Where a convolution reads: how many positions before the first and after the last one."""
    x = np.arange(1, size + 1, dtype="float32").reshape(1, size, 1)
    first = [np.ravel(run(x, tap, window, stride)) for tap in np.eye(window, dtype="float32")]
    before = next(tap for tap, y in enumerate(first) if y[0])
    after = next(tap for tap, y in enumerate(reversed(first)) if y[-1])
    return f"{before}, {after}"


@needs("flax")
def same_of_flax(x, tap, window, stride):
    from flax import linen

    layer = linen.Conv(1, (window,), (stride,), use_bias=False)
    return layer.apply({"params": {"kernel": tap.reshape(-1, 1, 1)}}, x)


@needs("haiku")
def same_of_haiku(x, tap, window, stride):
    import haiku

    net = haiku.transform(lambda x: haiku.Conv1D(1, window, stride, with_bias=False)(x))
    return net.apply({"conv1_d": {"w": tap.reshape(-1, 1, 1)}}, None, x)


@needs("keras")
def same_of_keras(x, tap, window, stride):
    import keras

    return keras.ops.conv(x, tap.reshape(-1, 1, 1), stride, padding="same")


@needs("equinox")
def same_of_equinox(x, tap, window, stride):
    import equinox
    import jax

    layer = equinox.nn.Conv1d(
        1, 1, window, stride, padding="SAME", use_bias=False, key=jax.random.key(0)
    )
    layer = equinox.tree_at(lambda net: net.weight, layer, tap.reshape(1, 1, -1))
    return layer(x[:, :, 0])


def same_of_torch(x, tap, window, stride):
    x, tap = torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(tap).reshape(1, 1, -1)
    return F.conv1d(x, tap, stride=stride, padding="same").numpy()


def half_of_torch(x, tap, window, stride):
    x, tap = torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(tap).reshape(1, 1, -1)
    return F.conv1d(x, tap, stride=stride, padding=window // 2).numpy()


SAME = {
    "Flax": ("flax", same_of_flax),
    "Haiku": ("haiku", same_of_haiku),
    "Equinox": ("equinox", same_of_equinox),
    "Keras": ("keras", same_of_keras),
    'torch `padding="same"`': ("torch", same_of_torch),
    "torch `padding=window // 2`": ("torch", half_of_torch),
}


def padding(size, window, stride):
    def row():
        cells = {}
        for name, (package, run) in SAME.items():
            if library(package) is not None:
                try:
                    cells[name] = padded(run, size, window, stride)
                except RuntimeError:
                    cells[name] = "refused"
        return cells

    return row


SIZES = [
    (6, 3, 1),
    (6, 2, 1),
    (6, 3, 2),
    (7, 3, 2),
    (6, 2, 2),
    (7, 2, 2),
    (6, 5, 2),
    (7, 5, 2),
    (7, 1, 2),
]
TABLES = (
    Table(
        "layouts",
        ("layer", "weights there", "weight in torch and fdl", "converted by fdl"),
        LAYERS,
        LIBRARIES,
    ),
    Table(
        "batch-norm",
        (
            "library",
            "ε",
            "weight of the first batch",
            "running variance after variances 1, then 14 (biased) or 18.67",
            "which is",
        ),
        NORMS,
        LIBRARIES,
    ),
    Table(
        "same",
        ("size, window, stride", *SAME),
        {", ".join(map(str, sizes)): padding(*sizes) for sizes in SIZES},
        LIBRARIES,
    ),
)
