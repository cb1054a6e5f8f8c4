"""From paired samples and margins to Evidence: p-values, Holm's levels, verdicts, power, and the items it takes.

What a sample counts, and how its bounds come about, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medcompile.metrics.samples import LowestValue, Sample
from medcompile.metrics.subgroups import Subgroups
from medcompile.spec import Evidence, Margin, Verdict

_POWER = 0.8
_MOST_GROWTH = 1e6
_LEAST_P = 1e-9
_EVEN = 0.5  # bounds are one-sided: past it they would lie on the other side of what was seen


@dataclass(frozen=True)
class Step:
    """Where Holm's procedure came to one metric: it is judged at its own level divided by divisor."""

    p_value: float | None = None
    divisor: int = 1
    note: str = ""

    def level(self, margin: Margin) -> float:
        return (1.0 - margin.confidence) / self.divisor

    def confidence(self, margin: Margin) -> float:
        return margin.confidence if self.divisor == 1 else round(1.0 - self.level(margin), 12)


ALONE = Step()


def holds(sample: Sample | Subgroups, margin: Margin, level: float) -> bool:
    """True where the lower bound at that level rules out a drop of the margin; of subgroups, in every one of them.

    A margin that a single event would already exceed can't be kept or broken by data.
    """
    if isinstance(sample, Subgroups):
        return not sample.empty and all(holds(part, margin, level) for part in sample.samples.values())
    return not _below_one_event(sample, margin) and sample.difference - sample.widths(level)[0] > -margin.max_drop


def _below_one_event(sample: Sample, margin: Margin) -> bool:
    return margin.max_drop * sample.events < 1.0


def _is_inferior(sample: Sample, margin: Margin, level: float) -> bool:
    below = sample.difference + sample.widths(level)[1] < -margin.max_drop
    return below and not _below_one_event(sample, margin)


def p_value(sample: Sample | Subgroups, margin: Margin) -> float:
    """Of a drop of the margin or more: the smallest level at which it is ruled out. 1 for a margin below one event.

    Above 0.5, where the bounds say nothing of their own, it is what the upper bound leaves. Of subgroups: the largest.
    """
    if isinstance(sample, Subgroups):
        return 1.0 if sample.empty else max(p_value(part, margin) for part in sample.samples.values())
    if _below_one_event(sample, margin):
        return 1.0
    if holds(sample, margin, _EVEN):
        return _least(lambda level: holds(sample, margin, level))
    if not _is_inferior(sample, margin, _EVEN):
        return _EVEN
    return 1.0 - _least(lambda level: _is_inferior(sample, margin, level))


def _least(true: Callable[[float], bool]) -> float:
    """The smallest level for which a condition is true that is true of every larger one, and of 0.5."""
    low, high = _LEAST_P, _EVEN
    if true(low):
        return low
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if true(middle) else (middle, high)
    return high


def holm(family: Sequence[tuple[Sample | Subgroups, Margin]]) -> list[Step]:
    """The step of each metric: of k, the one whose p-value is smallest for its level is judged at its level / k, the
    next at its level / (k - 1), and so on; after the first that fails none passes, and all are told at that divisor.

    The chance that any of them is falsely called non-inferior is at most the largest of their levels, however they
    depend on each other. Source: Holm 1979, with p-values weighed by their levels.
    """
    p = [p_value(sample, margin) for sample, margin in family]
    size = len(family)
    weighed = sorted(range(size), key=lambda i: p[i] / (1.0 - family[i][1].confidence))
    steps: dict[int, Step] = {}
    failed = 0
    for rank, i in enumerate(weighed):
        place = failed or rank + 1
        note = f"Holm: {place} of {size}" if not failed else f"Holm: stopped at {place} of {size}"
        steps[i] = Step(p[i], size - place + 1, note if size > 1 else "")
        if not failed and not holds(*family[i], steps[i].level(family[i][1])):
            failed = place
    return [steps[i] for i in range(size)]


