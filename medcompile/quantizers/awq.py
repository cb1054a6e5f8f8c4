"""AWQ: enlarge the inputs that matter before rounding, and cut off what a block's largest weight wastes.

Source: Lin et al. 2024. The activation is divided, and the weight's rows multiplied, by s = strength^a per input
channel, so the float result is unchanged while strong channels are rounded more finely. a, and then each block's
clipping, are searched for the least error of the layer's output on the calibration data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import QuantizeError
from medcompile.quantizers import Solution, WeightFormat
from medcompile.quantizers._blocks import dequantized, finite, output_error, searched_scales, solution
from medcompile.quantizers.rtn import round_to_nearest
from medcompile.statistics import Observer, Statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_RATIOS = np.linspace(0, 1, 21)
# Outputs that a ratio is judged on, evenly drawn: the error of so many tells ratios apart.
_JUDGED = 512


class Awq:
    name = "awq"
    by_layer = True

    def observe(self, stats: Observer, activation: NDArray[Any]) -> None:
        stats.add_products(activation)

    def solve(self, weight: NDArray[Any], stats: Statistics | None, spec: WeightFormat) -> Solution:
        if stats is None or stats.products is None:
            raise QuantizeError("awq needs the products of its activations", fix="calibrate, or use method: rtn")
        weight, products = finite(weight), stats.products
        judged = weight[:, np.linspace(0, weight.shape[1] - 1, min(_JUDGED, weight.shape[1])).astype(np.intp)]
        candidates = [_scale(products, ratio) for ratio in _RATIOS]
        scale = min(candidates, key=lambda s: _error(judged, products, s, spec))
        weight, products = weight * scale[:, None], products / np.outer(scale, scale)
        scales = searched_scales(weight, products, spec.bits, spec.block_size)
        limit = 2 ** (spec.bits - 1) - 1
        steps = np.repeat(scales, len(weight) // len(scales), axis=0)
        values = np.rint(weight / steps).clip(-limit, limit).astype(np.int8)
        return solution(weight, values, scales, products, blocked=spec.block_size is not None, input_scale=scale)


def _scale(products: Floats, ratio: float) -> Floats:
    """float32 [inputs], with a geometric middle of 1. Channels that hardly move are not shrunk without end."""
    strength = np.sqrt(np.diagonal(products).astype(np.float64))
    strength = np.maximum(strength, max(strength.max() * 1e-4, 1e-12))
    scale = strength**ratio
    centered: Floats = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
    return centered


def _error(weight: Floats, products: Floats, scale: Floats, spec: WeightFormat) -> float:
    values, steps = round_to_nearest(weight * scale[:, None], spec.bits, spec.block_size)
    return output_error(dequantized(values, np.atleast_2d(steps)) / scale[:, None] - weight, products)


QUANTIZER = Awq()
