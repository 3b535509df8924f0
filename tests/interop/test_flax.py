"""Layers of Flax and their counterparts in torch give the same values from converted parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn as oo
from torch.func import functional_call

from fdl import interop, tree
from tests.support.asserts import close, draw

jax = pytest.importorskip("jax")
linen = pytest.importorskip("flax.linen")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax's own calls


def numbers(seed, shape):
    """Give a JAX array of standard normal numbers, which nobody has to compile."""
    return interop.to_jax(draw(seed, *shape).float())


def theirs(layer, *inputs):
    """Give Flax's variables, none of them a constant, and its output."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    leaves, form = jax.tree.flatten(shapes)
    values = [abs(numbers(i, leaf.shape)) + 0.1 for i, leaf in enumerate(leaves)]
    variables = jax.tree.unflatten(form, values)
    y = jax.jit(layer.apply)(variables, *inputs)
    return interop.from_jax(dict(variables)), interop.from_jax(y)


def images(height=6, channels=3):
    x = numbers(9, (2, height, height, channels))
    return x, interop.from_jax(x).movedim(-1, 1)


def run(module, params, *inputs, **options):
    flat = {path: x.clone() for path, x in tree.flatten_dict(params).items()}
    return functional_call(module, flat, inputs, options, strict=True)


def test_dense_convolution_and_embedding():
    x, ours = images()
    variables, y = theirs(linen.Conv(4, (3, 3), padding="VALID"), x)
    params = interop.from_flax(variables["params"], kind="Conv")
    close(run(oo.Conv2d(3, 4, 3), params, ours).movedim(1, -1), y, rtol=1e-4, atol=1e-5)
    ids = jax.numpy.array([1, 4])
    variables, y = theirs(linen.Embed(5, 3), ids)
    params = interop.from_flax(variables["params"])
    close(run(oo.Embedding(5, 3), params, torch.tensor([1, 4])), y)
    close(interop.to_flax(params, kind="Embed"), variables["params"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "window", "stride"), [(3, 2, 2), (3, 3, 1), (4, 4, 2)])
