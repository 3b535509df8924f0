"""Measures docs/differences/files.md: one tree at a time through the files of several libraries."""

import contextlib
import io
import tempfile
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree

import fdl
from tests.differences.tables import Table
from tests.differences.walks import library


class Pair(NamedTuple):
    """A container as users write them."""

    w: torch.Tensor
    b: torch.Tensor


TIED, VIEW = "one tensor at two places", "a view of two rows out of 1000"


def values():
    """The trees, made anew for each file."""
    one = torch.arange(3.0)
    shared = torch.ones(4)
    return {
        "float32 [3]": {"x": one},
        "bfloat16 [3]": {"x": one.bfloat16()},
        "float8_e4m3fn [3]": {"x": one.to(torch.float8_e4m3fn)},
        "complex64 [3]": {"x": torch.complex(one, one)},
        "int64 [], 2⁵³ + 1": {"x": torch.tensor(2**53 + 1)},
        "float32 [0, 3]": {"x": torch.zeros(0, 3)},
        "NaN with a payload": {"x": torch.tensor([0x7FC00001]).int().view(torch.float32)},
        "a transposed matrix": {"x": torch.arange(6.0).view(2, 3).T},
        TIED: {"x": shared, "y": shared},
        VIEW: {"x": torch.ones(1000, 3)[:2]},
        "a list": {"x": [one, one + 1]},
        "a tuple": {"x": (one, one + 1)},
        "a NamedTuple": {"x": Pair(one, one + 1)},
        "an empty dict": {"x": {}, "y": one},
        "integer keys": {0: one, 1: one + 1},
        "a dot in a key": {"a.b": one, "a": {"c": one}},
        "keys b, a": {"b": one, "a": one + 1},
        "an OrderedDict": OrderedDict(b=one, a=one + 1),
        "None": {"x": None, "y": one},
        "numbers and a string": {"x": 1, "y": 0.1, "z": "it"},
    }


def of_numpy(node, asarray=lambda x: x):
    """The tree with arrays of NumPy, bfloat16 and others by ml_dtypes as JAX has them."""
    import ml_dtypes

    narrow = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}

    def array(x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype in narrow:
            bits = x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int8)
            return asarray(bits.numpy().view(narrow[x.dtype]))
        return asarray(x.numpy())

    return mapped(array, node)


def mapped(f, node):
    """Apply a function to the leaves of dicts, lists, tuples and NamedTuples."""
    if isinstance(node, dict):
        return type(node)((key, mapped(f, value)) for key, value in node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(mapped(f, value) for value in node))
    if isinstance(node, list | tuple):
        return type(node)(mapped(f, value) for value in node)
    return f(node)


def through_fdl(value, path):
    """`fdl.io`: a file and back, without `like`."""
    fdl.io.save(path / "it.safetensors", value)
    return fdl.io.load(path / "it.safetensors"), path / "it.safetensors"


def through_fdl_like(value, path):
    """The same with `like`, a tree of the structure that is expected."""
    fdl.io.save(path / "it.safetensors", value)
    return fdl.io.load(path / "it.safetensors", like=value), path / "it.safetensors"


def through_safetensors(value, path):
    """safetensors' own functions for torch."""
    from safetensors.torch import load_file, save_file

    save_file(value, path / "it")
    return load_file(path / "it"), path / "it"


def through_torch(value, path):
    """`torch.save` and `torch.load` with its defaults."""
    torch.save(value, path / "it")
    return torch.load(path / "it"), path / "it"


def through_dcp(value, path):
    """`torch.distributed.checkpoint` in one process, into a tree of zeros."""
    import torch.distributed.checkpoint as dcp

    def blank(x):
        return torch.zeros_like(x) if isinstance(x, torch.Tensor) else x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(value, checkpoint_id=path / "it", no_dist=True)
        into = mapped(blank, value)
        dcp.load(into, checkpoint_id=path / "it", no_dist=True)
    return into, next((path / "it").glob("*.distcp"))


def through_npz(value, path):
    """`numpy.savez` and `numpy.load` with its defaults."""
    np.savez(path / "it.npz", **of_numpy(value))
    with np.load(path / "it.npz") as file:
        return {name: file[name] for name in file.files}, path / "it.npz"


def through_msgpack(value, path):
    """Flax's msgpack, restored without a target."""
    from flax import serialization

    data = serialization.to_bytes(of_numpy(value))
    (path / "it").write_bytes(data)
    return serialization.msgpack_restore(data), path / "it"


