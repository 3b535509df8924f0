"""`tree.ravel` beside JAX's `ravel_pytree`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from fdl import jit, random, tree
from tests.support.asserts import Pair, close, equal_bits, trees
from tests.support.branches import Branch
from tests.support.jax import x64

jax = pytest.importorskip("jax")

NAMES = ("float32", "float64", "int32", "bool")
LEAVES = st.builds(
    lambda dtype, shape: torch.arange(np.prod(shape, dtype=int)).reshape(shape).to(dtype),
    st.sampled_from([getattr(torch, name) for name in NAMES]),
    st.sampled_from([(), (2, 3), (0, 2)]),
)
PARAMS = {"w": torch.arange(6.0).reshape(3, 2), "b": [torch.ones(2), torch.tensor(0.5)], "e": {}}


def as_jax(t):
    return tree.map(lambda leaf: jax.numpy.asarray(leaf.numpy()), t)


@settings(max_examples=20, deadline=None)
@given(trees(LEAVES))
def test_vector_and_way_back_are_those_of_jax(t):
    vector, unravel = tree.ravel(t)
    with x64():
        theirs, back = jax.flatten_util.ravel_pytree(as_jax(t))
        assert vector.numpy().dtype == theirs.dtype
        np.testing.assert_array_equal(vector.numpy(), np.asarray(theirs))
        returned = tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), back(theirs))
    assert tree.diff(returned, unravel(vector)) == tree.diff(t, unravel(vector)) == []


@pytest.mark.parametrize(
    "dtypes",
    [("float16", "bfloat16"), ("int64", "float32"), ("uint8", "int8"), ("complex64", "float64")],
    ids="-".join,
)
def test_dtypes_are_promoted_as_by_jax(dtypes):
    vector, _ = tree.ravel([torch.ones(1, dtype=getattr(torch, name)) for name in dtypes])
    with x64():
        theirs, _ = jax.flatten_util.ravel_pytree([jax.numpy.ones(1, name) for name in dtypes])
    assert str(vector.dtype) == f"torch.{theirs.dtype}"


@pytest.mark.parametrize(
    ("t", "vector", "ours", "text"),
    [
        (PARAMS, torch.ones(8), ValueError, r"expected a vector \[9\], as ravel returned, got \[8"),
        (PARAMS, torch.ones(10), ValueError, r"got \[10\]"),
        (PARAMS, torch.ones(3, 3), ValueError, r"got \[3, 3\]"),
        ([torch.ones(1), torch.ones(1).int()], torch.ones(2).int(), TypeError, "expected float32"),
        ([torch.ones(1), torch.ones(1).int()], torch.ones(2).half(), TypeError, "got float16"),
    ],
    ids=["short", "long", "matrix", "integers", "narrow"],
)
def test_vectors_that_jax_refuses(t, vector, ours, text):
    _, unravel = tree.ravel(t)
    with pytest.raises(ours, match=f"^unravel: .*{text}"):
        unravel(vector)
    _, back = jax.flatten_util.ravel_pytree(as_jax(t))
    with pytest.raises((TypeError, ValueError)):
        back(jax.numpy.asarray(vector.numpy()))


def test_one_dtype_stays_that_of_the_vector():
    vector, unravel = tree.ravel(PARAMS)
    assert {leaf.dtype for leaf in tree.leaves(unravel(vector.double()))} == {torch.float64}
    with pytest.raises(TypeError, match=r"^unravel: expected a tensor, got a .*ndarray|numpy"):
        unravel(vector.numpy())


def test_no_leaves():
    for empty in ({}, [], {"a": (), "b": [{}]}):
        vector, unravel = tree.ravel(empty)
        assert vector.shape == (0,) and vector.dtype == torch.float32 and unravel(vector) == empty
        with pytest.raises(ValueError, match=r"expected a vector \[0\]"):
            unravel(torch.ones(1))


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match=r"tree.ravel: every leaf must be a tensor.*\n  b.0: None"):
        tree.ravel({"a": torch.ones(1), "b": [None]})


def test_order_is_that_of_keys_and_memory_is_new():
    vector, unravel = tree.ravel(PARAMS)
    other = {"e": {}, "b": PARAMS["b"], "w": PARAMS["w"]}
    assert torch.equal(tree.ravel(other)[0], vector) and list(tree.ravel(other)[1](vector)) == [
        *("e", "b", "w")
    ]
    branch, back = tree.ravel(Branch({"w": PARAMS["w"], "b": PARAMS["b"][0]}))
    assert branch.tolist() == [1, 1, 0, 1, 2, 3, 4, 5] and type(back(branch)) is Branch
    result = unravel(vector)
    memories = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(result)}
    assert len(memories) == 3 and vector.untyped_storage().data_ptr() not in memories
    (alone, back) = tree.ravel(PARAMS["w"])
    assert alone.data_ptr() != PARAMS["w"].data_ptr() and torch.equal(back(alone), PARAMS["w"])


def loss(params):
    return ((params["w"] ** 3).sum(0) * params["b"][0]).sum() * params["b"][1].sin()


def test_under_every_transformation(plain_backend):
    params = tree.cast(PARAMS, torch.float64)
    vector, unravel = tree.ravel(params)

    def f(v):
        return loss(unravel(v))

    gradient = tree.ravel(grad(loss)(params))[0]
    close(grad(f)(vector), gradient)
    direction = random.normal(random.key(0), vector.shape, torch.float64)
    close(jvp(f, (vector,), (direction,))[1], gradient @ direction)
    rows = torch.stack([vector, 2 * vector, vector - 1])
    close(vmap(grad(f))(rows), torch.stack([grad(f)(row) for row in rows]))
    stacked = tree.stack([unravel(row) for row in rows])
    assert equal_bits(vmap(lambda p: tree.ravel(p)[0])(stacked), rows)
    moved = jit(lambda p, v: (tree.ravel(p)[1](2 * v), grad(f)(v)))(params, vector)
    close(moved, (tree.map(lambda leaf: 2 * leaf, params), grad(f)(vector)))


def test_a_record_comes_back():
    record = Pair(torch.ones(2), {"x": torch.zeros(1)})
    vector, unravel = tree.ravel(record)
    assert type(unravel(vector)) is Pair and vector.tolist() == [1, 1, 0]


def test_scipy_minimises_a_function_of_a_tree():
    optimize = pytest.importorskip("scipy.optimize")
    vector, unravel = tree.ravel({"x": torch.zeros(2), "y": torch.zeros(())})

    def f(v):
        p = unravel(v)
        return ((p["x"] - 3) ** 2).sum() + (p["y"] + 1) ** 2

    def value_and_slope(array):  # of float64
        v = torch.from_numpy(array)
        return f(v).item(), grad(f)(v).numpy()

    found = unravel(torch.from_numpy(optimize.minimize(value_and_slope, vector, jac=True).x))
    close(found, {"x": torch.tensor([3.0, 3.0]).double(), "y": torch.tensor(-1.0).double()}, 1e-6)
