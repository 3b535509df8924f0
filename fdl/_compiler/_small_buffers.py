"""Keep small intermediate results on the stack: a loop of tiny steps spends its time on memory.

Inductor's C++ code asks torch for a tensor for each of them, which takes longer than to compute ten
numbers. Those that only kernels read and write need no tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache, wraps
from math import prod
from typing import Any, NamedTuple

import torch

LARGEST = 1 << 12  # bytes of a buffer
MOST = 1 << 16  # bytes of all buffers of a program
HEADER = "#include <torch/csrc/inductor/cpp_wrapper/cpu.h>\n"
TYPE = """
/* Memory on the stack, where the code expects a tensor. */
struct SmallBuffer {
    void* memory;
    void* data_ptr() const { return memory; }
    void reset() {}
};
"""
ALLOCATION = re.compile(
    r"AtenTensorHandle (?P<name>\w+)_handle;\s+"
    r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_empty_strided\((?P<ndim>\d+), (?P<sizes>\w+), "
    r"(?P<strides>\w+), cached_torch_dtype_(?P<dtype>\w+), cached_torch_device_type_cpu,\s+0, "
    r"&(?P=name)_handle\)\);\s+"
    r"RAIIAtenTensorHandle (?P=name)\((?P=name)_handle\);"
)
MOVE = re.compile(r"auto (?P<name>\w+) = std::move\((?P<source>\w+)\);  // reuse")
VIEW = re.compile(
    r"auto (?P<name>\w+) = wrap_with_raii_handle_if_needed\(reinterpret_tensor_wrapper\("
    r"(?P<source>\w+), \d+, \w+, \w+, (?P<start>\d+)L\)\);"
)
NUMBERS = re.compile(r"int64_t (?P<name>\w+)\[\] = \{(?P<numbers>[\dL, ]*)\};")
NAME = re.compile(r"\b\w+\b")
READS = re.compile(r"\.(data_ptr\(\)|reset\(\);)")


class Buffer(NamedTuple):
    """A small result: its size and that of its numbers, in bytes."""

    size: int
    item: int


@cache
def keep_small_buffers_on_the_stack() -> None:
    """Let Inductor's C++ code do so."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    wrapper: Any = CppWrapperCpu
    generate = wrapper.generate

    @wraps(generate)
    def generate_with_small_buffers(self: Any, is_inference: bool) -> Any:
        code, *rest = generate(self, is_inference)
        value = getattr(code, "value", None)
        if isinstance(value, str):
            code = type(code)(on_the_stack(value), code.line_map)
        return (code, *rest)

    wrapper.generate = generate_with_small_buffers


def on_the_stack(code: str) -> str:
    """Replace small tensors that only kernels use by memory on the stack."""
    arrays = {
        found["name"]: [int(n.strip(" L")) for n in found["numbers"].split(",") if n.strip(" L")]
        for found in NUMBERS.finditer(code)
    }
    buffers: dict[str, Buffer] = {}
    for found in ALLOCATION.finditer(code):
        size = _size(found, arrays)
        if size is not None and size.size <= LARGEST:
            buffers[found["name"]] = size
    children = defaultdict(list)  # names for the same memory
    for pattern in (MOVE, VIEW):
        for found in pattern.finditer(code):
            children[found["source"]].append(found["name"])
    if not buffers or HEADER not in code:
        return code
    uses = _uses_by_others(code)
    small: dict[str, Buffer] = {}
    total = 0
    for name, buffer in buffers.items():
        family = _family(name, children)
        if not uses.isdisjoint(family) or total + buffer.size > MOST:
            continue
        total += buffer.size
        small |= dict.fromkeys(family, buffer)
    return _rewritten(code, small)


def _size(found: re.Match[str], arrays: dict[str, list[int]]) -> Buffer | None:
    ndim = int(found["ndim"])
    dtype = getattr(torch, found["dtype"], None)
    sizes, strides = arrays.get(found["sizes"]), arrays.get(found["strides"])
    if ndim == 0:
        sizes = strides = []
    if not isinstance(dtype, torch.dtype) or sizes is None or strides is None:
        return None
    if len(sizes) != ndim or len(strides) != ndim:
        return None
    last = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    count = last + 1 if prod(sizes) else 0
    return Buffer(max(count, 1) * dtype.itemsize, dtype.itemsize)


def _family(name: str, children: dict[str, list[str]]) -> list[str]:
    return [name, *(member for child in children[name] for member in _family(child, children))]


def _uses_by_others(code: str) -> set[str]:
    """Return the names that something other than a kernel uses: as a tensor."""
    for pattern in (ALLOCATION, MOVE, VIEW):
        code = pattern.sub("", code)
    return {found[0] for found in NAME.finditer(code) if not READS.match(code, found.end())}


def _rewritten(code: str, small: dict[str, Buffer]) -> str:
    def allocate(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in small:
            return found[0]
        memory = f"alignas(64) unsigned char {name}_memory[{small[name].size}];"
        return f"{memory} SmallBuffer {name}{{{name}_memory}};" + "\n" * found[0].count("\n")

    def view(found: re.Match[str]) -> str:
        name, source = found["name"], found["source"]
        if name not in small:
            return found[0]
        start = int(found["start"]) * small[name].item
        return f"SmallBuffer {name}{{static_cast<char*>({source}.data_ptr()) + {start}}};"

    code = VIEW.sub(view, ALLOCATION.sub(allocate, code))
    return code.replace(HEADER, HEADER + TYPE, 1) if small else code
