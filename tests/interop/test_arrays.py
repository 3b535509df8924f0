"""Trees to and from NumPy and JAX, and a LeNet trained by Flax and optax."""

import numpy as np
import pytest
import torch
from torch.func import vmap

import models
from fdl import interop, random, tree
from tests.support.asserts import close, draw
from tests.support.jax import x64

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint32, torch.bool]


def some(dtype):
    leaf = (draw(0, 2, 3) * 3).abs().to(dtype)
    return {"a": [leaf, torch.tensor(1).to(dtype)], "b": (leaf.T,), "c": {}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_round_trip_shares_memory(dtype):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    given = some(dtype)
    arrays = interop.to_numpy(given)
    assert arrays["a"][0].shape == (2, 3) and arrays["a"][0].dtype.name == str(dtype).split(".")[1]
    back = interop.from_numpy(arrays)
    assert not tree.diff(back, given, values=False)
    assert all(
        torch.equal(x, y) for x, y in zip(tree.leaves(back), tree.leaves(given), strict=True)
    )
    assert back["a"][0].data_ptr() == given["a"][0].data_ptr()
    assert back["b"][0].stride() == (1, 3) and back["c"] == {}


def test_what_torch_cannot_share_is_copied():
    fixed = np.arange(3.0)
    fixed.flags.writeable = False
    got = interop.from_numpy([fixed, np.arange(3)[::-1], np.arange(3, dtype=">i4"), np.float32(2)])
    assert [x.tolist() for x in got] == [[0, 1, 2], [2, 1, 0], [0, 1, 2], 2]
    got[0].add_(1)
    assert fixed[0] == 0 and got[3].dtype == torch.float32


def test_numpy_errors_name_the_path():
    with pytest.raises(TypeError, match=r"to_numpy: at 'fc.w': expected a tensor, got 1.0 .float"):
        interop.to_numpy({"fc": {"w": 1.0}})
    with pytest.raises(ValueError, match=r"to_numpy: at 'w': the tensor requires grad.*detach"):
        interop.to_numpy({"w": torch.ones(1, requires_grad=True)})
    with pytest.raises(
        TypeError, match=r"from_numpy: at 'w.1': expected a NumPy array, got a tensor"
    ):
        interop.from_numpy({"w": [np.ones(1), torch.ones(1)]})
    with pytest.raises(TypeError, match=r"from_numpy: at 'w': can't convert"):
        interop.from_numpy({"w": np.array(["text"])})


# ------------------------------------------------------------------------------------ JAX


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool], ids=str)
def test_jax_round_trip(jax, dtype):
    given = some(dtype)
    arrays = interop.to_jax(given)
    assert arrays["a"][0].dtype.name == str(dtype).split(".")[1]
    back = interop.from_jax(jax.tree.map(lambda x: x, arrays))
    assert not tree.diff(back, given, values=False)
    assert all(
        torch.equal(x, y) for x, y in zip(tree.leaves(back), tree.leaves(given), strict=True)
    )
    big = torch.ones(64)
    shared = interop.from_jax(interop.to_jax({"w": big}))["w"]
    assert big.data_ptr() % 64 or shared.data_ptr() == big.data_ptr()


def test_jax_never_halves_a_leaf_unasked(jax):
    for leaf in (torch.ones(2).double(), torch.tensor([1])):
        with pytest.raises(TypeError, match=r"to_jax: at 'w': JAX would convert torch\."):
            interop.to_jax({"w": leaf})
    with x64():
        leaf = draw(0, 3)
        (array,) = interop.to_jax([leaf])
        assert array.dtype == "float64" and torch.equal(interop.from_jax([array])[0], leaf)


def test_keys_go_both_ways(jax):
    theirs, ours = jax.random.key(2**31 + 5), random.key(2**31 + 5)
    assert torch.equal(interop.from_jax({"key": theirs})["key"], ours)
    split = interop.from_jax(jax.random.split(theirs, 3))
    assert split.dtype == torch.int64 and torch.equal(split, random.split(ours, 3))
    wrapped = jax.random.wrap_key_data(interop.to_jax(ours.to(torch.uint32)))
    assert jax.random.uniform(wrapped).item() == random.uniform(ours).item()


def test_jax_errors_name_the_path(jax):
    with pytest.raises(TypeError, match=r"from_jax: at 'w': expected a JAX array, got a tensor"):
        interop.from_jax({"w": torch.ones(1)})
    with pytest.raises(TypeError, match=r"to_jax: at '0': expected a tensor, got 3 .int"):
        interop.to_jax([3])
    core = pytest.importorskip("flax.core")
    with pytest.raises(TypeError, match=r"got a FrozenDict, a mapping .*flax\.core\.unfreeze"):
        interop.from_jax(core.freeze({"w": jax.numpy.ones(1)}))


