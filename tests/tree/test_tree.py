"""Trees: paths, matching by key, splitting and uniting; nothing is ever mutated."""

import re
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdl import tree
from fdl.tree._map import match
from tests.support.asserts import Pair, trees, unchanged

W, B = torch.arange(6.0).reshape(2, 3), torch.tensor([1.0, 2.0])


def same(a, b):
    """Equal in containers and leaves, whatever the order of dict keys."""
    return type(a) is type(b) and a == b and match(a, b, "same") == tree.leaves(a)


# ------------------------------------------------------------------------------ map, match


def test_map_goes_by_key_and_keeps_the_order_of_the_first_tree():
    first = {"w": 1, "b": [2, Pair(3, 4)]}
    second = {"b": [20, Pair(30, 40)], "w": 10}
    mapped = tree.map(lambda x, y: (x + y,), first, second)
    assert mapped == {"w": (11,), "b": [(22,), Pair((33,), (44,))]}
    assert list(mapped) == ["w", "b"]
    assert tree.leaves(mapped) == [11, 22, 33, 44]


def test_match_lists_leaves_in_the_order_of_like():
    assert match({"w": 0, "b": (0, None)}, {"b": (1, 2), "w": 3}, "here") == [3, 1, 2]


@pytest.mark.parametrize("operation", ["map", "match"])
@pytest.mark.parametrize(
    ("like", "other", "lines"),
    [
        (
            {"a": {"w": 1, "b": 2}, "c": 3},
            {"a": {"w": 1, "v": torch.zeros(2)}, "d": [4]},
            [
                "a.b: missing (expected int 2)",
                "a.v: unexpected (got float32[2])",
                "c: missing (expected int 3)",
                "d.0: unexpected (got int 4)",
            ],
        ),
        ({"a": 1}, {"a": {"w": 1}}, ["a.w: unexpected", "a: missing"]),
        ({"a": {}}, {"a": {"w": 1}}, ["a.w: unexpected"]),
        ({"a": 1}, {"a": {}}, ["a: missing"]),
        ([1, 2], (1, 2), ["a container is of another type"]),
        (Pair(1, 2), (1, 2), ["first: missing", "1: unexpected"]),
        ([1, 2], [1], ["1: missing (expected int 2)"]),
    ],
    ids=["keys", "leaf-branch", "empty-branch", "leaf-empty", "list-tuple", "named", "length"],
)
def test_other_structures_raise_and_every_path_is_listed(operation, like, other, lines):
    with pytest.raises(ValueError, match="the trees have different structures") as error:
        if operation == "map":
            tree.map(lambda x, y: x, like, other)
        else:
            match(like, other, "tree.map")
    assert str(error.value).startswith("tree.map: ")
    for line in lines:
        assert f"\n  {line}" in str(error.value)


# ------------------------------------------------------------------------------ paths


@pytest.mark.curriculum("B2")
def test_paths_are_those_of_a_state_dict():
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(2, 2))
    state = module.state_dict()
    nested = tree.unflatten_dict(state)
    assert list(nested) == ["0", "1"]
    assert list(tree.flatten_dict(nested)) == list(state)


def test_paths_through_every_container():
    flat = tree.flatten_dict({"a": [1, (2, Pair(3, {"b": None}))], "empty": {}})
    assert flat == {"a.0": 1, "a.1.0": 2, "a.1.1.first": 3, "a.1.1.second.b": None}
    assert tree.flatten_dict(7) == {"": 7}
    assert tree.leaves({"a": None, "b": ()}) == [None]


@given(trees())
def test_flatten_then_unflatten_gives_the_tree_back(t):
    flat = tree.flatten_dict(t)
    assert list(flat.values()) == tree.leaves(t)
    assert same(tree.unflatten_dict(flat, like=t), t)
    shuffled = dict(reversed(flat.items()))
    assert same(tree.unflatten_dict(shuffled, like=t), t)
    # Without `like` all containers become dicts; the paths stay.
    assert list(tree.flatten_dict(tree.unflatten_dict(flat)).items()) == list(flat.items())


