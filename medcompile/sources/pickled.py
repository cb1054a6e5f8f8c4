"""PyTorch .bin files, through torch's weights-only unpickler alone, made into safetensors files once.

The result lies in the cache under the .bin's sha256, so that the rest of the compiler sees safetensors only. A pickle
that asks for anything but tensors is refused before any of it runs; it is never loaded in full.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import re
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcompile.errors import SourceError, UnsafeWeightsError
from medcompile.sources.folder import os_errors, require
from medcompile.sources.tensors import DTYPES, read_table

if TYPE_CHECKING:
    import torch

_PICKLE_BYTES = 16_000_000
_STALE_S = 86_400
_LAYOUT = 1  # raised when the conversion below changes what it writes
_ISOLATE = (
    "if you trust its author, load it once on an isolated machine without secrets, save model.state_dict() with "
    "safetensors.torch.save_file as model.safetensors, and use that file; else choose another checkpoint"
)
# What torch's unpickler is known to raise on bytes that are not a checkpoint.
_BAD_PICKLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError,
    struct.error,
)  # fmt: skip


def as_safetensors(source: str, path: Path, sha256: str, cache: Path) -> Path:
    """The safetensors twin of a .bin file, from the cache or converted now. sha256: the .bin's digest, hex.

    Every tensor is kept, in its dtype; tied ones are written once and named in the metadata. The .bin is mapped, not
    read into memory, unless it is older than PyTorch 1.6. Raises UnsafeWeightsError, SourceError.
    """
    folder = cache / "weights"
    twin = folder / f"{sha256}-{_LAYOUT}.safetensors"
    if twin.is_file():
        try:
            read_table(source, twin)
        except SourceError:  # cut short by a crash of the machine: make it again
            twin.unlink(missing_ok=True)
        else:
            return twin
    tensors = _load(source, path)
    with os_errors(f"{source}: converting {path.name} into {folder}", fix=f"check that {folder} can be written"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".partial-*"):  # by a run that was killed
            with suppress(FileNotFoundError):  # another run finished it meanwhile
                if time.time() - left.stat().st_mtime > _STALE_S:
                    left.unlink()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".partial-", delete=False) as out:
            partial = Path(out.name)
            try:
                _write(out, tensors)
                out.flush()
                os.fsync(out.fileno())
                partial.replace(twin)  # whole or not at all, also when two builds do this at once
            finally:
                partial.unlink(missing_ok=True)
    return twin


def _load(source: str, path: Path) -> dict[str, torch.Tensor]:
    require(source, "torch")
    import torch

    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # torch's own test; before PyTorch 1.6 files were bare pickles
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except _BAD_PICKLE as error:
        reason = str(error) if " " in str(error) else type(error).__name__
        raise _refusal(source, path, reason, zipped) from error
    if not isinstance(loaded, Mapping):
        raise UnsafeWeightsError(
            f"{source}: {path.name} holds a {type(loaded).__name__}, not a table of tensors", fix=_ISOLATE
        )
    dtypes = _dtype_codes()
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise SourceError(
                f"{source}: {path.name} is not a flat table of tensors: {name!r} is a {type(value).__name__}",
                fix="save the model's state_dict() alone, best as model.safetensors",
            )
        if value.layout is not torch.strided or value.is_meta or value.is_quantized or value.dtype not in dtypes:
            raise SourceError(
                f"{source}: {path.name}: {name} is a {value.layout} tensor of {value.dtype}, which can't be stored",
                fix=f"convert it to a dense tensor of {', '.join(dtype for dtype, _ in DTYPES.values())}",
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise SourceError(
                f"{source}: {path.name}: {name} claims {value.numel():,} elements over fewer that are stored",
                fix="save it contiguous; if you didn't make this file, don't use it",
            )
    return dict(loaded)


def _refusal(source: str, path: Path, reason: str, zipped: bool) -> SourceError:
    asked = sorted(set(_globals(_pickles(path, zipped))))
    if asked:
        return UnsafeWeightsError(
            f"{source}: {path.name} is a pickle that asks to run {', '.join(asked)}; it was refused, and nothing ran",
            fix=_ISOLATE,
        )
    if "PytorchStreamReader" in reason:
        return SourceError(f"{source}: {path.name} is a damaged or truncated zip archive", fix="fetch the file again")
    first = re.split(r"\n|\. ", reason.removeprefix("Weights only load failed."))[0].strip()
    return UnsafeWeightsError(
        f"{source}: {path.name} is no PyTorch checkpoint that the weights-only reader takes: {first or 'unreadable'}",
        fix=f"fetch it again; {_ISOLATE}",
    )


def _pickles(path: Path, zipped: bool) -> bytes:
    """The pickled part of a checkpoint; of an old one, which has its tensors behind, the first megabytes."""
    import torch

    if zipped:
        try:
            record: bytes = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
        except RuntimeError:  # so damaged that nothing can be named
            return b""
        return record
    with path.open("rb") as file:
        return file.read(_PICKLE_BYTES)


def _globals(pickles: bytes) -> Iterator[str]:
    """The names that the pickles ask for beyond torch's own list, read without running them."""
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed = _get_allowed_globals()
    strings: list[str] = []
    stream = io.BytesIO(pickles)
    for _ in range(5):  # an old checkpoint is five pickles in a row
        try:
            for opcode, argument, _position in pickletools.genops(stream):
                if "UNICODE" in opcode.name or "STRING" in opcode.name:
                    strings.append(str(argument))
                elif opcode.name == "GLOBAL" or (opcode.name == "STACK_GLOBAL" and len(strings) > 1):
                    name = ".".join(strings[-2:]) if opcode.name == "STACK_GLOBAL" else str(argument).replace(" ", ".")
                    if name not in allowed and re.fullmatch(r"[A-Za-z_][\w.]*", name):
                        yield name
        except (ValueError, EOFError, LookupError, struct.error, MemoryError, OverflowError):
            return


def _write(out: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file: widest dtype first, so that every tensor is aligned, then by name."""
    kept: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    codes = _dtype_codes()
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        t = tensors[name]
        place = (t.untyped_storage().data_ptr(), t.storage_offset(), t.dtype, tuple(t.shape), t.stride())
        first = kept.setdefault(place, name) if t.numel() else name
        if first != name:
            tied[name] = first
            continue
        nbytes = t.numel() * t.element_size()
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps({"__metadata__": {"format": "pt", **tied}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name in header:
        out.write(_raw(tensors[name]))


def _raw(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major; a copy only where it isn't contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _dtype_codes() -> dict[torch.dtype, str]:
    import torch

    return {getattr(torch, name): code for code, (name, _) in DTYPES.items()}
