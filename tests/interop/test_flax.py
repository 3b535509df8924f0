"""Layers of Flax and their counterparts in torch give the same values from converted parameters."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn as oo
from torch.func import functional_call

from fdl import interop, nn, tree
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


@pytest.mark.parametrize("axes", [1, 3])
def test_convolutions_of_other_numbers_of_axes(axes):
    x = numbers(9, (2, *(5, 4, 3)[:axes], 2))
    variables, y = theirs(linen.Conv(4, (2,) * axes, padding="VALID"), x)
    params = interop.from_flax({"Conv_0": variables["params"]})["Conv_0"]
    layer = (oo.Conv1d if axes == 1 else oo.Conv3d)(2, 4, 2)
    got = run(layer, params, interop.from_jax(x).movedim(-1, 1)).movedim(1, -1)
    close(got, y, rtol=1e-4, atol=1e-5)


def test_a_transposed_kernel_is_a_kind_of_its_own():
    x, ours = images()
    layer = linen.ConvTranspose(4, (3, 2), (2, 2), padding="VALID", transpose_kernel=True)
    variables, y = theirs(layer, x)
    kind = "ConvTranspose(transpose_kernel=True)"
    params = interop.from_flax(variables["params"], kind=kind)
    got = run(oo.ConvTranspose2d(3, 4, (3, 2), 2), params, ours).movedim(1, -1)
    close(got, y, rtol=1e-4, atol=1e-5)
    close(interop.to_flax(params, kind=kind), variables["params"], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4, 4)])
def test_a_weight_that_may_be_of_two_layers_needs_its_kind(shape):
    with pytest.raises(ValueError, match=r"to_flax: at 'a': a weight .* may be that of"):
        interop.to_flax({"a": {"weight": torch.ones(shape)}})
    with pytest.raises(ValueError, match=r"no rule for a layer with the leaves \['w'\]"):
        interop.to_flax({"a": {"w": torch.ones(shape)}})


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
DENSE = {"kernel": torch.ones(4, 2), "bias": torch.ones(2)}
SPLIT = {"kernel": torch.ones(4, 2, 2), "bias": torch.ones(2, 2)}
HEADS = {"query": SPLIT, "key": SPLIT, "value": SPLIT}
OUT = {"kernel": torch.ones(2, 2, 4), "bias": torch.ones(4)}


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "DenseGeneral"])
def test_a_shape_to_fill_tells_the_class(kind):
    """Of a kernel [4, 3, 5, 2]: none of the three has the shape of another."""
    layer = {"kernel": draw(0, 4, 3, 5, 2), "bias": draw(1, 2)}
    expected = interop.from_flax(layer, kind=kind)
    found = interop.from_flax({"up": layer}, like={"a": expected}, names={"up": "a"})
    close(found, {"a": expected}, rtol=0, atol=0)
    del layer["bias"], expected["bias"]
    close(interop.from_flax(layer, like=expected), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"at 'up': a kernel \[4, 3, 5, 2\] may be"):
        interop.from_flax({"up": layer})


def test_a_bias_tells_a_transposed_kernel():
    """[*window, out, in]: of a shape to fill, it has that of a ConvTranspose."""
    layer = {"kernel": draw(0, 3, 5, 2, 4), "bias": draw(1, 2)}
    expected = interop.from_flax(layer, kind="ConvTranspose(transpose_kernel=True)")
    assert expected["weight"].shape == (4, 2, 3, 5)
    close(interop.from_flax({"up": layer}, like={"up": expected}), {"up": expected}, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "axes"), [("Conv", 2), ("Dense", 4), ("Dense", 1)])
def test_a_weight_of_another_number_of_axes_is_refused(kind, axes):
    with pytest.raises(ValueError, match=f"to_flax: a weight .* is not that of a {kind}"):
        interop.to_flax({"weight": torch.ones([2] * axes)}, kind=kind)


def test_what_like_does_not_have_or_has_otherwise_is_listed():
    variables = {"params": {"a": DENSE, "b": {"scale": torch.ones(3)}}}
    like = {"a": {"weight": torch.ones(2, 5), "bias": torch.ones(2)}, "c": torch.ones(1)}
    lines = (
        "a.weight: expected [2, 5], got [2, 4]",
        "b.weight: unexpected (got [3])",
        "c: missing (expected [1])",
    )
    with pytest.raises(ValueError) as error:
        interop.from_flax(variables, like=like)
    assert str(error.value).splitlines()[1:] == [f"  {line}" for line in lines]


def test_statistics_go_where_the_buffers_are():
    variables = {
        "params": {"BatchNorm_0": {"scale": draw(0, 3), "bias": draw(1, 3)}},
        "batch_stats": {"BatchNorm_0": {"mean": draw(2, 3), "var": draw(3, 3)}},
    }
    values = dict.fromkeys(("running_mean", "running_var"), torch.zeros(3))
    buffers = {"n": {**values, "num_batches_tracked": torch.tensor(7)}}
    like = {"n": {"weight": torch.zeros(3), "bias": torch.zeros(3)}}, buffers
    params, buffers = interop.from_flax(variables, like=like, names={"BatchNorm_0": "n"})
    assert torch.equal(params["n"]["weight"], draw(0, 3))
    assert torch.equal(buffers["n"]["running_var"], draw(3, 3))
    assert buffers["n"]["num_batches_tracked"] == 7
    named = interop.from_flax(variables, names={"BatchNorm_0": "n"})
    close(named, {"params": params, "batch_stats": {"n": {k: buffers["n"][k] for k in values}}})


@pytest.mark.parametrize(
    ("layer", "options", "error", "text"),
    [
        ({"a": {"b": {"kernel": 3}}}, {}, TypeError, r"at 'a.b': 'kernel' must be"),
        (3, {}, TypeError, "expected a dict of layers, got an int"),
        ({"a": {"kernel": KERNEL}}, {"image": (1, 1, 3)}, ValueError, "describes one layer"),
        ({"a": {"kernel": KERNEL}}, {"kind": "Conv"}, ValueError, r"got several: \['a'\]"),
        ({"kernel": KERNEL}, {"kind": "ConvLocal"}, ValueError, "no rule for kind='ConvLocal'"),
        ({"a": {"Einsum_0": DENSE}}, {}, ValueError, r"at 'a.Einsum_0': no rule for kind='Einsum'"),
        ({"DenseGeneral_0": {"kernel": KERNEL}}, {}, ValueError, "at 'DenseGeneral_0': a .*bias"),
        ({"kernel": KERNEL[0]}, {"image": (1, 1, 3)}, ValueError, "image="),
        ({"kernel": KERNEL}, {"kind": "Dense"}, ValueError, r"has a kernel \[in, out\]"),
        ({"kernel": KERNEL, "bias": torch.ones(3, 2)}, {}, ValueError, "no rule for batch_dims"),
        ({"kernel": KERNEL[0, 0]}, {}, ValueError, r"no rule for a kernel \[2\]"),
        ({"bias": torch.ones(2)}, {"kind": "Conv"}, ValueError, "a Conv has a kernel"),
        ({"scale": KERNEL}, {}, ValueError, "over one axis only"),
        ({"lora_a": KERNEL, **DENSE}, {}, ValueError, r"leaves \['bias', 'kernel', 'lora_a'\]"),
        ({"Dense_0": {"lora_a": KERNEL, **DENSE}}, {}, ValueError, r"\['lora_a'\] of a Dense"),
        ({"a": DENSE}, {"kind": {"b": "Dense"}}, ValueError, r"kind=\['b'\] are not in the tree"),
        ({"a": DENSE}, {"names": {"b": "0"}}, ValueError, r"names=\['b'\] are not in the tree"),
        ({"a": DENSE, "b": DENSE}, {"names": {"b": "a"}}, ValueError, "two layers .* 'a.weight'"),
        ({**HEADS, "out": SPLIT}, {}, ValueError, "must have one number of features"),
        ({**HEADS, "out": OUT, "norm": OUT}, {}, ValueError, r"with the leaves \['key', 'norm'"),
        ({**HEADS, "out": {"kernel": OUT["kernel"]}}, {}, ValueError, "no rule for 'query' with"),
        ({**HEADS, "out": {**OUT, "bias": torch.ones(2)}}, {}, ValueError, r"'out' must be \[4\]"),
        ({"kernel": KERNEL, "bias": torch.ones(4)}, {"kind": "ConvTranspose"}, ValueError,
         r"bias of a ConvTranspose .* expected 2 .*kind='ConvTranspose\(transpose_kernel=True\)'"),
        ({**DENSE, "bias": torch.ones(3)}, {}, ValueError, r"bias of a Dense .*expected 2 .*\[3\]"),
        ({"kernel": KERNEL[0, 0]}, {"kind": "Conv"}, ValueError, r"a window.* got \[2\]"),
        ({"embedding": KERNEL}, {}, ValueError, r"an Embed has an embedding \[n, features\]"),
        ({"a": {"kernel": np.ones(3)}}, {}, TypeError, r"got numpy float64\[3\]; from_jax"),
        (DENSE, {"image": (-2, -2, 1)}, ValueError, "three positive integers, got .-2"),
        (DENSE, {"image": (2, 2)}, ValueError, "three positive integers"),
        (DENSE, {"image": 4}, TypeError, r"image must be \(channels, height, width\).* got an int"),
        (DENSE, {"kind": ["Dense"]}, TypeError, "kind must be the name of a class.* got a list"),
        ({"a": DENSE}, {"names": ["a"]}, TypeError, "names must be a dict .* got a list"),
        (DENSE, {"like": (nn.linear(4, 2), {})}, TypeError, "like must be what model.init"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(layer, options, error, text):
    with pytest.raises(error, match=text):
        interop.from_flax(layer, **options)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_generator_is_refused(impl):
    with pytest.raises(TypeError, match=f"at 'k': .* Threefry key, got one of .* '{impl}'"):
        interop.from_jax({"k": jax.random.key(0, impl=impl)})
