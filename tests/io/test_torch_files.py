"""Files of torch.save: bit by bit in both directions, and none of them runs or fills anything."""

import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fdl
from fdl import tree
from fdl.io._safetensors import DTYPES
from tests.support.asserts import draw, equal_bits, unchanged

ROOT = Path(__file__).parents[2]
FORMATS = {"zip": True, "legacy": False}
PACKED = torch.float4_e2m1fn_x2  # torch cannot save it


OLD = torch.storage._dtype_to_storage_type_map()  # torch reads no others from the older format


@pytest.fixture
def path(tmp_path):
    return tmp_path / "it.pt"


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def saved(path, request):
    """Save by torch in one of its formats."""

    def call(value):
        torch.save(value, path, _use_new_zipfile_serialization=request.param)
        return path

    return call


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        collections.OrderedDict(
            conv=torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)),
            fc=torch.nn.Linear(2, 3),
        )
    )


def test_a_state_dict_becomes_nested_parameters(saved):
    expected = net().state_dict()
    params = fdl.io.load_torch(saved(expected))
    assert list(params) == ["conv", "fc"] and "running_var" in params["conv"]["1"]
    flat = tree.flatten_dict(params)
    assert flat.keys() == expected.keys()
    assert all(equal_bits(flat[name], expected[name]) for name in flat)


def test_a_file_of_another_format_names_what_reads_it(saved, path, tmp_path):
    other = tmp_path / "it.safetensors"
    fdl.io.save(other, {"w": torch.ones(3)})
    for function in (fdl.io.load_torch, fdl.load_program):
        with pytest.raises(ValueError, match=r"it is a safetensors file, for \S*io\.load$"):
            function(other)
    saved({"w": torch.ones(3)})
    with pytest.raises(ValueError, match=r"got one of torch\.save, for io\.load_torch"):
        fdl.io.load(path)


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_a_safetensors_header_may_be_as_long_as_others_begin(start, path):
    """128 bytes, or 19,280: the length comes first, as eight bytes."""
    length = int.from_bytes(start, "little")
    path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    assert fdl.io.load(path) == {}


@pytest.mark.curriculum("C2")
def test_parameters_become_a_state_dict_that_a_module_takes(path):
    source, target = net(), net()
    params = tree.unflatten_dict({name: draw(5, *x.shape).to(x.dtype) for name, x in
                                  source.state_dict().items()})  # fmt: skip
    with unchanged(params):
        fdl.io.save_torch(path, params)
    target.load_state_dict(torch.load(path, weights_only=True))
    assert all(equal_bits(x, target.state_dict()[n]) for n, x in tree.flatten_dict(params).items())
    assert not tree.diff(params, fdl.io.load_torch(path)) and os.listdir(path.parent) == [path.name]


def test_every_dtype_and_every_bit(saved, request):
    content = torch.arange(256, dtype=torch.uint8).repeat(2)
    tensors = {
        name: (content % 2 if dtype == torch.bool else content.clone()).view(dtype)
        for name, dtype in DTYPES.items()
        if dtype != PACKED and (dtype in OLD or "zip" in request.node.name)
    }
    assert len(tensors) >= 11
    tensors |= {"scalar": torch.tensor(-0.0), "empty": torch.zeros(0, 3), "t": draw(0, 3, 4).T}
    loaded = fdl.io.load_torch(saved(tensors))
    assert all(equal_bits(loaded[name], tensors[name]) for name in tensors)
    fdl.io.save_torch(saved({}), tensors)
    loaded = fdl.io.load_torch(saved(tensors))
    assert all(equal_bits(loaded[name], tensors[name]) for name in tensors)


VALUES = {
    "tensor": draw(0, 2, 3),
    "list": [draw(0, 2), draw(1, 3)],
    "tuple": (draw(0, 2),),
    "dict": {"a": draw(0, 2)},
    "list-of-dicts": [{"fc": {"weight": draw(0, 2)}}, draw(1, 1)],
    "empty": {},
}


