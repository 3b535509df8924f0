"""Compile a graph with Inductor to a package of torch, a file that does not need Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from fdl._compiler._graph import nodes_of
from fdl._compiler._inductor import import_inductor, prepared


def lower(
    graph: GraphModule,
    mode: FakeTensorMode,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    folder: Path,
    metadata: dict[str, str],
) -> list[Path]:
    """Compile a graph for the CPU, and write the files of a program that does not need Python.

    Args:
        graph: the graph, which is not changed.
        mode: the mode of its fake tensors.
        inputs: its arguments; `constants` are values of the last ones.
        constants: tensors that become part of the program.
        folder: the folder for the files.
        metadata: texts that torch writes to one of the files.
    """
    import_inductor()
    with prepared(graph, mode, True, True, in_python=False) as copy:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V

        _hold(copy, constants)
        arguments = list(inputs[: len(inputs) - len(constants)])
        with config.patch(_options(folder, metadata)), V.set_aot_compilation(True):
            compiled: Any = compile_fx_inner(copy, arguments, cpp_wrapper=True, is_inference=True)
    return [Path(file) for file in compiled.filename]


def _options(folder: Path, metadata: dict[str, str]) -> dict[str, Any]:
    from torch._inductor import config

    options = {
        "aot_inductor.output_path": str(folder),
        "aot_inductor.metadata": metadata,
        "aot_inductor.package": True,
        "aot_inductor.precompile_headers": False,  # that takes longer than to compile one program
        # Information for profilers makes the file four times as large.
        "aot_inductor.enable_frame_pointer": False,
        "aot_inductor.enable_line_tables": False,
        # Otherwise small constants become numbers in the code, unlike in the program of `jit`.
        "always_keep_tensor_constants": True,
        # Fixed, since torch's code for any number of threads writes past an array if there are
        # more than here.
        "cpp.threads": torch.get_num_threads(),
    }
    known: Any = config
    return {name: value for name, value in options.items() if name in known._config}


def _hold(module: GraphModule, constants: Sequence[Tensor]) -> None:
    """Let a graph hold the values of its last arguments."""
    arguments = nodes_of(module.graph, "placeholder")
    for i, (node, value) in enumerate(zip(arguments[::-1], constants[::-1], strict=False)):
        name = f"constant_{i}"
        module.register_buffer(name, value.detach().resolve_neg().resolve_conj())
        with module.graph.inserting_before(node):
            held = module.graph.get_attr(name)
        held.meta = node.meta
        node.replace_all_uses_with(held)
        module.graph.erase_node(node)
    module.recompile()


def write(files: Sequence[Path], package: Path) -> Path:
    """Put the files of a program into torch's package, without the code that they come from."""
    from torch._inductor.package.package import package_aoti

    kept: list[Any] = []
    for file in files:
        if file.name.endswith(("kernel.cpp", "kernel_metadata.json")):
            continue
        if file.suffix == ".cpp":  # torch 2.11 looks for the name
            file.write_text("")
        kept.append(str(file))
    package_aoti(str(package), {"model": kept})
    return package
