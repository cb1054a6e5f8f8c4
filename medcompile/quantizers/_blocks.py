"""Weights in blocks that share a scale: how scales are searched by what rounding does to the layer's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import QuantizeError
from medcompile.quantizers import Solution
from medcompile.quantizers.rtn import round_to_nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# Shares of a block's amax that may become its largest code. Below, what is cut off costs more than finer steps save.
_SHARES = np.linspace(1, 0.85, 7, dtype=np.float32)
# Most inputs whose products are looked at together; those of a longer block count as if pieces were independent.
_PIECE = 128


def searched_scales(weight: Floats, products: Floats, bits: int, block_size: int | None) -> Floats:
    """Scales float32 [blocks, outputs] of weight [inputs, outputs] that give the least squared error of the output.

    products [inputs, inputs]: mean of x x^T. Blocks are judged one by one, each as if the others were exact.
    """
    inputs, outputs = weight.shape
    block = block_size or inputs
    _, widest = round_to_nearest(weight, bits, block)
    limit = 2 ** (bits - 1) - 1
    found = np.empty_like(widest)
    for index in range(inputs // block):
        rows = slice(index * block, (index + 1) * block)
        best = np.full(outputs, np.inf, np.float32)
        for share in _SHARES:
            scales = np.maximum(widest[index] * share, np.finfo(np.float32).tiny)
            error = np.rint(weight[rows] / scales).clip(-limit, limit) * scales - weight[rows]
            cost = sum(
                np.einsum("kn,kn->n", products[rows, rows][at, at] @ error[at], error[at])
                for at in (slice(i, i + _PIECE) for i in range(0, block, _PIECE))
            )
            better = cost < best
            best[better] = cost[better]
            found[index, better] = scales[better]
    return found


def solution(
    weight: Floats,
    values: NDArray[np.int8],
    scales: Floats,
    products: Floats,
    *,
    blocked: bool,
    input_scale: Floats | None = None,
) -> Solution:
    """values and scales [blocks, outputs] as a Solution of weight, with every output's scales brought to full length.

    blocked False: there is one block, and the Solution's scales are [outputs].

    What clipping cuts off shrinks an output a little, always in the same direction. Squared error hardly sees that;
    perplexity pays for it in the first order, as if logits were cooled. So the result is scaled until its component
    along the exact output is the exact output.
    """
    exact = products @ weight
    wanted, found = (np.einsum("kn,kn->n", exact, side) for side in (weight, dequantized(values, scales)))
    longer = np.where(found > 0, wanted / np.where(found > 0, found, 1), 1).clip(0.5, 2).astype(np.float32)
    scales = np.maximum(scales * longer, np.finfo(np.float32).tiny)
    return Solution(values, scales if blocked else scales[0], input_scale)


def dequantized(values: NDArray[np.int8], scales: Floats) -> Floats:
    """values [inputs, outputs] times scales [blocks, outputs]."""
    by_block = values.reshape(len(scales), -1, values.shape[1]) * scales[:, None, :]
    return by_block.reshape(values.shape).astype(np.float32, copy=False)


def output_error(error: Floats, products: Floats) -> float:
    """Mean squared norm of x^T error over the observed x. error [inputs, outputs]."""
    return float(np.einsum("kn,kn->", products @ error, error, dtype=np.float64))


def finite(weight: NDArray[Any]) -> Floats:
    """weight in float32. Raises QuantizeError on NaN or Inf."""
    weight = weight.astype(np.float32, copy=False)
    if not np.isfinite(weight).all():
        raise QuantizeError("the weight holds NaN or Inf", fix="check the checkpoint: its weights are damaged")
    return weight
