"""Damaged and hostile files: refused with a clear error, quickly, with little memory."""

import json
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

import fdl
from fdl import metrics

ROOT = Path(__file__).parents[2]
REFUSED = r"load: cannot read .*: \S"


def written(path) -> bytes:
    w = torch.arange(120.0).reshape(3, 40)
    mean = metrics.Mean(torch.tensor(1.0).double(), torch.tensor(2.0).double())
    fdl.io.save(
        path,
        {"w": w, "tied": w, "mean": mean, "rest": [None, 1, 0.5, "text", (), torch.zeros(0, 3)]},
        metadata={"epoch": 3, "config": {"lr": 0.1}},
    )
    return path.read_bytes()


def boundaries(content: bytes) -> list[int]:
    """Where a part of the header begins or ends: its length, each token, each tensor."""
    length = int.from_bytes(content[:8], "little")
    tokens = [8 + i for i, byte in enumerate(content[8 : 8 + length]) if byte in b'{}[]":, ']
    return [*range(9), *tokens, *(i + 1 for i in tokens), *range(8 + length, len(content))]


@pytest.mark.slow
def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "it"
    content = written(path)
    assert 8 * len(content) >= 10_000
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=REFUSED):
            fdl.io.load(path)


def test_every_flipped_bit_of_the_header_is_found_without_the_tensors(tmp_path):
    path = tmp_path / "it"
    content = written(path)
    for bit in random.Random(1).sample(range(8 * (8 + int.from_bytes(content[:8], "little"))), 500):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"inspect: cannot read .*: \S"):
            fdl.io.inspect(path)


@pytest.mark.slow
def test_every_truncation_is_found(tmp_path):
    path = tmp_path / "it"
    content = written(path)
    for end in {*boundaries(content)} - {len(content)}:
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=REFUSED):
            fdl.io.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=REFUSED):
        fdl.io.load(path)
    path.write_bytes(content)
    fdl.io.load(path)


