"""Files of parameters: exact, readable by others, never half-written, never trusted blindly."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fdl
from fdl import tree
from tests.support.asserts import draw, equal_bits, unchanged

EVERY_DTYPE = {
    "float": {
        "64": draw(0, 3, 2),
        "32": draw(1, 4).float(),
        "16": draw(2, 4).half(),
        "b16": draw(3, 4).bfloat16(),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    },
    "key": torch.tensor([2**32 - 1, 0]),
    "mask": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(3.0),
    "none": torch.zeros(0, 3),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.safetensors"


def assert_same(flat, expected):
    """Compare dicts from dotted paths to tensors; the file keeps no order."""
    assert flat.keys() == expected.keys()
    assert all(equal_bits(flat[path], expected[path]) for path in flat)


@pytest.mark.curriculum("B6")
def test_round_trip_is_bit_identical(path):
    with unchanged(EVERY_DTYPE):
        fdl.io.save(path, EVERY_DTYPE)
    assert_same(tree.flatten_dict(fdl.io.load(path)), tree.flatten_dict(EVERY_DTYPE))
    fdl.io.save(str(path), {"other": torch.ones(1)})
    assert list(fdl.io.load(str(path))) == ["other"]
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.curriculum("B6")
def test_the_clone_of_a_model_gives_the_same_outputs(path):
    model = fdl.nn.sequential(fdl.nn.conv2d(1, 2, 3), fdl.nn.flatten(), fdl.nn.linear(8, 2))
    params, x = model.init(fdl.random.key(0)), torch.ones(3, 1, 4, 4)
    fdl.io.save(path, params)
    assert equal_bits(model.apply(fdl.io.load(path), x), model.apply(params, x))


def test_other_readers_see_dotted_names(path):
    fdl.io.save(path, EVERY_DTYPE)
    assert_same(safetensors.torch.load_file(path), tree.flatten_dict(EVERY_DTYPE))


def test_every_tensor_is_aligned_for_readers_that_map_the_file(path):
    fdl.io.save(
        path, {"a": torch.ones(3, dtype=torch.uint8), "b": draw(0, 5), "c": draw(1, 3).half()}
    )
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    starts = {name: 8 + length + header[name]["data_offsets"][0] for name in "abc"}
    assert starts["b"] % 8 == 0 and starts["c"] % 2 == 0


def test_files_of_other_writers_are_read(path):
    flat = {"fc.0.weight": torch.ones(2), "b": torch.zeros(1)}
    safetensors.torch.save_file(flat, path)
    assert_same(tree.flatten_dict(fdl.io.load(path)), flat)


@pytest.mark.parametrize("params", [torch.arange(3.0), {}], ids=["lone-tensor", "nothing"])
def test_the_smallest_trees(path, params):
    fdl.io.save(path, params)
    assert tree.diff(fdl.io.load(path), params) == [] and type(fdl.io.load(path)) is type(params)


def test_tensors_that_share_memory_or_are_not_contiguous(path):
    base = draw(0, 4, 6)
    params = {"a": base, "b": base, "t": base.T, "row": base[1], "wide": base[:1].expand(5, 6)}
    params["learned"] = torch.nn.Parameter(base)
    fdl.io.save(path, params)
    loaded = fdl.io.load(path)
    assert_same(loaded, params)
    assert loaded["a"] is loaded["b"] and not loaded["learned"].requires_grad
    loaded["a"].zero_()
    assert equal_bits(loaded["row"], base[1])


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_in_the_middle_leaves_the_old_file(path, monkeypatch, failing):
    def full(*args):
        raise OSError("No space left on device")

    fdl.io.save(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left on device"):
        fdl.io.save(path, {"w": torch.zeros(2)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_file_has_the_usual_permissions(path):
    usual = path.with_name("usual")
    usual.touch()
    fdl.io.save(path, {"w": torch.ones(2)})
    assert path.stat().st_mode == usual.stat().st_mode


def test_the_content_reaches_the_disk_before_the_name(path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    fdl.io.save(path, {"w": torch.ones(2)})
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({"a": {"b": [{1}]}}, TypeError, "expected a dict, .*, got set at 'a.b.0'"),
        ({"a": 1j}, TypeError, "got complex at 'a'"),
        (
            {"a.": torch.ones(1)},
            ValueError,
            "must have a name before and after each dot, got 'a.' at the top",
        ),
        (
            {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}},
            ValueError,
            "two places have the path 'a.b'",
        ),
        ({"c": {0: torch.ones(1)}}, TypeError, "a dict key must be a str, got 0 at 'c'"),
    ],
    ids=["set", "complex", "dot", "shared-path", "int-key"],
)
def test_what_cannot_be_saved_raises_and_writes_nothing(path, params, error, text):
    with pytest.raises(error, match=text):
        fdl.io.save(path, params)
    assert os.listdir(path.parent) == []


LIKE = {
    "fc": {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)},
    "steps": [1, None],
    "rate": 0.5,
    "rest": {},
}


def test_every_difference_from_like_is_listed(path):
    other = {
        "fc": {"weight": torch.zeros(3, 2), "bias": torch.zeros(3).double(), "gain": torch.ones(1)},
        "steps": (1, None),
        "rate": 1,
        "rest": {"x": 1},
    }
    fdl.io.save(path, other)
    expected = (
        r"params\.safetensors does not match `like` \(load_matching loads the leaves that do\):\n"
        r"  fc\.bias: expected float32\[3\], got float64\[3\]\n"
        r"  fc\.gain: expected nothing, got float32\[1\]\n"
        r"  fc\.weight: expected float32\[2, 3\], got float32\[3, 2\]\n"
        r"  rate: expected float, got int\n"
        r"  rest\.x: expected nothing, got int\n"
        r"  steps: expected list, got tuple$"
    )
    with pytest.raises(ValueError, match=expected):
        fdl.io.load(path, like=LIKE)


def test_what_fits_is_loaded_where_the_rest_does_not(path):
    saved = {"fc": {"weight": torch.ones(2, 3), "bias": torch.ones(4)}, "steps": [7, 8], "rest": {}}
    fdl.io.save(path, saved)
    with unchanged(LIKE):
        loaded, lines = fdl.io.load_matching(path, LIKE)
    assert lines == [
        "fc.bias: expected float32[3], got float32[4]",
        "rate: expected float, got nothing",
        "steps.1: expected NoneType, got int",
    ]
    assert equal_bits(loaded["fc"]["weight"], saved["fc"]["weight"])
    assert loaded["fc"]["bias"] is LIKE["fc"]["bias"]
    assert loaded["steps"] == [7, None] and loaded["rate"] == 0.5 and list(loaded) == list(LIKE)
    fdl.io.save(path, LIKE)
    again, lines = fdl.io.load_matching(path, LIKE)
    assert lines == [] and tree.diff(LIKE, again) == []


def test_matching_leaves_go_to_a_device_and_the_others_stay(path):
    fdl.io.save(path, {"a": torch.ones(2), "b": torch.ones(3)})
    like = {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")}
    loaded, differences = fdl.io.load_matching(path, like, device="cpu")
    assert loaded["a"].tolist() == [1, 1] and loaded["b"] is like["b"]
    assert differences == ["b: expected float32[2], got float32[3]"]


def test_load_matching_names_itself_in_errors(path):
    with pytest.raises(FileNotFoundError, match="load_matching: no such file"):
        fdl.io.load_matching(path, {})
    path.write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match="load_matching: cannot read"):
        fdl.io.load_matching(path, {})
    fdl.io.save(path, {})
    with pytest.raises(TypeError, match="load_matching: like: a dict key must be a str, got 0"):
        fdl.io.load_matching(path, {0: 1})


def test_what_is_missing_is_listed_by_its_leaves(path):
    fdl.io.save(path, {"a": {"b": [1], "c": {}}})
    _, lines = fdl.io.load_matching(path, {"d": {"e": {"f": 1.0}}, "g": ()})
    assert lines == [
        "a.b.0: expected nothing, got int",
        "a.c: expected nothing, got empty dict",
        "d.e.f: expected float, got nothing",
        "g: expected empty tuple, got nothing",
    ]


def test_like_gives_a_file_of_names_alone_its_structure(path):
    like = [{"w": torch.zeros(2)}, (torch.zeros(1),)]
    safetensors.torch.save_file({"0.w": torch.ones(2), "1.0": torch.ones(1)}, path)
    loaded = fdl.io.load(path, like=like)
    assert type(loaded[1]) is tuple and equal_bits(loaded[0]["w"], torch.ones(2))
    with pytest.raises(ValueError, match=r"1\.1: expected int, got nothing"):
        fdl.io.load(path, like=[{"w": torch.zeros(2)}, (torch.zeros(1), 5)])


def test_keys_of_dicts_may_stand_in_another_order_in_like(path):
    fdl.io.save(path, {"a": torch.zeros(1), "b": torch.ones(1)})
    loaded = fdl.io.load(path, like={"b": torch.zeros(1), "a": torch.zeros(1)})
    assert list(loaded) == ["b", "a"] and loaded["b"] == 1 and list(fdl.io.load(path)) == ["a", "b"]


def test_devices(path):
    """A device is where a tensor is loaded to, never part of the file."""
    fdl.io.save(path, {"w": torch.ones(2), "n": 3})
    assert fdl.io.load(path)["w"].device.type == "cpu"
    assert fdl.io.load(path, device="meta")["w"].device.type == "meta"
    meta = {"w": torch.zeros(2, device="meta"), "n": 0}
    assert equal_bits(fdl.io.load(path, like=meta)["w"], torch.ones(2))
    assert fdl.io.load(path, like=meta, device="meta")["w"].device.type == "meta"
    with torch.device("meta"):  # the default of torch.empty, while it lasts
        assert equal_bits(fdl.io.load(path)["w"], torch.ones(2, device="cpu"))
    with pytest.raises(TypeError, match=r"w: on the device meta, which holds no values"):
        fdl.io.save(path, meta)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_come_from_and_go_to_the_gpu(path):
    state = {"w": torch.arange(6.0, device="cuda").reshape(2, 3).T, "b": torch.ones(2)}
    fdl.io.save(path, state)
    assert fdl.io.load(path)["w"].device.type == "cpu"
    loaded = fdl.io.load(path, like=state)
    assert loaded["w"].device == state["w"].device and loaded["b"].device.type == "cpu"
    assert torch.equal(loaded["w"], state["w"])


def test_loaded_tensors_and_the_file_do_not_touch(path):
    params = {"w": torch.ones(300_000), "b": torch.zeros(3)}
    fdl.io.save(path, params)
    before = path.read_bytes()
    loaded = fdl.io.load(path)
    loaded["w"].add_(1)
    assert path.read_bytes() == before
    path.write_bytes(b"")  # in place, as a careless program would
    assert loaded["w"].sum() == 600_000
    assert loaded["w"].untyped_storage().nbytes() == loaded["w"].nbytes


def test_one_leaf_is_read_without_the_rest(path, monkeypatch):
    fdl.io.save(
        path, {"large": torch.zeros(2_000_000), "fc": {"w": torch.ones(3), "b": torch.ones(1)}}
    )
    counted, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: counted.append(preadv(*args)) or counted[-1])
    info = fdl.io.inspect(path)
    assert info.leaves["large"].shape == (2_000_000,) and counted == []
    assert equal_bits(info.read("fc.w"), torch.ones(3)) and sum(counted) == 12
    assert list(info.read("fc")) == ["w", "b"] and sum(counted) == 12 + 16
    fdl.io.load_matching(path, {"fc": {"b": torch.zeros(1)}})
    assert sum(counted) == 12 + 16 + 4
    with pytest.raises(KeyError, match=r"nothing at 'fc\.x' in .*; it has \['large', 'fc\.w'"):
        info.read("fc.x")


def test_a_damaged_leaf_spoils_none_but_itself(path):
    fdl.io.save(path, {"a": torch.ones(3), "b": torch.ones(3)})
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\xff")
    assert equal_bits(fdl.io.inspect(path).read("a"), torch.ones(3))
    with pytest.raises(ValueError, match=r"inspect: cannot read .*'b': its bytes were changed"):
        fdl.io.inspect(path).read("b")


def test_the_structure_is_json_for_everybody(path):
    fdl.io.save(path, {"w": torch.ones(1), "rates": [float("inf"), float("nan"), -0.0, 0.1]})
    with safetensors.safe_open(path, framework="pt") as file:
        text = file.metadata()["fdl.tree"]
    structure = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert structure == {
        "w": ["tensor"],
        "rates": ["list", ["float", "7ff0000000000000"], ["float", "7ff8000000000000"], 0.0, 0.1],
    }


def test_metadata_comes_back_as_it_was(path):
    metadata = {"step": 3, "loss": float("nan"), "config": {"lr": [0.1, None, True], "x.y": "z"}}
    fdl.io.save(path, {}, metadata=metadata)
    assert repr(fdl.io.inspect(path).metadata) == repr(metadata)
    safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata={"made by": "others"})
    assert fdl.io.inspect(path).metadata == {"made by": "others"}


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"a": {"b": [0, (1,)]}}, r"metadata\['a'\]\['b'\]\[1\]: expected a dict.*got tuple"),
        ({"a": {1: 2}}, r"metadata\['a'\]: a key must be a str, got 1"),
        ({"a": torch.ones(1)}, r"metadata\['a'\]: .*got Tensor"),
        ([1], "metadata must be a dict, got list"),
    ],
    ids=["tuple", "key", "tensor", "list"],
)
def test_metadata_that_json_cannot_say_is_refused(path, metadata, text):
    with pytest.raises(TypeError, match=text):
        fdl.io.save(path, {}, metadata=metadata)
    assert os.listdir(path.parent) == []


def test_the_table_fits_in_80_columns(path):
    long = {"block" * 10: {"weight" * 9: torch.zeros(1, 2, 3, 4, 5, 6, 7, 8, 9)}}
    w = torch.ones(2, 3)
    fdl.io.save(path, {"w": w, "tied": w, **long, "text": "x" * 100, "none": [None, 0.5]})
    lines = str(fdl.io.inspect(path)).splitlines()
    assert max(map(len, lines)) <= 80 and min(map(len, lines[1:2])) > 20
    assert lines[0].split() == ["path", "shape", "dtype", "bytes"]
    assert lines[1].split() == ["w", "[2,", "3]", "float32", "24"]
    assert lines[2].split() == ["tied", "[2,", "3]", "float32", "=", "w"]
    assert "…" in lines[3] and lines[3].endswith("1,451,520")
    assert lines[-1].split() == ["total", "1,451,544"]


def test_a_file_of_format_1_is_read():
    """Written by fdl 0.1.0 before files had a structure: this one must be read for ever."""
    expected = {
        "conv": {
            "0": {
                "weight": torch.arange(6.0).reshape(1, 2, 3),
                "bias": torch.tensor([float("nan"), -0.0, float("inf")]),
            }
        },
        "half": torch.tensor([0.5, -2.0]).bfloat16(),
        "key": torch.tensor([2**32 - 1, 0]),
        "mask": torch.tensor([True, False]),
        "step": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    path = Path(__file__).parent / "files" / "format_1.safetensors"
    assert_same(tree.flatten_dict(fdl.io.load(path)), tree.flatten_dict(expected))
    assert_same(tree.flatten_dict(fdl.io.load(path, like=expected)), tree.flatten_dict(expected))
    assert equal_bits(fdl.io.inspect(path).read("step"), torch.tensor(7))


def test_a_file_of_format_2_is_read():
    w = torch.arange(6.0).reshape(2, 3)
    expected = {
        "mean": fdl.metrics.Mean(w, w),
        "rest": [None, True, -(2**70), float("-inf"), "text", (), {}],
    }
    path = Path(__file__).parent / "files" / "format_2.safetensors"
    loaded = fdl.io.load(path)
    assert loaded["rest"] == expected["rest"] and loaded["mean"].total is loaded["mean"].count
    assert equal_bits(loaded["mean"].total, w) and fdl.io.inspect(path).metadata == {"step": 7}


def test_a_tensor_that_the_format_lacks_is_named(path):
    strange = {
        "a": torch.ones(1, dtype=torch.complex128),
        "b": torch.ones(2).to_sparse(),
        "c": torch.ones(2).as_subclass(Sub),
    }
    expected = (
        r"cannot be stored:\n  a: torch\.complex128, not in the format; .*"
        r"\n  b: layout torch\.sparse_coo.*"
        r"\n  c: a Sub; make it a plain tensor"
    )
    with pytest.raises(TypeError, match=expected):
        fdl.io.save(path, strange)
    with pytest.raises(TypeError, match="__metadata__: the format reserves this name"):
        fdl.io.save(path, {"__metadata__": torch.ones(1)})
    nested = {}
    for _ in range(101):
        nested = {"a": nested}
    with pytest.raises(ValueError, match=r"nested more than 100 deep at 'a\.a"):
        fdl.io.save(path, nested)
    with pytest.raises(ValueError, match="a dict key must be valid Unicode"):
        fdl.io.save(path, {"\ud800": 1})
    assert os.listdir(path.parent) == []


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "folder"])
def test_a_damaged_file_raises(path, damage):
    fdl.io.save(path, {"w": torch.ones(20)})
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"garbage": b"x" * 99, "truncated": content[:-4], "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"load: cannot read .*params\.safetensors: \w"):
        fdl.io.load(path)


def test_other_errors_of_load(path):
    with pytest.raises(FileNotFoundError, match=r"params\.safetensors"):
        fdl.io.load(path)
    with pytest.raises(OSError, match="No such file"):
        fdl.io.save(path / "below", {"w": torch.ones(1)})
    safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata={"fdl": "99"})
    with pytest.raises(ValueError, match="has format 99, this fdl reads up to 2"):
        fdl.io.load(path)
    safetensors.torch.save_file({"a": torch.ones(1), "a.b": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"cannot place 'a\.b': 'a' is a leaf"):
        fdl.io.load(path)
