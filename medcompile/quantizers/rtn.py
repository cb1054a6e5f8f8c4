"""Round to nearest: each output channel, or block of inputs, is scaled by its own amax and rounded. Needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import QuantizeError
from medcompile.quantizers import Solution, WeightFormat
from medcompile.statistics import Observer, Statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RoundToNearest:
    name = "rtn"
    by_layer = False

    def observe(self, stats: Observer, activation: NDArray[Any]) -> None:
        stats.add(activation)

    def solve(self, weight: NDArray[Any], stats: Statistics | None, spec: WeightFormat) -> Solution:
        return Solution(*round_to_nearest(weight, spec.bits, spec.block_size))


def round_to_nearest(
    weight: NDArray[Any], bits: int, block_size: int | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round weight to symmetric integers of so many bits: -127..127 for 8, -7..7 for 4.

    weight: [inputs, outputs]; inputs divisible by block_size. Returns values int8 [inputs, outputs] and scales float32
    [outputs], or [inputs / block_size, outputs]; an all-zero channel gets scale 1.
    Raises QuantizeError if weight holds NaN or Inf. Source: ONNX DequantizeLinear-21, per-axis and blocked.
    """
    inputs, outputs = weight.shape
    block = block_size or inputs
    if inputs % block:
        raise QuantizeError(
            f"{inputs} inputs don't divide into blocks of {block}",
            fix="choose a block_size that divides the layer's inputs, or keep the layer in float",
        )
    blocks = weight.astype(np.float32, copy=False).reshape(inputs // block, block, outputs)
    amax = np.abs(blocks).max(axis=1)
    if not np.isfinite(amax).all():
        raise QuantizeError("the weight holds NaN or Inf", fix="check the checkpoint: its weights are damaged")
    limit = 2 ** (bits - 1) - 1
    scales = np.where(amax > 0, amax / limit, 1.0).astype(np.float32)
    # An amax of a few denormals divides to zero; its weights are zero for every purpose.
    scales[scales == 0] = 1.0
    values = np.rint(blocks / scales[:, None, :]).clip(-limit, limit).astype(np.int8).reshape(inputs, outputs)
    return values, scales if block_size else scales[0]


QUANTIZER = RoundToNearest()