def test_unflatten_builds_nested_dicts():
    assert tree.unflatten_dict({"a.0.w": 1, "b": 2, "a.1": 3}) == {
        "a": {"0": {"w": 1}, "1": 3},
        "b": 2,
    }
    assert tree.unflatten_dict({}) == {}
    assert tree.unflatten_dict({"": 1}) == 1
    with pytest.raises(ValueError, match=r"tree.unflatten_dict: .* each dot, got 'a\.\.w'"):
        tree.unflatten_dict({"a..w": 1})
    with pytest.raises(TypeError, match=r"tree.unflatten_dict: a dict key must be a str, got 0"):
        tree.unflatten_dict({0: 1})


@pytest.mark.parametrize(
    ("key", "error", "text"),
    [
        ("a..b", ValueError, "must have a name before and after each dot, got 'a..b'"),
        ("", ValueError, "must not be empty"),
        (3, TypeError, "must be a str, got 3; write it as '3'"),
    ],
    ids=["dot", "empty", "int"],
)
@pytest.mark.parametrize("f", [tree.flatten_dict, tree.summary, tree.unstack])
def test_keys_without_a_path_raise(f, key, error, text):
    with pytest.raises(error, match=re.escape(text)):
        f({"ok": {key: W}})


@pytest.mark.parametrize(
    ("flat", "text"),
    [
        ({"a": 1, "a.b": 2}, "cannot place 'a.b': 'a' is a leaf"),
        ({"a.b": 2, "a": 1}, "cannot place 'a': leaves are below it"),
        ({"x.a": 1, "x.a.b.c": 2}, "cannot place 'x.a.b.c': 'x.a' is a leaf"),
    ],
)
def test_a_leaf_that_is_also_a_branch_raises(flat, text):
    with pytest.raises(ValueError, match=text):
        tree.unflatten_dict(flat)


def test_unflatten_like_lists_every_path():
    with pytest.raises(ValueError, match=r"not those of `like`:\n  b: missing\n  c: unexpected$"):
        tree.unflatten_dict({"a": 1, "c": 2}, like={"a": 0, "b": 0})


# ------------------------------------------------------------------------------ stack, unstack


@given(trees(st.sampled_from([W, B, torch.tensor(3), torch.tensor(True)])), st.integers(1, 3))
def test_unstack_undoes_stack(t, n):
    members = [tree.map(lambda leaf, i=i: leaf + i, t) for i in range(n)]
    stacked = tree.stack(members)
    assert all(leaf.shape[0] == n for leaf in tree.leaves(stacked))
    if tree.leaves(t):
        for member, back in zip(members, tree.unstack(stacked), strict=True):
            assert tree.diff(member, back) == []
            match(member, back, "same containers")


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([], "expected at least one tree, got none"),
        ([{"w": W}, {"w": W}, {"w": B}], r"tree 2 differs.*\n  w: expected float32\[2, 3\]"),
        ([{"w": W}, {"w": W.double()}], r"tree 1 differs.*\n  w: .* got float64"),
        ([{"w": W}, {"v": W}], r"v: expected nothing, got .*\n  w: expected .*, got nothing"),
        ([[W], (W,)], r"tree 1 differs.*\n  : expected list, got tuple"),
    ],
    ids=["none", "shape", "dtype", "paths", "containers"],
)
def test_stack_refuses(members, text):
    with pytest.raises(ValueError, match=text):
        tree.stack(members)


@pytest.mark.parametrize(
    "t", [{}, {"w": W, "s": torch.tensor(1.0)}, {"w": W, "b": torch.zeros(3)}], ids=str
)
def test_unstack_needs_one_first_axis(t):
    with pytest.raises(ValueError, match=r"tree\.unstack: first axes must have the same length"):
        tree.unstack(t)


# ------------------------------------------------------------------------------ partition, merge


@given(trees(), st.data())
def test_merge_undoes_partition(t, data):
    paths = list(tree.flatten_dict(t))
    chosen = set(data.draw(st.lists(st.sampled_from(paths)))) if paths else set()
    yes, no = tree.partition(t, lambda path, leaf: path in chosen)
    assert set(tree.flatten_dict(yes)) == chosen
    assert set(tree.flatten_dict(no)) == set(paths) - chosen
    assert same(tree.merge(yes, no), t)
    assert same(tree.merge(no, yes), t)