def verdict(sample: Sample | Subgroups, margin: Margin, step: Step = ALONE) -> tuple[Verdict, str]:
    """Where the one-sided bounds of the difference stand against the margin, and a note where they don't decide.

    Non-inferior at the step's level; inferior where the upper bound at the margin's own shows it (of any of k
    subgroups, at that divided by k).
    """
    if holds(sample, margin, step.level(margin)):
        return Verdict.NON_INFERIOR, ""
    if isinstance(sample, Subgroups):
        return (Verdict.INFERIOR if _worse(sample, margin) else Verdict.INCONCLUSIVE), _too_small(sample, margin)
    if _below_one_event(sample, margin):
        note = f"a margin of {margin.max_drop:g} is less than one event in {sample.events:g}"
        return Verdict.INCONCLUSIVE, note
    return (Verdict.INFERIOR if _is_inferior(sample, margin, ALONE.level(margin)) else Verdict.INCONCLUSIVE), ""


def _worse(groups: Subgroups, margin: Margin) -> list[str]:
    """The groups of which the loss is shown, each tested at the margin's level divided by their number."""
    level = ALONE.level(margin) / len(groups.samples)
    return [name for name, part in groups.samples.items() if _is_inferior(part, margin, level)]


def _too_small(groups: Subgroups, margin: Margin) -> str:
    """Which groups can't be judged at that margin: no such group may be passed over."""
    small = {name: part.samples for name, part in groups.samples.items() if _below_one_event(part, margin)}
    told = ", ".join(f"{name} ({count})" for name, count in sorted({**groups.empty, **small}.items()))
    return f"too small to judge: {told}" if told else ""


def samples_for_power(sample: Sample, margin: float, alpha: float) -> int | None:
    """Items for a power of 0.8 at zero true drop, flips and spread as seen; None past a million times what is there."""
    low, high = 1e-6, 1.0
    while sample.power(margin, alpha, high) < _POWER:
        low, high = high, high * 2
        if high > _MOST_GROWTH:
            return None
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if sample.power(margin, alpha, middle) >= _POWER else (middle, high)
    return max(2, round(high * sample.samples + 0.5))


def judge(
    sample: Sample | Subgroups, margin: Margin | None, *, metric: str, unit: str, graph: str, step: Step = ALONE
) -> Evidence:
    """Test one metric. Without a margin the interval (at 95 %) is reported and nothing is judged.

    Of subgroups the one with the lowest lower bound is shown, or one whose loss is; the power is that of all together.
    """
    confidence, alpha = (step.confidence(margin), step.level(margin)) if margin else (0.95, 0.05)
    outcome: Verdict | None = None
    power: float | None = None
    needed: int | None = None
    notes: list[str] = []
    parts: list[Sample] = []
    shown = sample
    if margin:
        outcome, note = verdict(sample, margin, step)
        notes = [note, step.note]
    if isinstance(sample, Subgroups):
        worse = _worse(sample, margin) if margin else []
        name = worse[0] if worse else sample.lowest(alpha)
        shown, parts = sample.samples[name], list(sample.samples.values())
        notes.insert(0, f"the worst of {len(parts) + len(sample.empty)} groups by {sample.column}: {name}")
    assert not isinstance(shown, Subgroups)
    if margin and isinstance(shown, LowestValue):
        notes = [shown.unseen(confidence, unit)]
    elif margin and margin.max_drop > 0:
        power = math.prod(part.power(margin.max_drop, alpha) for part in parts or [shown])
        needed = samples_for_power(shown, margin.max_drop, alpha)
    difference = shown.difference
    below, _ = shown.widths(alpha)
    outer = shown.widths(alpha / 2)
    return Evidence(
        metric=metric,
        reference=shown.reference,
        value=shown.value,
        difference=difference,
        lower=difference - below,
        interval=(difference - outer[0], difference + outer[1]),
        confidence=confidence,
        samples=shown.samples,
        units=shown.units,
        unit=unit,
        method=shown.method(),
        margin=margin.max_drop if margin else None,
        verdict=outcome,
        discordant=shown.discordant,
        power=power,
        samples_needed=needed,
        graph=graph,
        note="; ".join(note for note in notes if note),
        p_value=step.p_value,
    )
