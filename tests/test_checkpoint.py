"""Files of parameters: exact, readable by others, never half-written, never trusted blindly."""

import os

import pytest
import safetensors.torch
import torch
from laws import draw, equal_bits, unchanged

import fdl
from fdl import tree

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


def test_round_trip_is_bit_identical(path):
    with unchanged(EVERY_DTYPE):
        fdl.save(path, EVERY_DTYPE)
    assert_same(tree.flatten_dict(fdl.load(path)), tree.flatten_dict(EVERY_DTYPE))
    fdl.save(str(path), {"other": torch.ones(1)})
    assert list(fdl.load(str(path))) == ["other"]
    assert os.listdir(path.parent) == [path.name]


def test_the_clone_of_a_model_gives_the_same_outputs(path):
    model = fdl.nn.sequential(fdl.nn.conv2d(1, 2, 3), fdl.nn.flatten(), fdl.nn.linear(8, 2))
    params, x = model.init(fdl.random.key(0)), torch.ones(3, 1, 4, 4)
    fdl.save(path, params)
    assert equal_bits(model.apply(fdl.load(path), x), model.apply(params, x))


def test_other_readers_see_dotted_names(path):
    fdl.save(path, EVERY_DTYPE)
    assert_same(safetensors.torch.load_file(path), tree.flatten_dict(EVERY_DTYPE))


def test_files_of_other_writers_are_read(path):
    flat = {"fc.0.weight": torch.ones(2), "b": torch.zeros(1)}
    safetensors.torch.save_file(flat, path)
    assert_same(tree.flatten_dict(fdl.load(path)), flat)


@pytest.mark.parametrize("params", [torch.arange(3.0), {}], ids=["lone-tensor", "nothing"])
def test_the_smallest_trees(path, params):
    fdl.save(path, params)
    assert tree.diff(fdl.load(path), params) == [] and type(fdl.load(path)) is type(params)


def test_tensors_that_share_memory_or_are_not_contiguous(path):
    base = draw(0, 4, 6)
    params = {"a": base, "b": base, "t": base.T, "row": base[1], "wide": base[:1].expand(5, 6)}
    params["learned"] = torch.nn.Parameter(base)
    fdl.save(path, params)
    loaded = fdl.load(path)
    assert_same(loaded, params)
    assert loaded["a"] is loaded["b"] and not loaded["learned"].requires_grad
    loaded["a"].zero_()
    assert equal_bits(loaded["row"], base[1])


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_in_the_middle_leaves_the_old_file(path, monkeypatch, failing):
    def full(*args):
        raise OSError("No space left on device")

    fdl.save(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left on device"):
        fdl.save(path, {"w": torch.zeros(2)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_file_has_the_usual_permissions(path):
    usual = path.with_name("usual")
    usual.touch()
    fdl.save(path, {"w": torch.ones(2)})
    assert path.stat().st_mode == usual.stat().st_mode


def test_the_content_reaches_the_disk_before_the_name(path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    fdl.save(path, {"w": torch.ones(2)})
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({"a": {"b": [{1}]}}, TypeError, "expected a dict, .*, got set at 'a.b.0'"),
        ({"a": 1j}, TypeError, "got complex at 'a'"),
        ({"a.b": torch.ones(1)}, ValueError, "must not hold a dot, got 'a.b' at the top"),
        ({"c": {0: torch.ones(1)}}, TypeError, "a dict key must be a str, got 0 at 'c'"),
    ],
    ids=["set", "complex", "dot", "int-key"],
)
def test_what_cannot_be_saved_raises_and_writes_nothing(path, params, error, text):
    with pytest.raises(error, match=text):
        fdl.save(path, params)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "folder"])
def test_a_damaged_file_raises(path, damage):
    fdl.save(path, {"w": torch.ones(20)})
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"garbage": b"x" * 99, "truncated": content[:-4], "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"load: cannot read .*params\.safetensors: \w"):
        fdl.load(path)


def test_other_errors_of_load(path):
    with pytest.raises(FileNotFoundError, match=r"params\.safetensors"):
        fdl.load(path)
    with pytest.raises(OSError, match="No such file"):
        fdl.save(path / "below", {"w": torch.ones(1)})
    safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata={"fdl": "99"})
    with pytest.raises(ValueError, match="has format 99, this fdl reads up to 2"):
        fdl.load(path)
    safetensors.torch.save_file({"a": torch.ones(1), "a.b": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"'a\.b' meets another leaf on its way"):
        fdl.load(path)
