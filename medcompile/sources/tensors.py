"""The table of a safetensors file: where each tensor's bytes lie. Read from the header alone; no weight is loaded.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without holes
(https://huggingface.co/docs/safetensors). .bin files are made into this by pickled.py.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcompile.errors import SourceError
from medcompile.sources.folder import os_errors

MAX_HEADER_BYTES = 100_000_000
# safetensors name -> (numpy or ml_dtypes name, bytes per element)
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
_REFETCH = "fetch the file again; if it stays so, convert the model again with safetensors' own save_file"


@dataclass(frozen=True)
class TensorRef:
    """A tensor's bytes inside a file: little-endian, row-major, from offset (in bytes from the file's start) on.

    dtype: numpy or ml_dtypes name. Two names of one tensor (tied weights) have equal TensorRefs.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def read_table(source: str, path: Path) -> dict[str, TensorRef]:
    """Every tensor of a safetensors file by name, tied names (its metadata's name -> kept name) included.

    Raises SourceError if the file is truncated, or its header lies about sizes, offsets or dtypes.
    """
    path = path.resolve()

    def fault(what: str) -> SourceError:
        return SourceError(f"{source}: {path.name} {what}", fix=_REFETCH)

    with os_errors(f"{source}: reading {path.name}", fix=f"check the permissions of {path}"), path.open("rb") as file:
        file_bytes = path.stat().st_size
        start = file.read(8)
        if len(start) < 8:
            raise fault(f"is truncated: {file_bytes} bytes are too few for a safetensors file")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > MAX_HEADER_BYTES:
            raise fault(f"is no safetensors file: it claims a header of {header_bytes:,} bytes")
        if 8 + header_bytes > file_bytes:
            raise fault(f"is truncated inside its header: {8 + header_bytes:,} bytes needed, {file_bytes:,} there")
        text = file.read(header_bytes)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise fault(f"has a broken header: {error}") from error
    if not isinstance(header, dict):
        raise fault("has a broken header: it is no JSON object")

    metadata = header.pop("__metadata__", {})
    table: dict[str, TensorRef] = {}
    for name, entry in header.items():
        ref = _parse(path, 8 + header_bytes, entry)
        if isinstance(ref, str):
            raise fault(f"has a header that lies about {name!r}: {ref}")
        table[name] = ref
    end = 8 + header_bytes
    for name, ref in sorted(table.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != end:
            what = "overlaps the tensor before it" if ref.offset < end else "leaves a hole before it"
            raise fault(f"has a header that lies about {name!r}: it {what}")
        end += ref.nbytes
    if end > file_bytes:
        raise fault(f"is truncated: its tensors end at byte {end:,}, the file at {file_bytes:,}")
    if end < file_bytes:
        raise fault(f"has {file_bytes - end:,} bytes after its last tensor that its header doesn't name")
    if isinstance(metadata, dict):
        table |= {k: table[v] for k, v in metadata.items() if isinstance(v, str) and v in table and k not in table}
    return table


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _parse(path: Path, data_start: int, entry: object) -> TensorRef | str:
    """The reference that a header entry describes, or what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "it has no dtype, shape and data_offsets"
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        return f"dtype {code!r} is not one of {', '.join(DTYPES)}"
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        return f"shape {shape} and data_offsets {offsets} are not lists of whole numbers"
    dtype, item_bytes = DTYPES[code]
    begin, end = offsets
    if end - begin != math.prod(shape) * item_bytes:
        return f"{code} {shape} takes {math.prod(shape) * item_bytes:,} bytes, its offsets span {end - begin:,}"
    return TensorRef(path, data_start + begin, end - begin, dtype, tuple(shape))


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
