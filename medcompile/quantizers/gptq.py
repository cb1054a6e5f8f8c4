"""GPTQ: round one input after the other, and let the inputs still to come make up for each one's error.

Source: Frantar et al. 2023. The error of rounding input k is spread over later inputs by the inverse of the products
of activations, taken from its Cholesky factor; updates of far inputs are done in batches. Scales are found before, by
what they do to the output, so inputs can be taken in any order: the strongest go first, while most are left to help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import QuantizeError
from medcompile.quantizers import Solution, WeightFormat
from medcompile.quantizers._blocks import finite, searched_scales, solution
from medcompile.statistics import Observer, Statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Added to the diagonal, as a share of its mean, so that the factor exists when channels depend on each other.
_DAMPING = 0.01
# Inputs whose updates are done one by one; farther ones get theirs together.
_NEAR = 64


class Gptq:
    name = "gptq"
    by_layer = True

    def observe(self, stats: Observer, activation: NDArray[Any]) -> None:
        stats.add_products(activation)

    def solve(self, weight: NDArray[Any], stats: Statistics | None, spec: WeightFormat) -> Solution:
        if stats is None or stats.products is None:
            raise QuantizeError("gptq needs the products of its activations", fix="calibrate, or use method: rtn")
        weight = finite(weight)
        scales = searched_scales(weight, stats.products, spec.bits, spec.block_size)
        values = _rounded(weight, stats.products, scales, 2 ** (spec.bits - 1) - 1)
        return solution(weight, values, scales, stats.products, blocked=spec.block_size is not None)


def _rounded(
    weight: NDArray[np.float32], products: NDArray[np.float32], scales: NDArray[np.float32], limit: int
) -> NDArray[np.int8]:
    """int8 [inputs, outputs] within +-limit, in steps of scales [blocks, outputs]."""
    inputs = len(weight)
    strength = np.diagonal(products)
    order = np.argsort(-strength, kind="stable")
    steps = np.repeat(np.arange(len(scales)), inputs // len(scales))[order]
    left = weight[order]
    spread = _spread(products[np.ix_(order, order)])
    values = np.empty(weight.shape, np.int8)
    for start in range(0, inputs, _NEAR):
        stop = min(start + _NEAR, inputs)
        errors = np.empty((stop - start, weight.shape[1]), np.float32)
        for k in range(start, stop):
            step = scales[steps[k]]
            codes = np.rint(left[k] / step).clip(-limit, limit)
            values[order[k]] = codes
            errors[k - start] = (left[k] - codes * step) / spread[k, k]
            left[k + 1 : stop] -= np.outer(spread[k, k + 1 : stop], errors[k - start])
        left[stop:] -= spread[start:stop, stop:].T @ errors
    return values


def _spread(products: NDArray[np.float32]) -> NDArray[np.float32]:
    """The upper factor U of the damped inverse, U^T U = (products + damping)^-1: row k says how far input k's error
    goes into each later one."""
    damped = products.astype(np.float64)
    mean = float(np.diagonal(damped).mean())
    damped[np.diag_indices_from(damped)] += _DAMPING * mean if mean > 0 else 1.0
    # With H = R R^T and R upper, U is R^-1: no inverse of H itself, which would lose half of the digits.
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return np.linalg.inv(upper).astype(np.float32)


QUANTIZER = Gptq()