PARAMS = {"conv": [{"weight": 1, "bias": 2}, 3], "fc": Pair({"weight": 4, "bias": 5}, {})}


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("*.bias", {"conv.0.bias", "fc.first.bias"}),
        ("conv.*", {"conv.0.weight", "conv.0.bias", "conv.1"}),
        (["conv.1", "fc.*.w*"], {"conv.1", "fc.first.weight"}),
        ("conv.?", {"conv.1"}),
        (lambda path, leaf: leaf > 3, {"fc.first.weight", "fc.first.bias"}),
        (lambda path, leaf: False, set()),
    ],
    ids=["suffix", "prefix", "several", "one-character", "by-leaf", "nothing"],
)
def test_partition_by_globs_and_predicates(where, chosen):
    yes, no = tree.partition(PARAMS, where)
    assert set(tree.flatten_dict(yes)) == chosen
    assert set(tree.flatten_dict(yes)) | set(tree.flatten_dict(no)) == set(
        tree.flatten_dict(PARAMS)
    )


def test_partition_leaves_holes_only_where_there_is_no_key():
    yes, no = tree.partition(PARAMS, ["conv.1", "*.bias"])
    assert yes == {"conv": [{"bias": 2}, 3], "fc": Pair({"bias": 5}, {})}
    assert no == {"conv": [{"weight": 1}, ()], "fc": Pair({"weight": 4}, {})}
    assert tree.partition(5, "*") == (5, ())


@pytest.mark.parametrize("where", ["*.wieght", ["*.bias", "*.wieght"]], ids=["one", "second"])
def test_a_glob_that_matches_nothing_raises(where):
    with pytest.raises(ValueError, match=r"partition: '\*\.wieght' matches no path; the paths are"):
        tree.partition(PARAMS, where)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((), "expected at least one tree"),
        (({"a": {"b": 1}}, {"a": {"b": 2}}), "'a.b': in two trees, at least once as a leaf"),
        (({"a": 1}, {"a": {"b": 2}}), "'a': in two trees, at least once as a leaf"),
        (
            ({"a": [1, ()]}, {"a": [2]}),
            r"'a': list\[2\] in one tree, list\[1\] in another",
        ),
        (
            ({"a": [()]}, {"a": {"0": 2}}),
            r"'a': list\[1\] in one tree, dict\[1\] in another",
        ),
        (({"a.b": 1}, {"a": {"b": 2}}), "two leaves have the path 'a.b'"),
        ((1, {"a": 2}), "'': in two trees"),
        (
            ({"a": 1, "b": [2], "c": 3}, {"a": 4, "b": [], "d": 5}, {"d": {"e": 6}, "f": 7}),
            r"trees:\n  'a': in two .*\n  'b': list\[1\] in .*\n  'd': in two trees, at least .*$",
        ),
    ],
    ids=["none", "leaf-leaf", "leaf-branch", "length", "type", "dotted", "root", "several"],
)
def test_merge_refuses(parts, text):
    with pytest.raises(ValueError, match=text):
        tree.merge(*parts)


# ------------------------------------------------------------------------------ to, cast, size


def test_cast_touches_floats_alone():
    t = {"w": W, "h": B.half(), "key": torch.tensor([1, 2]), "mask": torch.tensor(True)}
    cast = tree.cast(t, torch.float64)
    assert {name: leaf.dtype for name, leaf in cast.items()} == {
        "w": torch.float64,
        "h": torch.float64,
        "key": torch.int64,
        "mask": torch.bool,
    }
    assert torch.equal(cast["w"], W.double())


@pytest.mark.curriculum("T3")
def test_to_moves_every_leaf():
    moved = tree.to({"w": W, "n": [torch.tensor(1)]}, "meta")
    assert [leaf.device.type for leaf in tree.leaves(moved)] == ["meta", "meta"]


def test_size_counts_elements():
    assert tree.size({"w": W, "s": torch.tensor(1.0), "none": torch.zeros(0, 3)}) == 7
    assert tree.size({}) == 0


@pytest.mark.curriculum("B2")
def test_summary_is_a_table():
    t = {"fc": [{"weight": torch.zeros(40, 50)}, torch.zeros(3, dtype=torch.bfloat16)]}
    t["step"] = torch.tensor(0)
    assert tree.summary(t) == (
        "path         shape     dtype     count  bytes\n"
        "fc.0.weight  [40, 50]  float32   2,000  8,000\n"
        "fc.1         [3]       bfloat16      3      6\n"
        "step         []        int64         1      8\n"
        "total                            2,004  8,014"
    )


# ------------------------------------------------------------------------------ no mutation


