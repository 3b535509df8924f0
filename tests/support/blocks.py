"""Regions without Inductor: only their kernels are compiled, and the graph runs eagerly."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from torch import Tensor
from torch.fx import GraphModule, Node

from fdl import jit, tree
from fdl._compiler import _block_pass, _inductor, _passes
from fdl._compiler._block_axes import CONVOLUTIONS
from fdl._compiler._block_product_cost import has_matrices
from fdl._compiler._blocks import BLOCKS, headers
from fdl._compiler._graph import copy_graph, operations

# Settings of hypothesis for random nets: the same at each run, however long one takes.
EVERY: Any = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
FLAGS = ["-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off"]
TYPES = {torch.float32: "float*", torch.float64: "double*", torch.bool: "bool*"}


@cache
def compile_kernel(text: str, flags: tuple[str, ...]) -> Any:
    """Compile the kernel of a region; it is kept with the programs of tests."""
    name = sha256(repr((text, flags)).encode()).hexdigest()
    folder = Path(os.environ.get("FDL_CACHE") or tempfile.gettempdir()) / "blocks"
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            source, made = Path(place, "kernel.cpp"), Path(place, "kernel.so")
            source.write_text(text)
            command = [os.environ.get("CXX", "g++"), *FLAGS, *flags, str(source), "-o", str(made)]
            subprocess.run(command, check=True)
            made.replace(library)
    return ctypes.CDLL(str(library)).kernel


def has_layer(group: list[Node]) -> bool:
    """Choose all that a region can be made of, in place of the estimate of what it saves."""
    return any(node.target in CONVOLUTIONS or has_matrices(node) for node in group)


class Regions:
    """The kernels of regions that a test has run."""

    def __init__(self, *flags: str) -> None:
        self.flags = flags or ("-O1", "-march=native")
        self.sources: list[str] = []  # of each call in a graph
        self.graphs: list[GraphModule] = []
        self.calls = 0

    def run(self, source: str, reads: list[Tensor], *, writes: list[Tensor]) -> None:
        """Compute what a kernel of a region writes."""
        self.calls += 1
        reads = [x.contiguous() for x in reads]
        assert all(x.is_contiguous() for x in writes)
        every = [*reads, *writes]
        types = ", ".join(f"{TYPES[x.dtype]} a{i}" for i, x in enumerate(every))
        text = source.replace("#include BLOCK_HEADERS", headers())
        text = text.replace("ARGUMENTS", ", ".join(f"a{i}" for i in range(len(every))))
        text = text.replace("KERNEL_NAME", "kernel").replace("PARAMETERS", types)
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in every]
        compile_kernel(text, self.flags)(*addresses)

    def lower(self, graph: GraphModule, mode: Any, *_: Any) -> Callable[[list[Tensor]], Any]:
        """Stand in for Inductor."""
        from torch._inductor.virtualized import V

        copy = copy_graph(graph)
        with V.set_fake_mode(mode):
            _passes.rewrite(copy, True)
        self.graphs.append(copy)
        self.sources += [str(z.args[0]) for z in operations(copy) if z.target is BLOCKS]
        return lambda leaves: copy(*leaves)

    @contextmanager
    def used(self, pays: bool = True) -> Iterator["Regions"]:
        """Let `jit` compile only the kernels of regions; `pays`: wherever there can be one."""
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.library._scoped_library("fdl", "FRAGMENT") as library,
        ):
            library.impl("blocks_", self.run, "CPU")
            patch.setattr(_inductor, "lower", self.lower)
            patch.setattr(_block_pass, "pays", lambda group: pays and has_layer(group))
            patch.setattr(_passes, "merge_families", lambda module: None)
            patch.setattr(_passes, "RULES_OF_PRODUCTS", {})
            yield self


def assert_close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Compare trees; the tolerance is relative to the largest number of a leaf."""
    for a, b in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        finite = b[b.isfinite()].double()
        scale = finite.abs().max().item() if finite.numel() else 0
        rounding = {torch.float32: 1e-5, torch.float64: tolerance}.get(b.dtype, 0)
        torch.testing.assert_close(
            a, b, rtol=rounding, atol=rounding * (scale + 1e-3), equal_nan=True
        )


def check(least: int, fn: Callable[..., Any], *args: Any, pays: bool = True) -> Regions:
    """Compare a function with itself in regions."""
    expected = fn(*args)
    with Regions().used(pays) as regions:
        got = jit(fn, strict=True)(*args)
    assert_close(got, expected)
    assert len(regions.sources) >= least
    assert regions.calls >= least
    return regions
