"""Clipping: where stored activation ranges cut what calibration saw. Read from a typed graph and the statistics.

Numbers per tensor only, for a bundle's calibration.json; how a range is chosen is statistics.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcompile.spec import Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.statistics import Statistics

    Array = np.ndarray[Any, Any]

_FLOAT8_MAX = 448.0


@dataclass(frozen=True)
class Clipping:
    """The range of one quantized activation. layers: the nodes that read it by that range.

    observed: what calibration saw of the tensor, over values of its channels as the model makes them. range: what its
    integers can say. clipped: share of the observed values that lie outside range by more than rounding alone would
    move them, half a step. rescaled: SmoothQuant gave its channels other
    sizes, so that range and observed are not in one unit; its range then takes all that was seen.
    """

    tensor: str
    layers: tuple[str, ...]
    observed: tuple[float, float]
    range: tuple[float, float]
    clipped: float
    rescaled: bool


def clippings(model: ir.Model, statistics: Mapping[str, Statistics], variant: Variant) -> list[Clipping]:
    """One for each activation of model that is rounded to a stored range, in graph order.

    statistics: of the float graph, by tensor. Activations that it does not have are left out.
    """
    found = []
    for node in model.graph:
        scale, zero = _constant(node, 1), _constant(node, 2)
        if node.op_type != "QuantizeLinear" or scale is None or zero is None or scale.size != 1:
            continue
        base = (node.name or "").removesuffix("/quantize")
        stats = statistics.get(base) or statistics.get(base.rpartition("/")[0])
        layers = _readers(node.outputs[0])
        if stats is None or not layers:
            continue
        low, high = _range(float(scale), zero)
        rescaled = variant.for_node(layers[0]).method == "smoothquant"
        outside = 0.0 if rescaled else _outside(stats, low - float(scale) / 2, high + float(scale) / 2)
        found.append(Clipping(base, layers, (stats.min, stats.max), (low, high), outside, rescaled))
    return found


def _constant(node: ir.Node, index: int) -> Array | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    stored = value.const_value if value is not None else None
    return stored.numpy() if stored is not None else None


def _readers(quantized: ir.Value) -> tuple[str, ...]:
    """Names of the nodes that read what is behind the DequantizeLinear."""
    dequantized = [use.node for use in quantized.uses() if use.node.op_type == "DequantizeLinear"]
    return tuple(use.node.name or "" for node in dequantized for use in node.outputs[0].uses())


def _range(scale: float, zero: Array) -> tuple[float, float]:
    import numpy as np

    if zero.dtype.kind not in "iu":
        return -_FLOAT8_MAX * scale, _FLOAT8_MAX * scale
    limits, offset = np.iinfo(zero.dtype), int(zero)
    return (limits.min - offset) * scale, (limits.max - offset) * scale


def _outside(stats: Statistics, low: float, high: float) -> float:
    """To a bin of the histogram: the share in bins that lie outside throughout."""
    import numpy as np

    if low <= stats.min and stats.max <= high:
        return 0.0
    edges = np.linspace(-stats.reach, stats.reach, len(stats.histogram) + 1)
    beyond = (edges[1:] <= low) | (edges[:-1] >= high)
    return float(stats.histogram[beyond].sum() / stats.histogram.sum())
