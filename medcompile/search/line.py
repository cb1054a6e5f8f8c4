"""The line: assignments of formats to groups of layers, from the cheapest to the most exact.

Each group goes through its own formats from the cheapest on, as long as error falls; of all such moves the one that
removes the most error for what it costs comes first. Errors of groups add up as squares: what one group's rounding
does to the outputs has little to do with another's. Numbers in, assignments out; nothing is run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Group = tuple[str, ...]
"""Linear layers that read one tensor, by node name: what gets one format."""

Assignment = Mapping[Group, str]


@dataclass(frozen=True)
class Option:
    """A format that a group may have. cost: what the group adds to the whole with it. error: what it does alone to the
    outputs, as a share of their norm."""

    format: str
    cost: float
    error: float


def line(options: Mapping[Group, Sequence[Option]]) -> list[dict[Group, str]]:
    """Assignments from the cheapest to the most exact, each one move from the one before. Every group has an option."""
    steps: list[tuple[float, int, Group, str]] = []
    start: dict[Group, str] = {}
    for group, given in options.items():
        kept = hull(given)
        start[group] = kept[0].format
        for place, (before, after) in enumerate(itertools.pairwise(kept)):
            removed = before.error**2 - after.error**2
            steps.append((-removed / max(after.cost - before.cost, 1e-30), place, group, after.format))
    found = [dict(start)]
    for _, _, group, format_ in sorted(steps):
        found.append({**found[-1], group: format_})
    return found


def hull(options: Sequence[Option]) -> list[Option]:
    """The options that are worth having: rising cost, falling error, and each step removes less for its cost than the
    one before (the lower convex hull of squared error over cost)."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.error, o.format)):
        if kept and option.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(before: Option, after: Option) -> float:
    return (before.error**2 - after.error**2) / max(after.cost - before.cost, 1e-30)


def predicted_error(options: Mapping[Group, Sequence[Option]], assignment: Assignment) -> float:
    """Root of the summed squares of what each group does alone."""
    squares = (o.error**2 for g, f in assignment.items() for o in options[g] if o.format == f)
    return float(sum(squares) ** 0.5)
