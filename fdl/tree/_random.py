"""Keys and draws in the shape of a tree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl._checks import check_function, check_key
from fdl._threefry import encrypted_counters
from fdl.tree._checks import check_tensors
from fdl.tree._map import leaves, map
from fdl.tree._paths import Tree, sorted_order
from fdl.tree._structure import flatten, unflatten

Sampler = Callable[[Tensor, torch.Size, torch.dtype], Tensor]


def split_key_like(key: Tensor, tree: Tree) -> Tree:
    """Split a key into one for each leaf of a tree.

    Leaf i, with the keys of every dict in sorted order as in JAX, gets `random.split(key, n)[i]`,
    so the order in which a dict was filled does not matter. The keys are those of
    `optax.tree_utils.tree_split_key_like`, but for an `OrderedDict`, whose order JAX keeps.

    Args:
        key: a key, int64 [2].
        tree: any tree.

    Returns:
        Keys, int64 [2], in the structure of `tree`.

    Raises:
        TypeError, ValueError: `key` is not a key.

    >>> from fdl import random
    >>> split_key_like(random.key(0), {"w": torch.zeros(3), "b": torch.zeros(1)})
    {'w': tensor([ 928981903, 3453687069]), 'b': tensor([1797259609, 2579123966])}
    """
    check_key("tree.split_key_like", key)
    structure = flatten(tree)[1]
    order = sorted_order(tree)
    keys = torch.stack(encrypted_counters(key, (len(order),)), -1).unbind()
    of_leaf = dict(zip(order, keys, strict=True))
    return unflatten([of_leaf[i].clone() for i in range(len(order))], structure)


def random_like(
    key: Tensor, tree: Tree, sampler: Sampler, dtype: torch.dtype | None = None
) -> Tree:
    """Draw a tensor for each leaf of a tree, of its shape and dtype.

    Each leaf is drawn with its own key, that of `split_key_like`. The draws are those of
    `optax.tree_utils.tree_random_like` wherever the sampler's equal JAX's.

    Args:
        key: a key, int64 [2].
        tree: a tree of tensors.
        sampler: function `(key, shape, dtype) -> tensor`, such as `random.normal`,
            `random.uniform`, or `random.rademacher`.
        dtype: dtype of all draws; by default that of each leaf, which the sampler must support:
            `random.normal` draws no integers.

    Returns:
        Draws in the structure of `tree`, on the device of `key`.

    Raises:
        TypeError: a leaf is not a tensor (with its path), or as the sampler.
        ValueError: `key` is not a key.

    >>> from fdl import random
    >>> params = {"w": torch.zeros(3), "b": torch.zeros(1)}
    >>> random_like(random.key(0), params, random.normal)
    {'w': tensor([-2.4425, -2.0357,  0.2055]), 'b': tensor([1.0040])}
    """
    check_function("tree.random_like", "sampler", sampler, "(key, shape, dtype) -> tensor")
    check_tensors(leaves(tree), tree, "tree.random_like: every leaf")
    keys = split_key_like(key, tree)
    return map(lambda leaf, key: sampler(key, leaf.shape, dtype or leaf.dtype), tree, keys)