def test_a_transposed_convolution(channels, window, stride):
    x, ours = images()
    layer = linen.ConvTranspose(channels, (window,) * 2, (stride,) * 2, padding="VALID")
    variables, y = theirs(layer, x)
    params = interop.from_flax(variables["params"], kind="ConvTranspose")
    got = run(oo.ConvTranspose2d(3, channels, window, stride), params, ours)
    close(got.movedim(1, -1), y, rtol=1e-4, atol=1e-5)
    back = interop.to_flax(params, kind="ConvTranspose")
    close(back, variables["params"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("height", [6, 7], ids=["even", "odd"])
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (3, 2), (2, 2), (5, 2)])
def test_same_padding_as_the_page_says(window, stride, height):
    """SAME pads so that ceil(size / stride) come out, one more at the end than at the start."""
    x, ours = images(height)
    variables, y = theirs(linen.Conv(4, (window,) * 2, (stride,) * 2, padding="SAME"), x)
    total = max((-(-height // stride) - 1) * stride + window - height, 0)
    before, after = total // 2, total - total // 2
    padded = F.pad(ours, (before, after, before, after))
    params = interop.from_flax(variables["params"], kind="Conv")
    got = run(oo.Conv2d(3, 4, window, stride), params, padded)
    close(got.movedim(1, -1), y, rtol=1e-4, atol=1e-5)
    if height == 6 and (window, stride) == (3, 2):
        assert (before, after) == (0, 1)


@pytest.mark.slow
def test_dense_general_and_attention():
    x = numbers(9, (2, 5, 4))
    ours = interop.from_jax(x)
    variables, y = theirs(linen.DenseGeneral((2, 3)), x)
    for kind in ("DenseGeneral", None):  # the bias says it
        params = interop.from_flax(variables["params"], kind=kind)
        close(run(oo.Linear(4, 6), params, ours).unflatten(-1, (2, 3)), y, rtol=1e-4, atol=1e-5)
    variables, y = theirs(linen.DenseGeneral(3, axis=(-2, -1)), x)
    params = interop.from_flax(variables["params"], kind="DenseGeneral")
    close(run(oo.Linear(20, 3), params, ours.flatten(1)), y, rtol=1e-4, atol=1e-5)

    variables, y = theirs(linen.MultiHeadDotProductAttention(2), x)
    params = interop.from_flax(variables["params"])
    attention = oo.MultiheadAttention(4, 2, batch_first=True)
    close(run(attention, params, ours, ours, ours)[0], y, rtol=1e-4, atol=1e-5)


def test_normalisation():
    x, ours = images()
    variables, y = theirs(linen.LayerNorm(), x)
    params = interop.from_flax(variables["params"])
    close(run(oo.LayerNorm(3, eps=1e-6), params, ours.movedim(1, -1)), y, rtol=1e-4, atol=1e-5)

    variables, y = theirs(linen.BatchNorm(use_running_average=True), x)
    values = interop.from_flax(variables)
    layer = oo.BatchNorm2d(3).eval()
    values = {**values["params"], **values["batch_stats"], "num_batches_tracked": torch.tensor(0)}
    close(run(layer, values, ours).movedim(1, -1), y, rtol=1e-4, atol=1e-5)
    statistics = interop.to_flax(interop.from_flax(variables["batch_stats"]))
    close(statistics, variables["batch_stats"], rtol=0, atol=0)


def test_batch_norm_moves_as_the_page_says():
    """Flax's momentum is one minus torch's, and its running variance is the biased one."""
    x, ours = images()
    layer = linen.BatchNorm(use_running_average=False, momentum=0.99)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    _, new = jax.jit(layer.apply, static_argnames="mutable")(variables, x, mutable="batch_stats")
    new = interop.from_flax(interop.from_jax(dict(new)))["batch_stats"]
    twin = oo.BatchNorm2d(3, momentum=0.01)
    twin(ours)
    n = ours.numel() // 3
    biased = 0.99 + (twin.running_var - 0.99) * (n - 1) / n  # 0.99 is what is left of the 1
    close(new["running_mean"], twin.running_mean, rtol=1e-4, atol=1e-6)
    close(new["running_var"], biased, rtol=1e-5)


def test_gelu_as_the_page_says():
    x = numbers(0, (7,))
    got = F.gelu(interop.from_jax(x), approximate="tanh")
    close(got, interop.from_jax(linen.gelu(x)), rtol=1e-4, atol=1e-6)


def test_a_tree_of_layers_is_converted_by_its_names():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=True)(linen.Conv(3, (3, 3))(x))
            x = linen.ConvTranspose(3, (2, 2), (2, 2))(x).mean((1, 2))
            return linen.Dense(2, name="hr")(linen.LayerNorm()(x))

    variables, _ = theirs(Net(), images()[0])
    found = interop.from_flax(variables)
    each = {
        name: interop.from_flax(layer, kind=name.partition("_")[0] if "_" in name else None)
        for name, layer in variables["params"].items()
    }
    close(found["params"], each, rtol=0, atol=0)
    assert found["params"]["hr"]["weight"].shape == (2, 3)
    kernel = variables["params"]["ConvTranspose_0"]["kernel"]
    assert torch.equal(
        found["params"]["ConvTranspose_0"]["weight"][0, 1], kernel.flip(0, 1)[..., 0, 1]
    )
    close(interop.to_flax(found), variables, rtol=0, atol=0)


def test_gates_of_a_recurrent_cell_are_layers():
    cell = linen.GRUCell(3)
    variables, _ = theirs(cell, numbers(0, (2, 3)), numbers(1, (2, 4)))
    found = interop.from_flax(variables["params"])
    assert torch.equal(found["hr"]["weight"], variables["params"]["hr"]["kernel"].mT)
    assert found["in"]["weight"].shape == (3, 4)


KERNEL = torch.ones(3, 4, 2)


@pytest.mark.parametrize(
    ("layer", "options", "error", "text"),
    [
        ({"a": {"b": {"kernel": 3}}}, {}, TypeError, r"at 'a.b': 'kernel' must be"),
        ({"a": {"kernel": KERNEL}}, {"image": (1, 1, 3)}, ValueError, "describes one layer"),
        ({"a": {"kernel": KERNEL}}, {"kind": "Conv"}, ValueError, r"got several: \['a'\]"),
        ({"kernel": KERNEL}, {"kind": "ConvLocal"}, ValueError, "no rule for kind='ConvLocal'"),
        ({"DenseGeneral_0": {"kernel": KERNEL}}, {}, ValueError, "at 'DenseGeneral_0': a .*bias"),
        ({"kernel": KERNEL[0]}, {"image": (1, 1, 3)}, ValueError, "image="),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(layer, options, error, text):
    with pytest.raises(error, match=text):
        interop.from_flax(layer, **options)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_generator_is_refused(impl):
    with pytest.raises(TypeError, match=f"at 'k': .* Threefry key, got one of .* '{impl}'"):
        interop.from_jax({"k": jax.random.key(0, impl=impl)})