@pytest.mark.curriculum("B6")
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_tensors_lists_and_dicts(path, value):
    fdl.io.save_torch(path, value)
    loaded = fdl.io.load_torch(path)
    assert type(loaded) is type(value) and not tree.diff(value, loaded)
    theirs = torch.load(path, weights_only=True)
    pairs = zip(tree.leaves(theirs), tree.leaves(value), strict=True)
    assert all(equal_bits(*pair) for pair in pairs)


def test_what_usually_stands_beside_the_weights(saved):
    module = torch.nn.Linear(2, 1)
    checkpoint = {"epoch": 3, "model": module.state_dict(), "loss": 0.5, "name": "x", "none": None}
    loaded = fdl.io.load_torch(saved(checkpoint))
    assert loaded["epoch"] == 3 and loaded["none"] is None and loaded["model"]["weight"].ndim == 2
    parameters = fdl.io.load_torch(saved(list(module.parameters())))
    assert [type(x) for x in parameters] == [torch.Tensor] * 2
    assert not any(x.requires_grad for x in parameters)


def test_a_view_does_not_drag_its_memory_along_and_ties_stay(path):
    large, tied = torch.zeros(100_000), torch.ones(1000)
    fdl.io.save_torch(path, {"row": large[:10], "a": tied, "b": tied})
    assert path.stat().st_size < 8000
    loaded = fdl.io.load_torch(path)
    loaded["a"].zero_()
    assert loaded["b"].sum() == 0


def test_a_failure_leaves_the_old_file(path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    fdl.io.save_torch(path, {"w": torch.ones(2)})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        fdl.io.save_torch(path, {"w": torch.zeros(2)})
    assert fdl.io.load_torch(path)["w"].sum() == 2 and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ({"a": {"b": [torch.ones(1)]}, "c": 1}, TypeError, "a.b: list\n  c: int"),
        (None, TypeError, ": NoneType"),
        (fdl.metrics.Mean(torch.ones(1), torch.ones(1)), TypeError, ": Mean"),
        ({"a.": torch.ones(1)}, ValueError, "before and after each dot, got 'a.'"),
    ],
    ids=["list-in-dict", "none", "record", "dot"],
)
def test_what_is_no_state_dict_raises_and_writes_nothing(path, params, error, text):
    with pytest.raises(error, match=text):
        fdl.io.save_torch(path, params)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ({"a": {True: torch.ones(1)}}, TypeError, "a key at 'a' must be a str .* got True"),
        ({"a": {("x", 0): torch.ones(1)}}, TypeError, "a key at 'a' must be a str .* got .'x', 0"),
        ({"a..b": torch.ones(1)}, ValueError, "a key at '' must be a str with dots between"),
        (
            {"a": torch.ones(1), "a.b": torch.ones(1)},
            ValueError,
            "at '': .*cannot place 'a.b': 'a' is a leaf",
        ),
        ({"a": b"bytes"}, (TypeError, ValueError), "got bytes at 'a'|names '_codecs.encode'"),
        ({"a": {1, 2}}, ValueError, "names '.*builtin.*.set'"),
        (torch.nn.Linear(1, 1), ValueError, "'torch.nn.modules.linear.Linear', .* trust"),
        (torch.ones(2).to_sparse(), ValueError, "names 'torch._utils._rebuild_sparse_tensor'"),
    ],
    ids=[
        "bool-key",
        "tuple-key",
        "empty-part",
        "leaf-and-branch",
        "bytes",
        "set",
        "module",
        "sparse",
    ],
)
def test_what_is_no_tree_of_parameters_is_refused(saved, value, error, text):
    with pytest.raises(error, match=text):
        fdl.io.load_torch(saved(value))


class Runs:
    """Its pickle calls something."""

    def __init__(self, f, *args):
        self.call = f, args

    def __reduce__(self):
        return self.call


