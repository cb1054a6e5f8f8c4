"""The registry of quantizers: numbers in, numbers out. They never see a graph; passes/quantize.py is their caller.

One file per method; the file name is the registry key, and the module's QUANTIZER is the instance.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from medcompile.errors import UsageError
from medcompile.statistics import Observer, Statistics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored, and what its input will be rounded to.

    bits: 8 or 4, symmetric. block_size: inputs that share a scale; None is one scale per output channel.
    smoothing: strength in [0, 1] for methods that rescale the input; None lets them search it.
    symmetric_input: the input will be int8 with zero point 0; False: uint8 with a zero point.
    """

    bits: int = 8
    block_size: int | None = None
    smoothing: float | None = None
    symmetric_input: bool = True


@dataclass(frozen=True)
class Solution:
    """values: int8 [inputs, outputs]. scales: float32 > 0, [outputs], or [inputs / block_size, outputs].

    input_scale: float32 > 0 [inputs]: the graph must divide the activation by it (its inverse is already inside
    values); None where the activation stays as it is.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    input_scale: NDArray[np.float32] | None = None


class Quantizer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def by_layer(self) -> bool:
        """True if solve needs Statistics.products, which are gathered for one layer at a time, with the layers before
        it quantized already."""
        ...

    def observe(self, stats: Observer, activation: NDArray[Any]) -> None:
        """Take in activation [rows, inputs] of the tensor that stats describes. Calibration calls it per batch."""
        ...

    def solve(self, weight: NDArray[Any], stats: Statistics | None, spec: WeightFormat) -> Solution:
        """Quantize weight [inputs, outputs]: all the matrices that read one input, side by side.

        stats: of that input; None where the method needs none. Raises QuantizeError on NaN, Inf, or a block size
        that does not divide the inputs.
        """
        ...


def names() -> tuple[str, ...]:
    """Every quantizer that this installation has."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> Quantizer:
    """The quantizer called name. Raises UsageError for an unknown one; a broken import shows as itself."""
    if name not in names():
        raise UsageError(f"unknown method {name!r}", fix=f"use one of {', '.join(names())}")
    quantizer: Quantizer = importlib.import_module(f"{__name__}.{name}").QUANTIZER
    return quantizer
