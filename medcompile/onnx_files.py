"""Reading and writing onnx_ir models whose weights lie beside them in one shared file.

Several graphs of one variant hold the same weights (an embedding and its masked-word head, say), so tensors are
stored once per content. Writing is streaming: a piece of one tensor in memory at a time. The same program gives the
same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import onnx_ir as ir

# Tensors below this stay inside the .onnx file: shape constants and scalars that optimizers must see.
_INLINE_BYTES = 1024
_ALIGN_BYTES = 64
WEIGHTS_FILE = "weights.bin"


def save(models: Mapping[str, ir.Model], folder: Path, *, keep_references: bool = False) -> None:
    """Write <name>.onnx for each model and one weights.bin into folder.

    keep_references: tensors that already lie in some file are left there and referred to by path (for the cache;
    ONNX Runtime would refuse such a path). The models in memory are not changed.
    """
    import onnx_ir as ir

    offsets: dict[str, tuple[int, int]] = {}
    with (folder / WEIGHTS_FILE).open("wb") as weights:
        for name, model in models.items():
            copy = model.clone()
            for value in copy.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or (tensor.nbytes < _INLINE_BYTES and not isinstance(tensor, ir.ExternalTensor)):
                    continue
                if keep_references and isinstance(tensor, ir.ExternalTensor):
                    value.const_value = _external(value, Path(tensor.path).absolute(), tensor.offset, tensor.length)
                    continue
                if tensor.nbytes < _INLINE_BYTES:
                    value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
                    continue
                place = _written_once(tensor, weights, offsets)
                value.const_value = _external(value, Path(WEIGHTS_FILE), *place)
            ir.save(copy, folder / f"{name}.onnx")


def _written_once(tensor: ir.TensorProtocol, file: BinaryIO, offsets: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Offset and length of tensor's bytes in file: where they are already by offsets (sha256 -> place), or at its end.

    They are written before their digest is known, piece by piece, and taken back if they were there.
    """
    end = file.tell()
    file.write(b"\0" * (-end % _ALIGN_BYTES))
    start = file.tell()
    pieces = _Hashing(file)
    tensor.tofile(pieces)  # type: ignore[attr-defined]  # every class of onnx_ir has it
    key = pieces.digest.hexdigest()
    if key in offsets:
        file.seek(end)
        file.truncate()
    else:
        offsets[key] = (start, file.tell() - start)
    return offsets[key]


class _Hashing:
    """A file to write to that keeps the sha256 of what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self._file.write(data)


def load(path: Path) -> ir.Model:
    """Read a model with its weights memory-mapped."""
    import onnx_ir as ir

    model = ir.load(path)
    # An absolute location is this cache's own reference; joined to a base folder it stands for itself.
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.location).is_absolute():
            absolute = Path(tensor.location)
            value.const_value = ir.ExternalTensor(
                absolute.name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name,
                base_dir=absolute.parent,
            )
    return model


def _external(value: ir.Value, location: Path, offset: int | None, length: int | None) -> ir.ExternalTensor:
    import onnx_ir as ir

    tensor = value.const_value
    assert tensor is not None
    return ir.ExternalTensor(
        location, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir=""
    )