CALLS = {
    "system": (os.system, "touch ran"),
    "eval": (eval, "open('ran', 'w')"),
    "bytearray": (bytearray, 2**40),
    "getattr": (getattr, "x", "upper"),
    "storage": (torch.UntypedStorage, 2**10),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_is_refused(saved, name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, value = saved({"w": torch.ones(2)}), {"w": Runs(*CALLS[name])}
    if path.read_bytes()[:2] == b"PK":
        replace(path, {"data.pkl": pickle.dumps(value, protocol)})
    else:
        content = path.read_bytes()
        stream = io.BytesIO(content)
        for _ in range(3):
            pickle.load(stream)
        path.write_bytes(content[: stream.tell()] + pickle.dumps(value, protocol))
    with pytest.raises(
        (ValueError, TypeError), match=r"load_torch: .*(names|STACK|got|storage|exhausted)"
    ):
        fdl.io.load_torch(path)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path.write_bytes(pickle.dumps(Runs(os.system, "touch ran"), 2))
    with pytest.raises(ValueError, match=r"its pickle names 'posix.system'"):
        fdl.io.load_torch(path)
    assert not (tmp_path / "ran").exists()


def replace(path, records, compression=zipfile.ZIP_STORED, further=()) -> None:
    """Write an archive of torch anew, with other content for some records."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, old in content.items():
            archive.writestr(name, records.get(name.split("/")[-1], old))
        for name, text in further:
            archive.writestr(name, text)


MEASURED = """
import resource, sys
import fdl
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    fdl.io.load_torch(sys.argv[1])
except ValueError as error:
    print("refused:", str(error)[-200:].replace(chr(10), " "))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def cost(path) -> tuple[str, int]:
    """Load a file in a process of its own: the error, and the KiB of memory that it took."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    error, memory = done.stdout.strip().splitlines()
    return error, int(memory)


@pytest.mark.slow
def test_a_zip_bomb_is_refused(path):
    torch.save({"w": torch.zeros(25_000_000)}, path)
    replace(path, {}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    error, memory = cost(path)
    assert "its records are compressed" in error and memory < 30_000


def test_an_archive_whose_records_overlap_is_refused(path):
    """Many entries of the directory that claim the same bytes, none of them compressed."""
    torch.save({"w": torch.zeros(1000)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        at = archive.start_dir
    end = content.rindex(b"PK\x05\x06")
    directory, tail = content[at:end], bytearray(content[end:])
    count = len(zipfile.ZipFile(path).infolist())
    # The same directory twice: every record stands in it two times, at one place.
    tail[8:10] = tail[10:12] = (2 * count).to_bytes(2, "little")
    tail[12:16] = (2 * len(directory)).to_bytes(4, "little")
    forged = content[: content.rindex(directory) + len(directory)] + directory + bytes(tail)
    path.write_bytes(forged)
    with pytest.raises(ValueError, match=r"load_torch: cannot read .*(twice|claim|zip|archive)"):
        fdl.io.load_torch(path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2**28, 2**40])
def test_a_tensor_that_claims_more_than_there_is_takes_no_memory(saved, size):
    path = saved({"w": torch.ones(0x35)})
    ask = b"\x8a\x06" + size.to_bytes(6, "little")  # LONG1 in the place of BININT1
    if path.read_bytes()[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            old = archive.read(name)
        replace(path, {"data.pkl": old.replace(b"K\x35", ask)})
    else:
        path.write_bytes(path.read_bytes().replace(b"K\x35", ask))
    error, memory = cost(path)
    assert "refused" in error and memory < 50_000


DAMAGES = {
    "empty": lambda content: b"",
    "garbage": lambda content: b"x" * 99,
    "half": lambda content: content[: len(content) // 2],
    "short": lambda content: content[:3],
    "zeros": lambda content: bytes(len(content)),
    "other-archive": lambda content: other_archive(),
}


def other_archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("note.txt", "hello")
    return stream.getvalue()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_raises(saved, damage):
    path = saved({"w": torch.ones(20)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"load_torch: cannot read .*it\.pt: \S"):
        fdl.io.load_torch(path)


def test_a_record_that_stands_twice_is_refused(path):
    torch.save({"w": torch.ones(2)}, path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        replace(path, {}, further=[("it/data.pkl", b"\x80\x02}.")])
    with pytest.raises(ValueError, match="a record occurs twice"):
        fdl.io.load_torch(path)


def test_an_absent_file(path):
    with pytest.raises(FileNotFoundError, match=r"load_torch: no such file: .*it\.pt"):
        fdl.io.load_torch(path)
