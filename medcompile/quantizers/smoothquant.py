"""SmoothQuant: move the unevenness of the activation's channels into the weight, where per-channel scales absorb it.

The activation is divided, and the weight's rows multiplied, by s = amax_x^a / amax_w^b per input channel, so the float
result is unchanged. The published rule is b = 1 - a with one a for the whole model (Xiao et al. 2023). Without a
given strength, a and b are searched per tensor for the least expected error of the layer's output, which the
statistics give in closed form.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import QuantizeError
from medcompile.quantizers import Solution, WeightFormat
from medcompile.quantizers.rtn import round_to_nearest
from medcompile.statistics import Observer, Statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Searched (a, b). On trained encoders the best b lies at 0 to 0.2, far below the published 1 - a.
_GRID = tuple(product(np.linspace(0, 1, 11), (0.0, 0.1, 0.2, 0.4)))


class SmoothQuant:
    name = "smoothquant"
    by_layer = False

    def observe(self, stats: Observer, activation: NDArray[Any]) -> None:
        stats.add(activation)

    def solve(self, weight: NDArray[Any], stats: Statistics | None, spec: WeightFormat) -> Solution:
        if stats is None:
            raise QuantizeError("smoothquant needs calibration statistics", fix="calibrate first, or use method: rtn")
        weight = weight.astype(np.float32, copy=False)
        if not np.isfinite(weight).all():
            raise QuantizeError("the weight holds NaN or Inf", fix="check the checkpoint: its weights are damaged")
        magnitude = np.abs(weight)
        if spec.smoothing is None:
            scales = (_scale(magnitude, stats, a, b) for a, b in _GRID)
            scale = min(scales, key=lambda s: _error(magnitude, stats, s, spec))
        else:
            scale = _scale(magnitude, stats, spec.smoothing, 1 - spec.smoothing)
        values, weight_scales = round_to_nearest(weight * scale[:, None], spec.bits, spec.block_size)
        return Solution(values, weight_scales, scale)


def _scale(magnitude: NDArray[np.float32], stats: Statistics, a: float, b: float) -> NDArray[np.float32]:
    """float32 [inputs], with a largest entry of 1. Channels that are never used, or never move, are not stretched."""
    active = stats.channel_amax.astype(np.float64)
    rows = magnitude.max(axis=1).astype(np.float64)
    active = np.maximum(active, max(active.max() * 1e-3, 1e-12))
    rows = np.maximum(rows, max(rows.max() * 1e-3, 1e-12))
    scale = active**a / rows**b
    normalized: NDArray[np.float32] = (scale / scale.max()).astype(np.float32)
    return normalized


def _error(magnitude: NDArray[np.float32], stats: Statistics, scale: NDArray[np.float32], spec: WeightFormat) -> float:
    """Expected squared error of the layer's output, up to a constant: rounding noise is uniform and independent.

    The input's noise has variance step^2 scale_k^2 on channel k, and reaches the output through row k; the weight's
    has step_n^2 / scale_k^2 at [k, n], and is carried by the channel's mean square.
    """
    low, high = (stats.channel_min / scale).min(), (stats.channel_max / scale).max()
    step = max(-low, high) / 127 if spec.symmetric_input else (max(high, 0) - min(low, 0)) / 255
    by_input = step**2 * (
        np.square(scale, dtype=np.float64) @ np.einsum("kn,kn->k", magnitude, magnitude, dtype=np.float64)
    )
    steps = (magnitude * scale[:, None]).max(axis=0) / (2 ** (spec.bits - 1) - 1)
    by_weight = np.square(steps, dtype=np.float64).sum() * (
        stats.channel_mean_square @ (1 / np.square(scale, dtype=np.float64))
    )
    return float(by_input + by_weight)


QUANTIZER = SmoothQuant()
