"""Keys and draws in the shape of a tree, beside those of optax."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fdl import random, tree
from tests.support.asserts import Pair, equal_bits, trees
from tests.support.branches import Branch
from tests.support.jax import x64

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

PARAMS = {
    "w": torch.zeros(2),
    "layers": [torch.zeros(()) for _ in range(11)],  # "10" sorts before "2", but row 2 comes first
    "b": Pair(torch.zeros(2), {"z": torch.zeros(2), "a": torch.zeros(2)}),
}


def as_jax(t):
    return tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, str(leaf.dtype)[6:]), t)


def from_jax(t):
    return tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), t)


@settings(max_examples=15, deadline=None)
@given(trees())
def test_keys_are_those_of_optax(t):
    keys = tree.split_key_like(random.key(7), t)
    theirs = optax.tree_utils.tree_split_key_like(jax.random.key(7), t)
    theirs = jax.tree.map(lambda key: np.array(jax.random.key_data(key)).astype(np.int64), theirs)
    assert tree.diff(from_jax(theirs), keys) == []


@pytest.mark.parametrize(("sampler", "dtype"), [("normal", None), ("uniform", torch.float64)])
def test_draws_are_those_of_optax(sampler, dtype):
    drawn = tree.random_like(random.key(1), PARAMS, getattr(random, sampler), dtype)
    with x64(dtype is not None):
        theirs = optax.tree_utils.tree_random_like(
            jax.random.key(1),
            as_jax(PARAMS),
            getattr(jax.random, sampler),
            None if dtype is None else np.float64,
        )
        expected = from_jax(theirs)
    tolerance = {"uniform": 0.0, "normal": 5e-7}[sampler]  # the bits, or 4 units of the last place
    assert tree.diff(expected, drawn, atol=tolerance) == []


def test_order_of_keys_and_kind_of_mapping_do_not_matter():
    one = tree.random_like(random.key(2), {"w": torch.zeros(2), "b": torch.zeros(3)}, random.normal)
    two = tree.random_like(random.key(2), {"b": torch.zeros(3), "w": torch.zeros(2)}, random.normal)
    three = tree.random_like(random.key(2), Branch(two), random.normal)
    assert list(one) == ["w", "b"] and list(two) == ["b", "w"] and type(three) is Branch
    assert tree.diff(one, two) == tree.diff(one, three) == []


def test_keys_differ_and_have_memory_of_their_own():
    keys = tree.leaves(tree.split_key_like(random.key(0), PARAMS))
    assert len({tuple(key.tolist()) for key in keys}) == len(keys) == 15
    assert len({key.untyped_storage().data_ptr() for key in keys}) == 15
    assert tree.split_key_like(random.key(0), {}) == {}
    assert equal_bits(tree.split_key_like(random.key(0), 1.5), random.split(random.key(0), 1)[0])


def test_signs_and_dtypes():
    like = {"a": torch.zeros(4, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.bfloat16)}
    signs = tree.random_like(random.key(0), like, random.rademacher)
    assert tree.diff(like, signs, values=False) == []
    assert all((leaf.abs() == 1).all() for leaf in tree.leaves(signs))


def test_under_vmap_each_member_has_its_own():
    keys = random.split(random.key(0), 3)
    draw = lambda key, x: tree.random_like(key, {"w": x, "v": x[0]}, random.normal)  # noqa: E731
    drawn = torch.vmap(draw, (0, None))(keys, torch.zeros(2, 2))
    for i, key in enumerate(keys):
        assert tree.diff(draw(key, torch.zeros(2, 2)), tree.map(lambda x, i=i: x[i], drawn)) == []


@pytest.mark.parametrize(
    ("key", "t", "error", "text"),
    [
        (0, PARAMS, TypeError, r"tree.split_key_like: `key` expected a key.*random.key\(0\)"),
        (torch.zeros(3, 2).long(), PARAMS, ValueError, "use torch.vmap"),
        (random.key(0), {"a": [None]}, TypeError, r"every leaf must be a tensor.*\n  a.0: None"),
        (random.key(0), {"n": torch.tensor(3)}, TypeError, "normal: `dtype` expected"),
    ],
    ids=["seed", "keys", "none", "integer"],
)
def test_wrong_arguments(key, t, error, text):
    with pytest.raises(error, match=text):
        tree.random_like(key, t, random.normal)