def file_of(header: str | bytes | dict, content: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return len(header).to_bytes(8, "little") + header + content


def one(dtype="F32", shape=(1,), offsets=(0, 4), content=b"abcd") -> bytes:
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    return file_of({"x": entry}, content)


def two(first, second, size=8) -> bytes:
    entry = {"dtype": "F32", "shape": [1]}
    header = {"a": {**entry, "data_offsets": first}, "b": {**entry, "data_offsets": second}}
    return file_of(header, bytes(size))


X = '"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
HOSTILE = {
    "garbage": (b"x" * 99, "expected a safetensors header"),
    "empty": (b"", "expected a safetensors header, got 0 bytes"),
    "negative-length": (struct.pack("<q", -1) + b"{}", "expected a safetensors header"),
    "huge-shape": (one(shape=[2**40]), "takes 4,398,046,511,104 bytes by its shape, 4 by its off"),
    "overflowing-shape": (one(shape=[2**33, 2**33]), "impossible shape"),
    "overflow-to-zero": (one(shape=[2**62, 4], offsets=[0, 0], content=b""), "impossible shape"),
    "overflow-beside-zero": (one(shape=[0, 2**62, 4], offsets=[0, 0], content=b""), "impossible"),
    "many-axes": (one(shape=[2] * 100_000), "impossible shape"),
    "negative-shape": (one(shape=[-1]), "impossible shape or offsets"),
    "negative-shapes": (one(shape=[-1, -1]), "impossible shape or offsets"),
    "float-shape": (one(shape=[1.0]), "impossible shape or offsets"),
    "nan-shape": (one(shape=[float("nan")]), "impossible shape or offsets"),
    "bool-shape": (one(shape=[True]), "impossible shape or offsets"),
    "long-number": (file_of(X.replace("1]", "1" * 5000 + "]", 1).join("{}")), "5000 digits"),
    "dtype": (one(dtype="F31"), "has dtype 'F31', expected one of F64"),
    "dtype-of-another-size": (one(dtype="F64"), "takes 8 bytes by its shape, 4 by its offsets"),
    "odd-f4": (one(dtype="F4", shape=[1], offsets=[0, 1], content=b"a"), "F4 whose last axis"),
    "backward": (one(offsets=[4, 0]), "impossible shape or offsets"),
    "negative-offset": (one(offsets=[-4, 0]), "impossible shape or offsets"),
    "beyond-the-end": (one(offsets=[0, 4], content=b"ab"), "expected 4 bytes of tensors, got 2"),
    "trailing": (one(content=b"abcdef"), "expected 4 bytes of tensors, got 6"),
    "overlap": (two([0, 4], [2, 6], 6), "'b' overlaps another tensor"),
    "same-place": (two([0, 4], [0, 4], 4), "'b' overlaps another tensor"),
    "hole": (two([0, 4], [5, 9], 9), "'b' comes after a hole"),
    "duplicate": (file_of("{" + X + "," + X + "}", b"a"), "'x' occurs twice"),
    "duplicate-field": (file_of('{"x":{"dtype":"U8","dtype":"I8"}}', b"a"), "'dtype' occurs twice"),
    "missing-field": (file_of({"x": {"dtype": "U8", "shape": [1]}}), "needs exactly dtype, shape"),
    "further-field": (file_of({"x": {"dtype": 1, "shape": 1, "data_offsets": 1, "y": 1}}), "needs"),
    "not-an-object": (file_of("[1]"), "header is not an object"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "must map names to strings"),
    "not-utf-8": (file_of(b'{"\xff":1}'), "not valid JSON"),
    "trailing-json": (file_of("{}{}"), "not valid JSON"),
    "deep-array": (file_of('{"x":' + "[" * 10**6), "nested too deep"),
    "deep-object": (file_of('{"a":' * 10**6), "nested too deep"),
    "leaf-and-branch": (
        file_of({"a": json.loads(X.join("{}"))["x"], "a.b": {"dtype": "U8", "shape": [0],
                 "data_offsets": [1, 1]}}, b"a"),
        "is a leaf",
    ),
    "empty-part": (
        file_of({"a..b": json.loads(X.join("{}"))["x"]}, b"a"),
        "must have a name before and after",
    ),
    "deep-name": (
        file_of({".".join("a" * 10**5): json.loads(X.join("{}"))["x"]}, b"a"),
        "more than 100 deep",
    ),
    "other-format": (file_of({"__metadata__": {"fdl": "3", "fdl.a": ""}}), "format 3, this fdl"),
    "no-digest": (file_of({"__metadata__": {"fdl": "2"}}), "SHA-256 differs"),
    "format-1-with-a-tree": (file_of({"__metadata__": {"fdl": "1", "fdl.tree": "1"}}), "SHA-256"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "text"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(tmp_path, content, text):
    path = tmp_path / "it"
    path.write_bytes(content)
    start = time.process_time()  # not the clock: the machine may have other work
    with pytest.raises(ValueError, match=REFUSED) as error:
        fdl.io.load(path)
    assert error.match(text) and len(str(error.value)) < 1000 + len(str(path))
    assert time.process_time() - start < 10


# What another reader accepts and we do not, on purpose.
STRICTER = {
    "overflow-beside-zero",
    "duplicate",
    "duplicate-field",
    "leaf-and-branch",
    "empty-part",
    "deep-name",
    "other-format",
    "no-digest",
    "format-1-with-a-tree",
    "further-field",
}


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - STRICTER))
def test_what_is_refused_is_no_file_for_another_reader_either(tmp_path, name):
    path = tmp_path / "it"
    path.write_bytes(HOSTILE[name][0])
    with pytest.raises((SafetensorError, OSError)), safe_open(path, framework="pt"):
        pass


def test_a_name_is_never_the_name_of_a_file(tmp_path):
    """Such names are keys of dicts, whose dots part them."""
    path, home = tmp_path / "it", tmp_path / "home"
    home.mkdir()
    safetensors.torch.save_file({"/etc/x": torch.ones(1), "~\\x": torch.ones(1)}, path)
    assert fdl.io.load(path).keys() == {"/etc/x", "~\\x"}
    safetensors.torch.save_file({"../../x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="must have a name before and after each dot"):
        fdl.io.load(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "it"]


def resigned(path, **changes) -> None:
    """Change the metadata of a file of ours and put the digest in order: the work of an enemy."""
    import hashlib

    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= {f"fdl.{name}": text for name, text in changes.items()}
    header["__metadata__"]["fdl.sha256"] = "0" * 64
    raw = file_of(json.dumps(header, separators=(",", ":")))
    digest = hashlib.sha256(raw).hexdigest()
    raw = raw.replace(b"0" * 64, digest.encode(), 1)
    path.write_bytes(raw + content[8 + length :])


STRUCTURES = {
    "import": ('{"x":["tensor"],"y":["namedtuple","os.system",{"a":1}]}', "which fdl does not kn"),
    "fields": ('["namedtuple","fdl.Mean",{"x":["tensor"]}]', "is a fdl.Mean with fields"),
    "unknown-kind": ('["set",["tensor"]]', "structure is malformed at ''"),
    "no-kind": ("[]", "structure is malformed"),
    "float": ('{"x":["tensor"],"y":["float","zz"]}', "structure is malformed at 'y'"),
    "dot": ('{"x":["tensor"],"a.":1}', "must have a name before and after each dot"),
    "shared-path": ('{"x":["tensor"],"a.b":1,"a":{"b":1}}', "two places have one path"),
    "mapping": ('{"x":["tensor"],"y":["mapping",1,{}]}', "structure is malformed at 'y'"),
    "deep": ('{"a":' * 150 + "1" + "}" * 150, "nested more than 100 deep|too deep"),
    "deeper": ('["list",' * 50_000, "nested too deep"),
    "other-tensor": ('{"y":["tensor"]}', "structure and its list of tensors disagree"),
    "none": ("1", "structure and its list of tensors disagree"),
    "twice": ('{"x":["tensor"],"x":1}', "'x' occurs twice"),
    "broken": ('{"x":', "not valid JSON"),
}


@pytest.mark.parametrize(("structure", "text"), STRUCTURES.values(), ids=STRUCTURES)
def test_a_hostile_structure_is_refused(tmp_path, structure, text):
    path = tmp_path / "it"
    fdl.io.save(path, {"x": torch.ones(1)})
    resigned(path, tree=structure)
    with pytest.raises(ValueError, match=REFUSED) as error:
        fdl.io.load(path)
    assert error.match(text)


@pytest.mark.parametrize(
    "changes",
    [{"ties": "[]"}, {"ties": '{"x":"y"}'}, {"ties": '{"x":[]}'}, {"metadata": "1"}],
    ids=str,
)
def test_hostile_metadata_is_refused(tmp_path, changes):
    path = tmp_path / "it"
    fdl.io.save(path, {"x": torch.ones(1)})
    resigned(path)
    fdl.io.load(path)  # the forger knows the format
    resigned(path, **changes)
    with pytest.raises(ValueError, match=REFUSED):
        fdl.io.load(path)


LIMITED = """
import resource, sys, time
import fdl
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
try:
    fdl.io.load(sys.argv[1])
except ValueError as error:
    print("refused:", str(error)[-200:])
print(int(time.process_time() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def cost(path) -> tuple[str, int, int]:
    """Load a file in a process of its own: the error, seconds of CPU, KiB of memory it took."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    error, figures = done.stdout.strip().splitlines()
    return error, *map(int, figures.split())


@pytest.mark.slow
def test_a_gigabyte_of_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "it"
    with path.open("wb") as file:  # sparse: takes no room
        file.write((2**30).to_bytes(8, "little") + b"{" * 1000)
        file.truncate(2**30 + 8)
    error, seconds, memory = cost(path)
    assert "a header of at most 33,554,432 bytes, got 1,073,741,824" in error
    assert seconds < 10 and memory < 20_000


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["[],", '"",', "0,", "{},"])
def test_the_largest_header_of_nonsense_takes_bounded_memory(tmp_path, unit):
    path = tmp_path / "it"
    path.write_bytes(file_of('{"x":[' + unit * (2**25 // len(unit) - 10) + "0]}"))
    error, seconds, memory = cost(path)
    assert "refused" in error and seconds < 30 and memory < 1_000_000


@pytest.mark.slow
def test_a_terabyte_that_is_not_there_is_not_allocated(tmp_path):
    path = tmp_path / "it"
    path.write_bytes(one(shape=[2**40], offsets=[0, 2**42], content=b""))
    error, _, memory = cost(path)
    assert "expected 4,398,046,511,104 bytes of tensors, got 0" in error and memory < 20_000


def test_the_limits_are_measured_at_all():
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 50_000
