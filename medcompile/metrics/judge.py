"""From a paired sample and a margin to Evidence: bounds, verdict, power, and the items that a clear answer takes."""

from __future__ import annotations

from medcompile.metrics.samples import LowestValue, Sample
from medcompile.spec import Evidence, Margin, Verdict

_POWER = 0.8
_MOST_GROWTH = 1e6


def verdict(sample: Sample, margin: Margin) -> tuple[Verdict, str]:
    """Where the one-sided bounds of the difference stand against the margin, and a note where they don't decide.

    A margin that a single event would already exceed can't be kept or broken by data: inconclusive.
    """
    if margin.max_drop * sample.events < 1.0:
        return Verdict.INCONCLUSIVE, f"a margin of {margin.max_drop:g} is less than one event in {sample.events:g}"
    difference = sample.difference
    below, above = sample.widths(1.0 - margin.confidence)
    if difference - below > -margin.max_drop:
        return Verdict.NON_INFERIOR, ""
    return (Verdict.INFERIOR if difference + above < -margin.max_drop else Verdict.INCONCLUSIVE), ""


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


def judge(sample: Sample, margin: Margin | None, *, metric: str, unit: str, graph: str) -> Evidence:
    """Test one metric. Without a margin the interval (at 95 %) is reported and nothing is judged."""
    confidence = margin.confidence if margin else 0.95
    alpha = 1.0 - confidence
    difference = sample.difference
    below, _ = sample.widths(alpha)
    outer = sample.widths(alpha / 2)
    outcome: Verdict | None = None
    power: float | None = None
    needed: int | None = None
    note = ""
    if margin:
        outcome, note = verdict(sample, margin)
        if isinstance(sample, LowestValue):
            note = sample.unseen(confidence, unit)
        elif margin.max_drop > 0:
            power = sample.power(margin.max_drop, alpha)
            needed = samples_for_power(sample, margin.max_drop, alpha)
    return Evidence(
        metric=metric,
        reference=sample.reference,
        value=sample.value,
        difference=difference,
        lower=difference - below,
        interval=(difference - outer[0], difference + outer[1]),
        confidence=confidence,
        samples=sample.samples,
        units=sample.units,
        unit=unit,
        method=sample.method(),
        margin=margin.max_drop if margin else None,
        verdict=outcome,
        discordant=sample.discordant,
        power=power,
        samples_needed=needed,
        graph=graph,
        note=note,
    )
