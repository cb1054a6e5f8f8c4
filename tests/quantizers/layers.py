"""A layer as decoders have them: correlated channels of unequal strength, some of them with a mean."""

from __future__ import annotations

import numpy as np

from medcompile.quantizers import Quantizer, Solution, WeightFormat
from medcompile.statistics import Observer, Statistics

INPUTS, OUTPUTS = 128, 48


def activation(rows: int = 600, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((24, INPUTS)) * np.exp(rng.normal(0, 1, INPUTS))
    own = np.random.default_rng(seed)
    hidden = own.standard_normal((rows, 24)) + 0.5
    return (hidden @ mixing + 0.3 * own.standard_normal((rows, INPUTS))).astype(np.float32)


def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_t(4, (INPUTS, OUTPUTS)).astype(np.float32)


def statistics(quantizer: Quantizer, rows: np.ndarray) -> Statistics:
    observer = Observer()
    for batch in np.array_split(rows, 3):
        quantizer.observe(observer, batch)
    return observer.statistics()


def effective(solution: Solution) -> np.ndarray:
    """The weight that the solution stands for, input scale taken out."""
    scales = np.atleast_2d(solution.scales)
    made = solution.values * np.repeat(scales, len(solution.values) // len(scales), axis=0)
    return made if solution.input_scale is None else made / solution.input_scale[:, None]


def error(quantizer: Quantizer, form: WeightFormat, seen: np.ndarray, judged: np.ndarray) -> float:
    """Relative error of the layer's output on the rows judged, after calibration on those seen."""
    solution = quantizer.solve(weight(), statistics(quantizer, seen), form)
    exact = judged @ weight()
    return float(np.linalg.norm(judged @ effective(solution) - exact) / np.linalg.norm(exact))
