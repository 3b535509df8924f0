"""Random trees, and assertions: unchanged inputs, equal bits, close numbers and trees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from hypothesis import strategies as st
from torch import Tensor

from fdl import random
from fdl.testing import assert_trees_close
from fdl.testing._laws import equal_bits as equal_bits


class Pair(NamedTuple):
    first: Any
    second: Any


def trees(leaf: st.SearchStrategy = st.integers(0, 9)) -> st.SearchStrategy:  # noqa: B008
    """Nested dicts, lists, tuples and NamedTuples, empty ones and lone leaves among them."""
    names = st.text("abw01_", min_size=1, max_size=3)

    def containers(child: st.SearchStrategy) -> st.SearchStrategy:
        children = st.lists(child, max_size=3)
        return (
            st.dictionaries(names, child, max_size=3)
            | children
            | children.map(tuple)
            | st.builds(Pair, child, child)
        )

    return st.recursive(leaf, containers, max_leaves=12)


@contextmanager
def unchanged(*trees: Any) -> Iterator[None]:
    """Fail unless the block leaves every tree as it was, structure and bits."""
    flat = [pytree.tree_flatten(tree) for tree in trees]
    before = [[x.clone() if isinstance(x, Tensor) else x for x in leaves] for leaves, _ in flat]
    yield
    for member, old, (_, spec) in zip(trees, before, flat, strict=True):
        leaves, now = pytree.tree_flatten(member)
        assert now == spec, "the structure changed"
        for x, y in zip(leaves, old, strict=True):
            assert equal_bits(x, y) if isinstance(x, Tensor) else x is y, "a leaf changed"


def close(actual: Any, expected: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def result_or_none(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """What a module of torch returns, or None if it refuses the shape of x."""
    try:
        return module(x)
    except RuntimeError:
        return None


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 numbers."""
    return random.normal(random.key(seed), shape, torch.float64)


def assert_equal(got: Any, expected: Any, rtol: float = 1e-6) -> None:
    assert_trees_close(got, expected, rtol=rtol, atol=1e-7, equal_nan=True)
