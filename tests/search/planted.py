"""A bench whose layers have known errors and costs, so that a search can be checked without a model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from medcompile.errors import BackendError
from medcompile.metrics import Predictions, evaluate
from medcompile.metrics.judge import ALONE, verdict
from medcompile.metrics.material import Material
from medcompile.metrics.tasks import METRICS
from medcompile.search import Searcher, at_looks
from medcompile.search.cost import FLOAT, CostModel
from medcompile.search.line import Group
from medcompile.search.menu import Menu, format_of
from medcompile.spec import Evidence, Margin, Precision, Variant

INT8 = Variant("int8", weights=Precision.INT8, activations=Precision.INT8, dynamic=True)
WEIGHTS = Variant("int8-weights", weights=Precision.INT8)
MENU = Menu("float32", Variant(FLOAT), {"int8": (INT8,), "int8-weights": (WEIGHTS,)})


@dataclass
class PlantedBench:
    """A classifier of some layers. errors: by layer, what int8 does to the outputs; weights alone do a tenth of it.

    True accuracy falls by the root of the summed squares of the layers' errors; or, with true_drop, by that much as
    soon as any layer is not float, flattered: on the acceptance data only. Every variant draws which answers it changes
    by itself, on the same items. Costs are exact: a float layer costs 1, int8 a half, weights alone .8, all else 2.
    """

    errors_of: Mapping[str, float]
    items: Mapping[str, int] = field(default_factory=lambda: {"tuning": 2000, "acceptance": 2000})
    margins: tuple[Margin, ...] = (Margin("accuracy", 0.02),)
    here: bool = True
    refused: tuple[str, ...] = ()
    seed: int = 0
    true_drop: float | None = None
    noise: float = 0.0
    flattered: bool = False
    quick: bool = False
    judged: list[str] = field(default_factory=list)

    def groups(self) -> Mapping[Group, Mapping[str, float]]:
        return {(f"{name}/MatMul",): {"classify": 100.0} for name in self.errors_of}

    def format(self, name: str, variant: Variant) -> str:
        own = variant.for_node(f"{name}/MatMul")
        return {"float": FLOAT, "int8-dynamic": "int8", "int8-weights": "int8-weights"}[format_of(own)]

    def cost(self, variant: Variant) -> Mapping[str, float]:
        formats = self._formats(variant)
        if any(f in self.refused for f in formats):
            raise BackendError("no such kernel", fix="none")
        return {"classify": 2.0 + sum({FLOAT: 1.0, "int8": 0.5, "int8-weights": 0.8}[f] for f in formats)}

    def size(self, variant: Variant) -> int:
        return 1000

    def error(self, variant: Variant) -> float:
        return float(sum(self._alone(n, self.format(n, variant)) ** 2 for n in self.errors_of) ** 0.5)

    def errors(self, formats: Mapping[str, Variant]) -> Mapping[Group, Mapping[str, float]]:
        return {(f"{n}/MatMul",): {f: self._alone(n, f) for f in formats} for n in self.errors_of}

    def _alone(self, name: str, format_: str) -> float:
        return {FLOAT: 0.0, "int8": 1.0, "int8-weights": 0.1}[format_] * self.errors_of[name]

    def tuning(self, variant: Variant) -> tuple[Evidence, ...]:
        return self._judged("tuning", variant)

    def acceptance(self, variant: Variant) -> tuple[Evidence, ...]:
        return self._judged("acceptance", variant)

    def drop(self, variant: Variant) -> float:
        """The true loss of accuracy."""
        if self.true_drop is None:
            return self.error(variant)
        return self.true_drop if self._formats(variant) != [FLOAT] * len(self.errors_of) else 0.0

    def _formats(self, variant: Variant) -> list[str]:
        return [self.format(name, variant) for name in self.errors_of]

    def _judged(self, role: str, variant: Variant) -> tuple[Evidence, ...]:
        """The role's items are the same for all variants; each changes some right answers to wrong, and some back.

        As many again change either way without any loss, so that a drop of zero is not without flips.
        """
        self.judged.append(role)
        n = self.items[role]
        right = np.random.default_rng([self.seed, role == "tuning"]).random(n) < 0.9
        own = zlib.crc32(" ".join(self._formats(variant)).encode())
        luck = np.random.default_rng([self.seed, role == "tuning", own]).random(n)
        drop = 0.0 if self.flattered and role == "tuning" else self.drop(variant)
        lost, healed = (drop + self.noise) / 0.9, self.noise / 0.1
        kept = np.where(right, luck >= lost, luck < healed)
        gold = np.zeros(n, np.int64)
        reference, candidate = (Predictions((~r).astype(np.int64)) for r in (right, kept))
        if self.quick:
            return tuple(_verdict(margin, reference, candidate, gold) for margin in self.margins)
        found = evaluate("sequence-classification", self.margins, reference, candidate, gold, None, ("no", "yes"))
        return tuple(e for e in found if e.margin is not None)


def _verdict(margin: Margin, reference: Predictions, candidate: Predictions, gold: NDArray[np.int64]) -> Evidence:
    """What evaluate() says of one margin on accuracy, without what no search reads, which takes most of the time."""
    task, items = "sequence-classification", np.arange(len(gold))
    material = Material(task, reference, candidate, gold, items, ("no", "yes"), {})
    sample = METRICS[task][margin.metric](margin.metric, material)
    level = ALONE.level(margin)
    below, outer = sample.widths(level)[0], sample.widths(level / 2)
    return Evidence(
        metric=margin.metric,
        reference=sample.reference,
        value=sample.value,
        difference=sample.difference,
        lower=sample.difference - below,
        interval=(sample.difference - outer[0], sample.difference + outer[1]),
        confidence=margin.confidence,
        samples=sample.samples,
        units=sample.units,
        unit="item",
        method=sample.method(),
        margin=margin.max_drop,
        verdict=verdict(sample, margin)[0],
        discordant=sample.discordant,
    )


def searcher(bench: PlantedBench, looks: int = 3, points: int = 24, elsewhere: CostModel | None = None) -> Searcher:
    bench.margins = at_looks(bench.margins, looks)
    return Searcher(
        bench=bench,
        target="planted-cpu",
        objective="latency",
        menus=[replace(MENU)],
        most_looks=looks,
        growth=bench.items["acceptance"] / bench.items["tuning"],
        most_points=points,
        told=lambda line: None,
        variant="optimized",
        reference="fp32",
        elsewhere=elsewhere,
    )
