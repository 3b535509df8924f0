"""What is written as JSON is JSON: other readers take it, and numbers come back as they were."""

import ast
import json
import math
import struct
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fdl
from fdl import TrainState, nn, optim, random
from fdl.checkpointing import Checkpointer, _folder
from fdl.io import _json

ROOT = Path(fdl.__file__).parents[1]
FOLDERS = ["fdl", "models", "train"]
STATE = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
INF, NAN = float("inf"), float("nan")


def strict(text: str | bytes) -> Any:
    """Parse JSON as RFC 8259 has it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return strict(content[8 : 8 + length])


# One way to write it


def lax_writers(source: str) -> list[int]:
    """List the lines that have the module json write, by whatever name, without allow_nan=False."""
    tree = ast.parse(source)
    modules, functions = {"json"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname for a in node.names if a.name == "json" and a.asname}
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            functions |= {a.asname or a.name for a in node.names if a.name in ("dump", "dumps")}

    def writes(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            of_json = getattr(node.value, "id", None) in modules
            return of_json and node.attr in ("dump", "dumps", "JSONEncoder")
        return isinstance(node, ast.Name) and node.id in functions

    strict = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(
            k.arg == "allow_nan" and getattr(k.value, "value", 1) is False for k in node.keywords
        )
    }
    return [n.lineno for n in ast.walk(tree) if writes(n) and id(n) not in strict]


@pytest.mark.parametrize(
    ("line", "lax"),
    [
        ("json.dumps(1)", True),
        ("json.dump(1, f)", True),
        ("json.dumps(1, allow_nan=True)", True),
        ("json.JSONEncoder()", True),
        ("map(json.dumps, [1])", True),
        ("import json as j; j.dumps(1)", True),
        ("from json import dumps as d; d(1)", True),
        ("json.dumps(1, indent=1, allow_nan=False)", False),
        ("json.loads('1')", False),
        ("d(1)", False),
    ],
)
def test_the_law_sees_each_way_to_write(line: str, lax: bool) -> None:
    assert bool(lax_writers(line)) == lax


@pytest.mark.parametrize("folder", FOLDERS)
def test_json_is_written_strictly(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    found = {path: lines for path, text in sources.items() if (lines := lax_writers(text))}
    assert not found, f"write with fdl.io._json.dumps: {found}"


def test_that_place_is_strict() -> None:
    value = {"a": [NAN, INF, -INF, 1.5, "NaN", np.float64("nan")], "b": {"c": (INF, None, True)}}
    expected = ["NaN", "Infinity", "-Infinity", 1.5, "NaN", "NaN"]
    assert strict(_json.dumps(value)) == {"a": expected, "b": {"c": ["Infinity", None, True]}}
    assert [str(float(text)) for text in expected[:3]] == ["nan", "inf", "-inf"]
    assert _json.dumps({"a": 1}, indent=1) == '{\n "a": 1\n}'


# Metadata


NUMBERS = st.floats() | st.integers(-(2**70), 2**70) | st.booleans() | st.none()
METADATA = st.dictionaries(
    st.text(),
    st.recursive(
        NUMBERS | st.text() | st.sampled_from(["NaN", "Infinity", "-Infinity"]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    ),
    max_size=4,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(METADATA)
def test_metadata_comes_back_from_a_file_of_strict_json(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "it.safetensors"
    fdl.io.save(path, {"w": torch.ones(1), "x": [NAN, INF]}, metadata=metadata)
    texts = header(path)["__metadata__"]
    for name in ("fdl.tree", "fdl.ties", "fdl.metadata"):
        strict(texts[name])
    assert same(fdl.io.inspect(path).metadata, metadata)


def test_only_files_that_need_them_have_places_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    fdl.io.save(path, {}, metadata={"clip": 1.0, "text": "NaN"})
    assert "fdl.floats" not in header(path)["__metadata__"]
    fdl.io.save(path, {}, metadata={"clip": [INF, "NaN"]})
    texts = header(path)["__metadata__"]
    assert strict(texts["fdl.metadata"]) == {"clip": ["Infinity", "NaN"]}
    assert strict(texts["fdl.floats"]) == [["clip", 0]]


def test_files_with_bare_words_as_written_before_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fdl.io._tree_file, "as_texts", lambda value: (value, []))
    monkeypatch.setattr(fdl.io._tree_file, "dumps", json.dumps)
    fdl.io.save(tmp_path / "it", {"w": torch.ones(1)}, metadata={"loss": NAN, "clip": -INF})
    assert "NaN" in header(tmp_path / "it")["__metadata__"]["fdl.metadata"]
    assert repr(fdl.io.inspect(tmp_path / "it").metadata) == "{'loss': nan, 'clip': -inf}"


@pytest.mark.parametrize(
    "places", [5, {}, None, "x", [["a"]], [[]], [["b", 0]], [[{}]], [["a", "b"]], [["c", 9]], [5]]
)
def test_places_that_are_none_are_a_value_error(places: Any) -> None:
    value = {"a": "one", "b": 1.0, "c": ["NaN"]}
    if places == {}:
        assert _json.as_numbers(value, places) == value  # nothing is listed
        return
    with pytest.raises(ValueError):
        _json.as_numbers(value, places)


# What JSON cannot say


@dataclass
class Options:
    lr: float = 0.1


ODD: dict[str, tuple[Any, str]] = {
    "path": (Path("x"), "got PosixPath; make it a str"),
    "numpy-number": (np.float32(1), r"got float32; use its .tolist\(\)"),
    "numpy-float64": (np.float64(1), r"got float64; use its .tolist\(\)"),
    "numpy-array": (np.ones(2), r"got ndarray; use its .tolist\(\)"),
    "tensor": (torch.tensor(1.0), r"got Tensor; use its .tolist\(\)"),
    "tuple": ((1, 2), "got tuple; make it a list"),
    "set": ({1}, "got set; make it a list"),
    "mapping": (MappingProxyType({}), "got mappingproxy; make it a dict"),
    "dataclass": (Options(), "got Options; use dataclasses.asdict"),
    "function": (len, "got builtin_function_or_method"),
    "bytes": (b"x", "got bytes"),
    "complex": (1j, "got complex"),
    "dtype": (torch.float32, "got dtype"),
    "key": ({1: 2}, "a key must be a str, got 1"),
}


@pytest.fixture
def it(tmp_path: Path) -> Any:
    with Checkpointer(tmp_path / "run") as made:
        yield made


@pytest.mark.parametrize(("value", "message"), ODD.values(), ids=ODD)
def test_odd_metadata_and_config_are_refused_at_once_by_their_path(
    value: Any, message: str, it: Checkpointer, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=rf"^save: metadata\['a'\]\[1\]: .*{message}$"):
        fdl.io.save(tmp_path / "it", {}, metadata={"a": [0, value]})
    with pytest.raises(TypeError, match=rf"^Checkpointer.save: config\['a'\]\[1\]: .*{message}$"):
        it.save(STATE, config={"a": [0, value]})
    it.wait()  # nothing was queued
    assert it.latest() is None
    it.save(STATE)
    assert it.latest() is not None


def test_dicts_of_other_classes_are_dicts_in_metadata(tmp_path: Path) -> None:
    fdl.io.save(tmp_path / "it", {}, metadata={"a": OrderedDict(b=defaultdict(int, c=1))})
    assert fdl.io.inspect(tmp_path / "it").metadata == {"a": {"b": {"c": 1}}}


def test_a_number_of_thousands_of_digits_is_refused(it: Checkpointer) -> None:
    it.save(STATE, config={"n": 10**3999})
    it.wait()
    with pytest.raises(ValueError, match=r"config\['n'\]: an integer with more than 4,000 digits"):
        it.save(STATE, config={"n": -(10**4000)})
    with pytest.raises(ValueError, match=r"an integer with more than 4,000 digits at 'buffers.n'"):
        it.save(STATE._replace(buffers={"n": 10**4000}))


@pytest.mark.parametrize("config", [Options(), [1], "text"])
def test_a_config_that_is_no_dict_is_refused(config: Any, it: Checkpointer) -> None:
    with pytest.raises(TypeError, match=r"config must be a dict, got \w+; .*dataclasses.asdict"):
        it.save(STATE, config=config)


def test_a_config_may_change_after_the_call(it: Checkpointer, monkeypatch: Any) -> None:
    config = {"rates": [0.1]}
    held = []
    monkeypatch.setattr(it._pool, "submit", lambda f, *args: held.append((f, args)))
    it.save(STATE, config=config)
    config["rates"].append(0.2)
    ((write, arguments),) = held
    write(*arguments)
    (found,) = _folder.checkpoints(it.folder)
    assert found.config == {"rates": [0.1]}


METRICS: dict[str, tuple[Any, float]] = {
    "float": (0.5, 0.5),
    "int": (2, 2.0),
    "bool": (True, 1.0),
    "numpy": (np.float32(0.5), 0.5),
    "numpy-0d": (np.array(0.5), 0.5),
    "tensor": (torch.tensor(0.5), 0.5),
    "bfloat16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "numpy-one-element": (np.array([0.5]), 0.5),
    "one-element": (torch.tensor([0.5]), 0.5),
    "mean": (fdl.metrics.Mean(torch.tensor(3.0), torch.tensor(6)), 0.5),
    "with-grad": (torch.tensor(0.5, requires_grad=True), 0.5),
    "infinite": (torch.tensor(-INF), -INF),
}


@pytest.mark.parametrize(("value", "expected"), METRICS.values(), ids=METRICS)
def test_metrics_of_every_kind_of_number(value: Any, expected: float, it: Checkpointer) -> None:
    it.save(STATE, metrics={"loss": value})
    found = it.latest()
    assert found is not None
    assert found.metrics == {"loss": expected}
    assert type(found.metrics["loss"]) is float


@pytest.mark.parametrize(
    "value", [None, "0.5", [0.5], torch.ones(2), 1j, 10**400, {}, torch.tensor(1j), np.ones(2)]
)
def test_metrics_that_are_no_number_are_refused_at_once(value: Any, it: Checkpointer) -> None:
    with pytest.raises(TypeError, match=r"Checkpointer.save: metrics\['loss'\] must be one number"):
        it.save(STATE, metrics={"loss": value})
    with pytest.raises(TypeError, match="names of metrics must be str, got 1"):
        it.save(STATE, metrics={1: 0.5})  # type: ignore[dict-item]
    it.wait()
    assert it.latest() is None


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        (STATE._replace(buffers={"a": np.ones(2)}), TypeError, "got ndarray at 'buffers.a'"),
        (STATE._replace(buffers={"a": int}), TypeError, "got type at 'buffers.a'"),
        (
            STATE._replace(buffers={"a": MappingProxyType({})}),
            TypeError,
            "got mappingproxy at 'buffers.a'; make it a dict",
        ),
        (STATE._replace(buffers={"a.": torch.ones(1)}), ValueError, "before and after each dot"),
        (STATE._replace(buffers={"a": torch.ones(1).to_sparse()}), TypeError, "make it dense"),
        (STATE._replace(buffers={"a": torch.ones(1, device="meta")}), TypeError, "meta"),
        ({"w": torch.ones(1)}, TypeError, "state must be a TrainState, got dict without a"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused_at_once(
    state: Any, kind: type[Exception], message: str, it: Checkpointer
) -> None:
    with pytest.raises(kind, match=message):
        it.save(state)
    it.wait()
    assert it.latest() is None


# The best among numbers that are not finite


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_what_is_not_finite_is_never_the_best(mode: Any, odd: float, tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=1, best=("loss", mode)) as it:
        for step, loss in enumerate([odd, 0.3, 0.3, odd, odd]):
            it.save(STATE._replace(step=torch.tensor(step)), metrics={"loss": loss})
        best = it.best("loss", mode)
    assert best is not None
    assert best.step == 2  # of equal ones the newest
    assert [found.step for found in _folder.checkpoints(tmp_path)] == [4, 2]
    with Checkpointer(tmp_path / "other", keep=1, best=("loss", mode)) as it:
        it.save(STATE, metrics={"loss": odd})
        it.save(STATE, metrics={"loss": odd})
        assert it.best("loss", mode) is None
    assert len(_folder.checkpoints(tmp_path / "other")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 2.0}, "keep must be an int, got 2.0"),
        ({"best": "loss"}, "best must be a metric and a mode"),
        ({"best": ("loss",)}, "best must be a metric and a mode"),
        ({"best": ("loss", "min", 1)}, "best must be a metric and a mode"),
    ],
)
def test_options_of_another_kind_are_refused_before_anything_is_made(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        Checkpointer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


# Null metadata


def test_null_metadata_is_none_at_all(tmp_path: Path) -> None:
    text = b'{"__metadata__":null,"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    content = len(text).to_bytes(8, "little") + text + struct.pack("<f", 2.5)
    (tmp_path / "it").write_bytes(content)
    assert fdl.io.load(tmp_path / "it")["w"].tolist() == [2.5]
    assert fdl.io.inspect(tmp_path / "it").metadata == {}
    from safetensors.torch import load

    assert load(content)["w"].tolist() == [2.5]