# ----------------------------------------------------------------------------------- Flax


def test_layouts_there_and_back():
    weight, bias = draw(0, 5, 4, 3, 2), draw(1, 5)
    layer = {"weight": weight, "bias": bias}
    flax = interop.to_flax(layer, kind="Conv")
    assert flax["kernel"].shape == (3, 2, 4, 5) and flax["kernel"].is_contiguous()
    assert flax["kernel"][2, 1, 3, 4] == weight[4, 3, 2, 1]
    close(interop.from_flax(flax, kind="Conv"), layer, rtol=0, atol=0)

    dense = {"weight": draw(2, 5, 2 * 3 * 4)}
    flax = interop.to_flax(dense, image=(2, 3, 4), kind="Dense")
    x = draw(3, 6, 2, 3, 4)
    close(x.permute(0, 2, 3, 1).flatten(1) @ flax["kernel"], x.flatten(1) @ dense["weight"].T)
    close(interop.from_flax(flax, image=(2, 3, 4)), dense, rtol=0, atol=0)

    norm = {"weight": bias, "bias": bias}
    assert list(interop.to_flax(norm)) == ["scale", "bias"]
    close(interop.from_flax(interop.to_flax(norm)), norm, rtol=0, atol=0)
    for convert, name in ((interop.from_flax, "kernel"), (interop.to_flax, "weight")):
        with pytest.raises(ValueError, match=r"image=\(1, 2, 2\), .* expected 3, got 4"):
            convert({name: torch.ones(3, 3)}, image=(1, 2, 2), kind="Dense")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax's own calls
def test_a_lenet_of_flax_and_optax(jax):
    linen, optax = pytest.importorskip("flax.linen"), pytest.importorskip("optax")

    class LeNet(linen.Module):
        @linen.compact
        def __call__(self, x):  # [batch, height, width, channel]
            for features in (6, 16):
                x = linen.Conv(features, (5, 5), padding="VALID")(x)
                x = linen.sigmoid(linen.max_pool(x, (2, 2), (2, 2)))
            x = x.reshape(len(x), -1)
            for features in (120, 84):
                x = linen.sigmoid(linen.Dense(features)(x))
            return linen.Dense(10)(x)

    net, opt = LeNet(), optax.adam(0.01)
    x = jax.random.normal(jax.random.key(0), (8, 28, 28, 1))
    y = jax.random.randint(jax.random.key(1), (8,), 0, 10)
    start = params = jax.jit(net.init)(jax.random.key(2), x)
    opt_state = jax.jit(opt.init)(params)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = opt.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(5):
        params, opt_state = step(params, opt_state)

    theirs = interop.from_jax(params)["params"]
    ours = {
        "conv": {
            "0": interop.from_flax(theirs["Conv_0"], kind="Conv"),
            "3": interop.from_flax(theirs["Conv_1"], kind="Conv"),
        },
        "fc": {
            "0": interop.from_flax(theirs["Dense_0"], image=(16, 4, 4)),
            "2": interop.from_flax(theirs["Dense_1"]),
            "4": interop.from_flax(theirs["Dense_2"]),
        },
    }
    images = interop.from_jax(x).permute(0, 3, 1, 2)
    logits = models.lenet().apply(ours, images)
    forward = jax.jit(net.apply)
    expected = interop.from_jax(forward(params, x))
    close(logits, expected, rtol=0, atol=1e-5)
    moved = interop.from_jax(forward(start, x)) - expected
    assert moved.abs().max() > 0.1

    again = {
        "Conv_0": interop.to_flax(ours["conv"]["0"], kind="Conv"),
        "Conv_1": interop.to_flax(ours["conv"]["3"], kind="Conv"),
        "Dense_0": interop.to_flax(ours["fc"]["0"], image=(16, 4, 4)),
        "Dense_1": interop.to_flax(ours["fc"]["2"]),
        "Dense_2": interop.to_flax(ours["fc"]["4"]),
    }
    assert not tree.diff(theirs, again)


def test_vmap_of_the_layouts():
    kernels = draw(0, 3, 12, 5)
    got = vmap(lambda kernel: interop.from_flax({"kernel": kernel}, (3, 2, 2)))(kernels)
    rows = [interop.from_flax({"kernel": kernel}, (3, 2, 2)) for kernel in kernels]
    close(got, tree.stack(rows))
