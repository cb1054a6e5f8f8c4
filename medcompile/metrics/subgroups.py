"""Subgroups of the items: a metric in each group of a column of the data, and the worst of them.

A column (site, sex, scanner) splits the items into groups; a metric named `accuracy[worst:site]` holds where it holds
in every one of them (an intersection-union test: Berger 1982), each at the full level. Which column there is, the
data's manifest says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from medcompile.metrics.material import Material, MissingMaterial, Predictions, renumbered
from medcompile.metrics.samples import Sample

Metric = Callable[[str, Material], Sample]

GROUP = "[worst:group]"
"""How the name of a worst subgroup's metric ends in lists of names."""
NO_GROUP = "(none)"
"""The group of items whose column is empty."""


@dataclass(frozen=True)
class Subgroups:
    """One metric in every group. empty: groups that hold nothing which it could be taken of, with their items."""

    column: str
    samples: Mapping[str, Sample]
    empty: Mapping[str, int]

    def lowest(self, alpha: float) -> str:
        """The group of the lowest lower bound."""
        bounds = {name: s.difference - s.widths(alpha)[0] for name, s in self.samples.items()}
        return min(bounds, key=bounds.__getitem__)


def worst_of(name: str) -> tuple[str, str] | None:
    """("accuracy", "site") of "accuracy[worst:site]"; None of another metric."""
    base, bracket, column = name.partition("[worst:")
    return (base, column[:-1]) if bracket and column.endswith("]") and len(column) > 1 else None


def subgroups(name: str, metric: Metric, m: Material) -> Subgroups:
    """name: as accuracy[worst:site], of a column that the data has; metric: accuracy.

    Raises MissingMaterial where there is no group that the metric can be taken of.
    """
    base, column = worst_of(name) or ("", "")
    metric(base, m)  # what the data lack as a whole is no group's fault
    samples: dict[str, Sample] = {}
    empty: dict[str, int] = {}
    for group in sorted(set(m.groups[column])):
        part = of_group(m, column, group)
        try:
            samples[group] = metric(base, part)
        except MissingMaterial:
            empty[group] = part.items
    if not samples:
        raise MissingMaterial(f"metric {name}: no group holds what it needs", fix="take it out of the budget")
    return Subgroups(column, samples, empty)


def of_group(m: Material, column: str, group: str) -> Material:
    """The items of one group. What is not by item (passages, kept tokens) is left out."""
    chosen = np.array([one == group for one in m.groups[column]])
    where = np.flatnonzero(chosen)

    def part(values: object) -> object:
        if isinstance(values, np.ndarray):
            return values[where]
        return None if values is None else [values[i] for i in where]  # type: ignore[index]

    def predictions(p: Predictions) -> Predictions:
        by_item = ("scores", "image_to_text", "text_to_image", "confidences")
        kept = {field: part(getattr(p, field)) for field in by_item}
        return Predictions(part(p.values) if len(p.values) == m.items else p.values, **kept)  # type: ignore[arg-type]

    return replace(
        m,
        reference=predictions(m.reference),
        candidate=predictions(m.candidate),
        gold=part(m.gold),  # type: ignore[arg-type]
        unit=renumbered(m.unit[where]),
        groups={},
    )
