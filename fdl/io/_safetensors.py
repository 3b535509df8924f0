"""The safetensors format: the length of a header, the header as JSON, the bytes of the tensors.

Files are read as if an enemy had written them: nothing is allocated before the header was found to
describe exactly the bytes in the file. Files of fdl have the SHA-256 of each tensor in the header,
and first of all that of the header, so a tensor can be read and verified without the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fdl.io._json import dumps

FORMAT = "2"  # under "fdl" in the metadata; "1" had names alone, and no digests
MAX_HEADER = 2**25  # bytes; 100,000 tensors need about 20 MB. Parsing takes 20 times as much
MAX_ELEMENTS = 2**63

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_OPENING = b'{"__metadata__":{"fdl.sha256":"'
_NO_DIGEST = "0" * 64
_LARGE = 2**20  # bytes; larger tensors are worth a thread
_CHUNK = 2**22  # bytes read before hashing, while they are in the cache


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes, counted from the end of the header
    stop: int
    digest: str  # SHA-256 of its bytes in hex; '' in files of other writers


class Header(NamedTuple):
    """The checked header of a file."""

    entries: dict[str, Entry]  # in the order of their bytes
    metadata: dict[str, str]
    size: int  # offset of the bytes of the tensors


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> None:
    """Write tensors on any device and with any strides to a file.

    Args:
        file: a file open for writing and seeking.
        tensors: the tensors by name.
        meta: metadata of the header.

    Raises:
        ValueError: the header would be larger than readers accept.
    """
    # The widest dtypes first, as other writers do, which aligns each tensor without holes.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    blank = _header(tensors, order, meta, [_NO_DIGEST] * len(order))
    if len(blank) > MAX_HEADER:
        raise ValueError(
            f"save: the header of {len(order)} tensors takes {len(blank):,} bytes, "
            f"more than {MAX_HEADER:,}: use fewer or shorter paths, or less metadata"
        )
    file.write(blank)
    digests: list[Future[str]] = []
    # Two tensors are hashed while a third is written and earlier ones are synced: on a fast disk
    # hashing takes the longest.
    with ThreadPoolExecutor(2) as hashing, ThreadPoolExecutor(1) as syncing:
        synced: list[Future[None]] = []
        for i, name in enumerate(order):
            content = _content(tensors[name])
            digests.append(hashing.submit(_digest, content))
            file.write(content)
            if len(content) >= _LARGE and (not synced or synced[-1].done()):
                synced.append(syncing.submit(os.fsync, file.fileno()))
            if i >= 2:
                digests[i - 2].result()  # at most three copies of device tensors at a time
        for done in synced:
            done.result()  # raises an error of the disk, which is reported only once
    file.seek(0)
    file.write(_header(tensors, order, meta, [digest.result() for digest in digests]))


def _header(
    tensors: Mapping[str, Tensor], order: list[str], meta: Mapping[str, str], digests: list[str]
) -> bytes:
    metadata = {"fdl.sha256": _NO_DIGEST, **meta, "fdl.digests": "".join(digests)}
    layout: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in order:
        tensor, stop = tensors[name], start + tensors[name].nbytes
        shape = list(tensor.shape)
        if tensor.dtype == torch.float4_e2m1fn_x2:
            shape[-1] *= 2  # torch counts pairs of numbers, the format numbers
        layout[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, stop],
        }
        start = stop
    text = dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    at = 8 + len(_OPENING)
    return raw[:at] + hashlib.sha256(raw).hexdigest().encode() + raw[at + 64 :]


def _digest(content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in order."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape: a tensor of at most one element counts as contiguous with any strides, and then
    # cannot be viewed as bytes.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


def read_header(descriptor: int, where: str) -> Header:
    """Read and check the header of an open file.

    Args:
        descriptor: descriptor of the open file.
        where: first words of error messages.

    Raises:
        ValueError: the header does not describe exactly the bytes in the file.
    """
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0) if size >= 8 else b""
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= size - 8 and prefix.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(
            f"{where}: expected a safetensors file, got one of torch.save, for io.load_torch, or "
            "one of fdl.export, for fdl.load_program"
        )
    if not 2 <= length <= size - 8:
        raise ValueError(f"{where}: expected a safetensors header, got {size:,} bytes without one")
    if length > MAX_HEADER:
        raise ValueError(
            f"{where}: expected a header of at most {MAX_HEADER:,} bytes, got {length:,}"
        )
    raw = prefix + os.pread(descriptor, length, 8)
    if len(raw) != 8 + length:
        raise ValueError(f"{where}: the file became shorter while it was read")
    layout = parse_json(raw[8:], f"{where}: header")
    if not isinstance(layout, dict):
        raise ValueError(f"{where}: the header is not an object")
    metadata = layout.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise ValueError(f"{where}: __metadata__ must map names to strings")
    entries = {name: _entry(value, f"{where}: {name!r}") for name, value in layout.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            fault = "overlaps another tensor" if entry.start < end else "comes after a hole"
            raise ValueError(f"{where}: {name!r} {fault}: it begins at {entry.start}, not {end}")
        end = entry.stop
    if end != size - len(raw):
        raise ValueError(f"{where}: expected {end:,} bytes of tensors, got {size - len(raw):,}")
    return Header(_with_digests(entries, metadata, raw, where), metadata, len(raw))


def _with_digests(
    entries: dict[str, Entry], metadata: dict[str, str], raw: bytes, where: str
) -> dict[str, Entry]:
    ours = any(name.startswith("fdl.") for name in metadata)
    if metadata.get("fdl", "1") not in ("1", FORMAT):
        raise ValueError(
            f"{where}: it has format {metadata['fdl']}, this fdl reads up to {FORMAT}; update fdl"
        )
    if not ours and metadata.get("fdl") != FORMAT:
        return entries  # another writer, or format 1 of fdl
    at = 8 + len(_OPENING)
    blank = raw[:at] + _NO_DIGEST.encode() + raw[at + 64 :]
    if metadata.get("fdl.sha256") != hashlib.sha256(blank).hexdigest() or len(
        digests := metadata.get("fdl.digests", "")
    ) != 64 * len(entries):
        raise ValueError(f"{where}: the header was changed after writing (its SHA-256 differs)")
    return {
        name: entry._replace(digest=digests[64 * i : 64 * (i + 1)])
        for i, (name, entry) in enumerate(entries.items())
    }


def _entry(value: Any, where: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} needs exactly dtype, shape and data_offsets")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{where} has dtype {name!r}, expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ValueError(f"{where} has an impossible shape or offsets: {shape}, {offsets}"[:500])
    elements = 1
    for length in shape:  # even beside a 0: torch multiplies the sizes for the strides
        elements *= max(length, 1)
        if elements >= MAX_ELEMENTS:
            raise ValueError(f"{where} has an impossible shape: {shape}"[:500])
    elements = 0 if 0 in shape else elements
    if dtype == torch.float4_e2m1fn_x2:
        if not shape or shape[-1] % 2:
            raise ValueError(f"{where} is an F4 whose last axis has an odd size: {shape}"[:500])
        shape, elements = [*shape[:-1], shape[-1] // 2], elements // 2
    if elements * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(
            f"{where} takes {elements * dtype.itemsize:,} bytes by its shape, "
            f"{offsets[1] - offsets[0]:,} by its offsets"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1], "")


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < MAX_ELEMENTS for value in values
    )


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON without duplicate names, nested at most as deep as Python can.

    Args:
        text: the JSON.
        where: first words of error messages.

    Raises:
        ValueError: the text is not such JSON.

    >>> parse_json('{"a": 1, "a": 2}', "here")
    Traceback (most recent call last):
    ValueError: here: not valid JSON: 'a' occurs twice
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} occurs twice")
        return parsed

    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=unique)
    except ValueError as error:  # in the text or its encoding, or a number of 5,000 digits
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deep") from error


def read_tensors(
    descriptor: int, header: Header, names: Iterable[str], where: str
) -> dict[str, Tensor]:
    """Read some tensors, and nothing else, into memory of their own, and verify their digests.

    Args:
        descriptor: descriptor of the open file.
        header: header of this file.
        names: names of the tensors to read.
        where: first words of error messages.

    Raises:
        ValueError: the bytes were changed after writing.
    """
    wanted = list(names)

    def read(name: str) -> Tensor:
        return _read(descriptor, header.size, header.entries[name], f"{where}: {name!r}")

    large = sum(header.entries[name].stop - header.entries[name].start for name in wanted) > _LARGE
    if not large:
        return {name: read(name) for name in wanted}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(wanted, pool.map(read, wanted), strict=True))


def _read(descriptor: int, base: int, entry: Entry, where: str) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    memory = tensor.reshape(-1).view(torch.uint8).numpy().data
    digest = hashlib.sha256()
    done = 0
    while done < len(memory):
        chunk = memory[done : done + _CHUNK]
        count = os.preadv(descriptor, [chunk], base + entry.start + done)
        if count == 0:
            raise ValueError(f"{where}: the file became shorter while it was read")
        if entry.digest:
            digest.update(chunk[:count])
        done += count
    if entry.digest and digest.hexdigest() != entry.digest:
        raise ValueError(f"{where}: its bytes were changed after writing (SHA-256 differs)")
    return tensor