@pytest.mark.parametrize(
    "f",
    [
        lambda t: tree.map(torch.add, t, t),
        tree.flatten_dict,
        lambda t: tree.unflatten_dict(tree.flatten_dict(t)),
        lambda t: tree.unstack(tree.stack([t, t])),
        lambda t: tree.merge(*tree.partition(t, "*.w")),
        lambda t: tree.merge({"new": B}, t),
        lambda t: tree.to(tree.cast(t, torch.float64), "meta"),
        lambda t: (tree.size(t), tree.summary(t), tree.diff(t, t), tree.allclose(t, t)),
    ],
    ids=["map", "flatten", "unflatten", "stack", "partition", "merge", "to", "read"],
)
def test_inputs_are_never_mutated(f):
    t = {"a": {"w": W.clone(), "b": [B.clone(), Pair(B.clone(), {})]}, "c": (torch.tensor(1),)}
    with unchanged(t):
        f(t)


BIG = torch.tensor(2**53)
MOST = torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64)
UNEQUAL = {
    "an empty tuple and an empty dict": ({"a": ()}, {"a": {}}),
    "an empty list and nothing": ({"a": [], "b": B}, {"b": B}),
    "an empty dict and a filled one": ({"a": {}}, {"a": {"w": B}}),
    "an empty tuple and a number": ({"a": ()}, {"a": B}),
    "a list and a tuple": ({"a": [B]}, {"a": (B,)}),
    "a NamedTuple and a dict": (Pair(B, B), {"first": B, "second": B}),
    "no elements and one": (torch.zeros(0), torch.zeros(1)),
    "no elements and a number": (torch.zeros(0), torch.zeros(())),
    "None and 0": ({"a": None}, {"a": 0.0}),
    "None and a tensor": ({"a": None}, {"a": torch.tensor(0.0)}),
    "True and 1": ({"a": True}, {"a": 1}),
    "nan and a number": (torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0])),
    "nan and inf": (torch.tensor(torch.nan), torch.tensor(torch.inf)),
    "inf and -inf": (torch.tensor(torch.inf), torch.tensor(-torch.inf)),
    "1e30 and inf": (torch.tensor(1e30), torch.tensor(torch.inf)),
    "the largest number and inf": (MOST, torch.full_like(MOST, torch.inf)),
    "a factor of 2 at 1e-6": (torch.tensor(1e-6), torch.tensor(2e-6)),
    "integers beyond float64": (BIG, BIG + 1),
    "a word of a key": (torch.tensor([0, 4070199207]), torch.tensor([0, 4070199208])),
    "uint8": (torch.tensor(200, dtype=torch.uint8), torch.tensor(201, dtype=torch.uint8)),
    "bools": (torch.tensor([True, False]), torch.tensor([True, True])),
    "int64 and float64": (torch.tensor(1), torch.tensor(1.0).double()),
    "float32 and float64": (torch.tensor(1.0), torch.tensor(1.0).double()),
    "complex": (torch.tensor(1 + 1j), torch.tensor(1 - 1j)),
    "bfloat16": (torch.tensor(1.0).bfloat16(), torch.tensor(1.0078125).bfloat16()),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_what_differs_is_never_close_either_way_round(name):
    one, two = UNEQUAL[name]
    for a, b in [(one, two), (two, one), ([one], [two]), ({"x": two}, {"x": one})]:
        assert not tree.allclose(a, b) and tree.diff(a, b) and tree.diff(a, b, rtol=1e-5)
    assert tree.allclose(one, one) and tree.allclose(two, two) and tree.diff(two, two) == []


def test_what_is_close_and_by_how_much_integers_differ():
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    assert tree.allclose({"a": special, "b": ()}, {"b": (), "a": special * (1 + 1e-6)})
    assert tree.allclose(OrderedDict(a=B, b=W), {"b": W, "a": B})
    assert tree.diff(BIG, BIG + 1) == [": 1 of 1 values differ, by at most 1"]
    extremes = torch.tensor([-(2**63)]), torch.tensor([2**63 - 1])
    assert tree.diff(*extremes) == [": 1 of 1 values differ, by at most 1.84e+19"]


def test_rows_of_a_stack_have_memory_of_their_own():
    stacked = {"w": torch.arange(6.0).reshape(3, 2)}
    rows = tree.unstack(stacked)
    rows[1]["w"].fill_(9)
    assert torch.equal(stacked["w"], torch.arange(6.0).reshape(3, 2))