def through_orbax(value, path):
    """Orbax's `PyTreeCheckpointer`, restored without a target."""
    import logging

    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpointer.save(path / "it", of_numpy(value))
        return checkpointer.restore(path / "it"), None


class Holder(torch.nn.Module):
    """A model that returns a tree, so that the tree can be in the file of a program."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        """The tree; x is there since a program has an input."""
        return self.value


def through_pt2(value, path):
    """`torch.export.save` of a model that returns the tree, loaded and called."""
    program = torch.export.export(Holder(value), (torch.zeros(1),))
    torch.export.save(program, path / "it.pt2")
    return torch.export.load(path / "it.pt2").module()(torch.zeros(1)), path / "it.pt2"


def through_onnx(value, path):
    """`torch.onnx.export` of the same model, run by ONNX's reference implementation.

    The file has a list of tensors; they are put back into the tree here.
    """
    import logging

    from onnx.reference import ReferenceEvaluator

    for name in ("torch.onnx", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Holder(value), (torch.zeros(1),), path / "it.onnx", dynamo=True)
    model = ReferenceEvaluator(str(path / "it.onnx"))
    inputs = dict.fromkeys(model.input_names, np.zeros(1, np.float32))
    return pytree.tree_unflatten(
        model.run(None, inputs), pytree.tree_structure(value)
    ), path / "it.onnx"


ROUTES = {
    "fdl.io": ("torch", through_fdl),
    "fdl.io, `like`": ("torch", through_fdl_like),
    "safetensors": ("safetensors", through_safetensors),
    "torch.save": ("torch", through_torch),
    "DCP": ("torch", through_dcp),
    ".pt2": ("torch", through_pt2),
    "ONNX, tensors": ("onnx", through_onnx),
    "npz": ("ml_dtypes", through_npz),
    "msgpack (Flax)": ("flax", through_msgpack),
    "Orbax": ("orbax", through_orbax),
}


def bits(x):
    """The shape, the dtype by its name, and the bytes of a tensor or an array."""
    if isinstance(x, torch.Tensor):
        raw = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
        return tuple(x.shape), str(x.dtype).removeprefix("torch."), raw
    x = np.asarray(x)
    return tuple(x.shape), str(x.dtype).lstrip("|"), x.tobytes()


def kind(x):
    """What a value is, with an article."""
    return "an array" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"


def lost(old, new):
    """What is not as it was, in a few words: the first thing that is found."""
    if isinstance(old, torch.Tensor):
        if not hasattr(new, "dtype"):
            return kind(new)
        (shape, dtype, raw), (shape_now, dtype_now, raw_now) = bits(old), bits(new)
        if dtype != dtype_now:
            return f"dtype {dtype_now}"
        return f"shape {list(shape_now)}" if shape != shape_now else "bits" * (raw != raw_now)
    if isinstance(old, dict):
        if not isinstance(new, dict) or len(new) != len(old):
            return "empty parts" if isinstance(new, dict) else kind(new)
        if set(new) != set(old):
            return f"keys are {', '.join(map(repr, new))}"
        if inner := next(filter(None, (lost(old[key], new[key]) for key in old)), ""):
            return inner
        if list(new) != list(old):
            return "the order of the keys"
        return kind(new) * (type(new) is not type(old) and type(old) is not dict)
    if isinstance(old, list | tuple):
        if isinstance(new, dict):
            return f"a dict, keys {', '.join(map(repr, new))}"
        if type(new) is not type(old):
            return kind(new)
        return next(filter(None, map(lost, old, new)), "")
    same = type(new) is type(old) and new == old
    return "" if same else f"{old!r} is {kind(new)}"


def outcome(name, route):
    """What a route does with a tree: keeps it, loses something, or refuses."""
    value = values()[name]
    with tempfile.TemporaryDirectory() as folder:
        try:
            back, file = route(value, Path(folder))
        except Exception as error:
            return f"refuses ({type(error).__name__})"
        size = file.stat().st_size if file else 0
    found = lost(value, back)
    if name == TIED and not found:
        found = "two tensors" * (back["x"] is not back["y"])
    if name == VIEW and not found and size > 10_000:
        found = "all 1000 rows in the file"
    return found or "keeps"


def row(name):
    """A row: the outcome of every route that is installed."""
    return {
        column: outcome(name, route)
        for column, (needed, route) in ROUTES.items()
        if library(needed) is not None
    }


TABLES = (
    Table(
        "files",
        ("tree", *ROUTES),
        {name: partial(row, name) for name in values()},
        ("torch", "safetensors", "numpy", "flax", "orbax-checkpoint", "onnx"),
    ),
)
