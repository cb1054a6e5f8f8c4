"""A weight that is a stored one, transposed or in another dtype, computed by pieces when it is written.

So that no pass holds weights: simplify turns them and cast rounds them by making a Derived, and the file that it
comes from is read again, a few megabytes at a time, when the result is saved or run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from medcompile.errors import PassError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Largest piece held at a time: of the result, and of what is read for it.
_PIECE_BYTES = 32 << 20
_READ_BYTES = 4 << 20


class Derived(ir.LazyTensor):
    """source [n, k], as dtype, and as [k, n] if transposed. One of another shape than a matrix can't be transposed.

    Writing or numpy() raises PassError if a value is finite in source and not in dtype.
    """

    def __init__(
        self, source: ir.TensorProtocol, dtype: ir.DataType, *, transposed: bool = False, name: str | None = None
    ) -> None:
        if isinstance(source, Derived):  # what lies between is float32, which holds all that 16-bit floats hold
            transposed = transposed != source.transposed
            source = source.source
        sizes = tuple(source.shape.numpy())
        assert not transposed or len(sizes) == 2
        self.source: ir.TensorProtocol = source
        self.transposed: bool = transposed
        super().__init__(
            lambda: ir.Tensor(self.numpy(), dtype=dtype, name=self.name),
            dtype,
            ir.Shape(sizes[::-1] if transposed else sizes),
            name=name,
        )

    def numpy(self) -> Array:
        whole: Array = np.concatenate([np.atleast_1d(piece) for piece in self._pieces()])
        return whole.reshape(self.shape.numpy())

    def tobytes(self) -> bytes:
        return self.numpy().tobytes()

    def tofile(self, file: Any) -> None:
        for piece in self._pieces():
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    def _pieces(self) -> Iterator[Array]:
        """The result in order of its bytes, whole rows at a time."""
        sizes = self.source.shape.numpy()
        if len(sizes) < 2:
            yield self._converted(read_rows(self.source, 0, sizes[0] if sizes else 1))
            return
        rows, row_size = sizes[0], int(np.prod(sizes[1:]))
        step = max(1, _READ_BYTES // max(1, row_size * _itemsize(self.source)))
        if not self.transposed:
            for start in range(0, rows, step):
                yield self._converted(read_rows(self.source, start, min(start + step, rows)))
            return
        # A column of the source is a row of the result: the source is read once per piece of the result.
        width = max(1, _PIECE_BYTES // max(1, rows * _itemsize(self)))
        for left in range(0, row_size, width):
            right = min(left + width, row_size)
            piece = np.empty((right - left, rows), self.dtype.numpy())
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                piece[:, start:stop] = self._converted(read_rows(self.source, start, stop)[:, left:right]).T
            yield piece

    def _converted(self, array: Array) -> Array:
        if self.dtype == self.source.dtype:
            return array
        with np.errstate(over="ignore"):
            converted: Array = array.astype(self.dtype.numpy())
        if not np.isfinite(converted).all() and np.isfinite(array).all():
            raise PassError(
                f"weight {self.source.name} reaches {np.abs(array.astype(np.float32)).max():.5g}, "
                f"beyond {self.dtype.numpy()}",
                fix="use float: bfloat16 for this variant, or keep the node that uses it in float32",
            )
        return converted


def read(tensor: ir.TensorProtocol) -> Array:
    """A stored tensor, whole. One that lies in a file is read as by read_rows()."""
    sizes = tensor.shape.numpy()
    return read_rows(tensor, 0, sizes[0] if sizes else 1)


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int) -> Array:
    """Rows [start, stop) of a tensor. One that lies in a file is read, not mapped: mapped pages would stay resident."""
    array: Array
    sizes = tensor.shape.numpy()
    if not isinstance(tensor, ir.ExternalTensor) or not sizes or tensor.dtype.bitwidth < 8:
        array = tensor.numpy()
        return array[start:stop] if sizes else array
    row = sizes[1:]
    count = int(np.prod(row)) * (stop - start)
    offset = (tensor.offset or 0) + int(np.prod(row)) * start * _itemsize(tensor)
    array = np.fromfile(tensor.path, tensor.dtype.numpy(), count, offset=offset)
    return array.reshape(stop - start, *row)


def _itemsize(tensor: ir.TensorProtocol) -> int:
    return tensor.dtype.numpy().itemsize
