"""GPTQ: inputs make up for each other's rounding, exactly as the plain algorithm has it."""

from __future__ import annotations

import numpy as np
import pytest

from medcompile.errors import QuantizeError
from medcompile.quantizers import WeightFormat, gptq, rtn
from medcompile.statistics import Observer
from tests.quantizers import layers


@pytest.mark.parametrize("form", [WeightFormat(4, 16), WeightFormat(4, 128), WeightFormat(8)])
def test_outputs_of_unseen_data_come_closer_than_by_rounding_alone(form: WeightFormat) -> None:
    seen, unseen = layers.activation(seed=0), layers.activation(seed=1)
    ours = layers.error(gptq.QUANTIZER, form, seen, unseen)
    assert ours < 0.6 * layers.error(rtn.QUANTIZER, form, seen, unseen)


def test_batched_updates_are_those_made_one_by_one() -> None:
    """Against the algorithm as written: after each input, the best update of all that are left, solved anew."""
    rng = np.random.default_rng(3)
    inputs, limit = 150, 7
    rows = rng.standard_normal((400, inputs)) * np.exp(rng.normal(0, 0.7, inputs))
    products = (rows.T @ rows / 400).astype(np.float32)
    weight = rng.standard_normal((inputs, 5)).astype(np.float32)
    scales = np.full((3, 5), 0.4, np.float32)
    given = gptq._rounded(weight, products, scales, limit)

    damped = products.astype(np.float64) + 0.01 * np.diagonal(products).mean() * np.eye(inputs)
    left, values = weight.astype(np.float64), np.zeros(weight.shape)
    order = np.argsort(-np.diagonal(products), kind="stable")
    for k, channel in enumerate(order):
        values[channel] = np.rint(left[channel] / 0.4).clip(-limit, limit)
        error = left[channel] - values[channel] * np.float64(np.float32(0.4))
        later = order[k + 1 :]
        left[later] += np.linalg.solve(damped[np.ix_(later, later)], np.outer(damped[later, channel], error))
    assert (given == values).mean() > 0.995


def test_channels_that_depend_on_each_other_or_never_move_are_no_obstacle() -> None:
    rows = layers.activation()
    rows[:, 7] = 0
    rows[:, 9] = rows[:, 8]
    solution = gptq.QUANTIZER.solve(layers.weight(), layers.statistics(gptq.QUANTIZER, rows), WeightFormat(4, 32))
    exact = rows @ layers.weight()
    assert np.linalg.norm(rows @ layers.effective(solution) - exact) < 0.05 * np.linalg.norm(exact)


def test_statistics_without_products_are_refused() -> None:
    observer = Observer()
    observer.add(layers.activation())
    for stats in (None, observer.statistics()):
        with pytest.raises(QuantizeError, match="products of its activations"):
            gptq.QUANTIZER.solve(layers.weight(), stats, WeightFormat(4, 32))
