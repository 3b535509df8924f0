"""Fast flattening: as torch's pytree does it, with generated functions and without."""

from collections import OrderedDict, deque
from functools import reduce

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from torch import Tensor

from fdl import tree
from fdl.tree import _structure
from fdl.tree._structure import flatten, generate, unflatten
from tests.support.asserts import Pair, trees

OTHERS = [
    OrderedDict(a=1, b=[2]),
    [deque([1, 2]), {"a": OrderedDict(b=3)}],
    {1: 2, (3,): {None: 4}},
    [object(), {"a": object}],
    torch.max(torch.ones(2, 2), 0),
    {"a": torch.nn.Parameter(torch.ones(1)), "b": None},
    Pair(1, {"a'\"\n": Pair([], ())}),
    reduce(lambda inside, _: [inside], range(30), 1),
]


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Generate functions at once, for trees of every size, and begin without any."""
    monkeypatch.setattr(_structure, "_codes", ())
    monkeypatch.setattr(_structure, "_generated", 0)
    monkeypatch.setattr(_structure, "SIZES", range(9999))
    _structure._times.clear()


def check(sample):
    """Flatten and rebuild, as torch's pytree does."""
    leaves, structure = flatten(sample)
    expected, spec = pytree.tree_flatten(sample)
    assert len(leaves) == len(expected)
    assert all(x is y for x, y in zip(leaves, expected, strict=True))
    back = unflatten(leaves, structure)
    assert pytree.tree_structure(back) == spec
    assert all(x is y for x, y in zip(pytree.tree_leaves(back), expected, strict=True))


@pytest.mark.parametrize("often", [1, 10**9], ids=["generated", "walked"])
@settings(deadline=None)
@given(trees())
def test_flatten_and_unflatten_equal_pytree(often, sample):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_structure, "OFTEN", often)
        for _ in range(3):
            check(sample)


@pytest.mark.parametrize("sample", OTHERS, ids=range(len(OTHERS)))
def test_whatever_pytree_knows(sample, monkeypatch):
    monkeypatch.setattr(_structure, "OFTEN", 1)
    for _ in range(3):
        check(sample)


@settings(deadline=None)
@given(trees(), trees())
def test_generated_functions_take_their_own_structure_only(sample, other):
    _structure._codes = ()
    leaves, structure = flatten(sample)
    code = generate(structure)
    assert code.take(sample) == leaves and code.build(leaves) == sample
    same = repr(pytree.tree_structure(other)) == repr(pytree.tree_structure(sample))
    assert (code.take(other) is not None) == same  # with the order of keys


def test_a_container_in_place_of_a_leaf_is_another_structure():
    code = generate(flatten({"a": 1, "b": 2})[1])
    assert code.take({"a": 1, "b": [2]}) is None
    assert code.take({"b": 2, "a": 1}) is None
    assert code.take({"a": 1, "b": torch.ones(1)}) is not None
    assert code.take({"a": 1, "b": OrderedDict()}) is None
    assert code.take(Pair(1, 2)) is None


def test_functions_are_generated_for_frequent_structures_only(monkeypatch):
    monkeypatch.setattr(_structure, "SIZES", range(2, 9999))
    for _ in range(_structure.OFTEN - 1):
        flatten({"a": 1, "b": 2})
        flatten(3)
    assert not _structure._codes
    flatten({"a": 1, "b": 2})
    assert len(_structure._codes) == 1
    for i in range(100):
        for _ in range(_structure.OFTEN):
            flatten([{str(i): 1}, 2])
    assert len(_structure._codes) == _structure.KEPT
    assert _structure._generated < 100  # since ever more calls are needed
    assert len(_structure._times) <= 8 * _structure.KEPT + 1


def test_map_matches_paths_whatever_is_generated(monkeypatch):
    monkeypatch.setattr(_structure, "OFTEN", 2)
    one, two = {"w": 1, "b": (2, 3)}, {"b": (20, 30), "w": 10}
    for _ in range(5):
        assert tree.map(lambda x, y: x + y, one, two) == {"w": 11, "b": (22, 33)}
        assert list(tree.map(lambda x, y: y, two, one)) == ["b", "w"]
        with pytest.raises(ValueError, match=r"b\.1: missing"):
            tree.map(lambda x, y: x, one, {"w": 1, "b": (2,)})


def test_compiled_programs_flatten_as_before():
    @torch.compile(backend="eager", fullgraph=True)
    def f(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return tree.map(lambda p, q: p + q, params, params)

    params = {f"p{i}": torch.ones(1) for i in range(20)}
    for _ in range(_structure.OFTEN + 1):
        tree.map(lambda p: p, params)
    assert _structure._codes and f(params)["p3"] == 2
