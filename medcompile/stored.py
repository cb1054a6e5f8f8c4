"""How a checkpoint that came quantized stores its linear layers: scales, zero points, blocks, and rounded inputs.

The codes themselves are not here. A program's weights are the dequantized ones, (code - zero point) * scale in
float32, out of which a division by the scale gives every code back, exactly. sources/quantized.py fills this table
from a checkpoint, and passes/stored.py puts it into the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

Format = Literal["int4", "int8", "float8"]


@dataclass(frozen=True)
class StoredLinear:
    """One layer's weight [inputs, outputs], and how its input is rounded.

    scales: float32 [blocks, outputs], blocks of inputs / blocks inputs. zero_points: integers like scales, of codes
    0..15 (int4) or -128..127 (int8); None where codes are signed and their zero is 0.
    groups: int32 [inputs], each input's block; None where blocks lie in order. All blocks are of one size.
    input_scale, input_zero_point: of an input that is rounded with them, to int8 or float8; None where it is not.
    dynamic: the input is rounded to int8, per token, with a scale taken at run time.
    """

    format: Format
    scales: Array
    zero_points: Array | None = None
    groups: Array | None = None
    input_scale: float | None = None
    input_zero_point: int = 0
    dynamic: bool = False

    @property
    def blocks(self) -> int:
        return int(self.scales.shape[0])


def to_arrays(table: Mapping[str, StoredLinear]) -> dict[str, Array]:
    """As named arrays that np.savez stores without pickle; from_arrays is the inverse."""
    return {
        f"{weight}\t{field.name}": np.asarray(value)
        for weight, linear in table.items()
        for field in fields(linear)
        if (value := getattr(linear, field.name)) is not None
    }


def from_arrays(arrays: Mapping[str, Array]) -> dict[str, StoredLinear]:
    parts: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        weight, _, part = name.partition("\t")
        parts.setdefault(weight, {})[part] = array if array.ndim else array.item()
    return {weight: StoredLinear(**found) for weight, found in parts.items()}
