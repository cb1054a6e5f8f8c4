"""The cost model: what a bundle costs, from how much of each graph's linear work is done in which format.

Linear in those shares, fitted by least squares to the points that were measured; so a layer's change of format costs
its share of what the whole graph's would. Where the target is elsewhere, the points are those of bundles that were
verified there, or, without any, plain assumptions that are told as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FLOAT = "float"
"""The format of layers that are not quantized: the variant's own float."""

Shares = Mapping[str, Mapping[str, float]]
"""By graph and format, the part of the graph's linear work that is done in it; the parts of a graph sum to 1."""

ASSUMED: Mapping[str, float] = {
    FLOAT: 0.0,
    "int8": -0.45,
    "int8-dynamic": -0.35,
    "int8-weights": -0.1,
    "float8": -0.45,
    "int4": -0.15,
}
"""Where nothing was measured: what a graph's time changes by, as a share of its float16 time, if all of its linear
layers have that format. Gemms are taken for 90 % of the time, 8-bit ones for twice as fast; weight-only formats gain at
batch 1 alone. Blocks of int4 count as int4."""


@dataclass(frozen=True)
class CostModel:
    """base: by graph, the cost with every layer in float. change: by graph and format, what it changes by with every
    layer in that format. basis: how it came about, in words."""

    base: Mapping[str, float]
    change: Mapping[str, Mapping[str, float]]
    basis: str

    def predict(self, shares: Shares) -> float:
        return sum(
            self.base[graph] + sum(part * self.of(graph, format_) for format_, part in parts.items())
            for graph, parts in shares.items()
        )

    def of(self, graph: str, format_: str) -> float:
        """What the graph's cost changes by if all of it goes from float to that format."""
        return 0.0 if format_ == FLOAT else self.change[graph][format_]


def fitted(points: Sequence[tuple[Shares, Mapping[str, float]]], basis: str) -> CostModel:
    """points: shares and, by graph, measured cost; one of them all float, and each format alone in one.

    Relative errors are weighed alike.
    """
    graphs = {graph: None for shares, _ in points for graph in shares}
    base: dict[str, float] = {}
    change: dict[str, dict[str, float]] = {}
    for graph in graphs:
        formats = sorted({f for shares, _ in points for f in shares[graph] if f != FLOAT})
        rows = np.array([[1.0, *(shares[graph].get(f, 0.0) for f in formats)] for shares, _ in points])
        costs = np.array([cost[graph] for _, cost in points])
        found = np.linalg.lstsq(rows / costs[:, None], np.ones(len(costs)), rcond=None)[0]
        base[graph] = float(found[0])
        change[graph] = dict(zip(formats, map(float, found[1:]), strict=True))
    return CostModel(base, change, basis)


def assumed(graphs: Sequence[str], formats: Sequence[str]) -> CostModel:
    """The model of a target that is elsewhere and was never measured; a graph all in float costs 1."""
    change = {f: ASSUMED.get(f, ASSUMED.get(f.partition("-")[0], 0.0)) for f in formats if f != FLOAT}
    basis = "assumed: the target is not here, and no bundle measured on it was named"
    return CostModel(dict.fromkeys(graphs, 1.0), dict.fromkeys(graphs, change), basis)


def scaled(model: CostModel, graphs: Sequence[str]) -> CostModel:
    """The model of another bundle's measurements for these graphs, in units of a float graph's cost: its mean over that
    bundle's graphs."""
    formats = sorted({f for change in model.change.values() for f in change})
    change = {
        f: float(np.mean([model.change[g][f] / model.base[g] for g in model.base if f in model.change[g]]))
        for f in formats
    }
    return CostModel(dict.fromkeys(graphs, 1.0), dict.fromkeys(graphs, change), model.basis)
