"""Trees: nested dicts, lists, tuples and NamedTuples of tensors, based on torch's own pytree.

Any mapping that torch's pytree knows is a branch too, such as an OrderedDict or a TensorDict.

Every leaf has a dotted path such as `conv.0.weight`, its name in a `state_dict()`:

>>> import torch
>>> from fdl.tree import flatten_dict
>>> params = {"fc": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}}
>>> list(flatten_dict(params))
['fc.weight', 'fc.bias']

Keys may be paths themselves, as in `dict(module.named_parameters())`.

Leaves of two trees are matched by path, never by the order in which a dict was filled. `None` is a
leaf, unlike in JAX; for an empty place use `()`.

Functions that compute (`stack`, `unstack`, `ravel`) return new memory. Functions that rearrange or
convert (`partition`, `merge`, `flatten_dict`, `to`, `cast`) return the given tensors themselves
where nothing changes, never views of parts of them.
"""

from __future__ import annotations

from fdl.tree._compare import allclose, diff
from fdl.tree._map import cast, leaves, map, size, stack, to, unstack
from fdl.tree._paths import Tree, Where, flatten_dict, unflatten_dict
from fdl.tree._random import random_like, split_key_like
from fdl.tree._ravel import ravel
from fdl.tree._split import merge, partition
from fdl.tree._summary import summary

__all__ = [
    "Tree",
    "Where",
    "allclose",
    "cast",
    "diff",
    "flatten_dict",
    "leaves",
    "map",
    "merge",
    "partition",
    "random_like",
    "ravel",
    "size",
    "split_key_like",
    "stack",
    "summary",
    "to",
    "unflatten_dict",
    "unstack",
]
