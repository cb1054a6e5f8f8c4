"""The report's charts, drawn from the facts: accuracy against cost, differences and margins, labels, layers, clipping.

What a chart looks like is charts.py's; where it stands, the template's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medcompile import charts
from medcompile.charts import Axis, Bar, Caption, Dot, Limit
from medcompile.passes.clipping import Clipping
from medcompile.report.facts import Facts
from medcompile.report.words import is_lower
from medcompile.search.cost import FLOAT
from medcompile.search.record import UNITS, LayerChoice, Search
from medcompile.spec import Artifact, Evidence, Verdict

_VERDICTS = (*Verdict, "not judged")
_STATES = ("chosen", "passed on the tuning data", "failed on the tuning data")
_TAKEN = ("taken", "not taken")
_MOST_ROWS = 20


@dataclass(frozen=True)
class Figures:
    """HTML, in the order in which it stands; empty where the bundle has nothing to draw."""

    trade: tuple[str, ...]
    differences: tuple[str, ...]
    labels: tuple[str, ...]
    unjudged_labels: tuple[str, ...]
    sensitivity: tuple[str, ...]
    clipping: tuple[str, ...]


def draw(facts: Facts) -> Figures:
    return Figures(
        trade=(*_searched(facts), *_trades(facts)),
        differences=tuple(_differences(facts)),
        labels=tuple(_labels(facts, judged=True)),
        unjudged_labels=tuple(_labels(facts, judged=False)),
        sensitivity=tuple(_sensitivity(facts)),
        clipping=tuple(_clipping(facts)),
    )


def _budgeted(facts: Facts) -> dict[tuple[str, str], list[tuple[Artifact, Evidence]]]:
    """By graph and metric, what the budget names."""
    found: dict[tuple[str, str], list[tuple[Artifact, Evidence]]] = {}
    for artifact in facts.artifacts:
        for evidence in artifact.evidence:
            if evidence.margin is not None:
                found.setdefault((artifact.graph, evidence.metric), []).append((artifact, evidence))
    return found


def _of(facts: Facts, graph: str, metric: str) -> str:
    return metric if len({a.graph for a in facts.artifacts}) == 1 else f"{metric} of {graph}"


def _who(artifact: Artifact) -> str:
    return f"{artifact.variant} on {artifact.target.name}"


def _verdict(evidence: Evidence) -> str:
    return str(evidence.verdict or "not judged")


def _trades(facts: Facts) -> Iterator[str]:
    for n, ((graph, metric), found) in enumerate(_budgeted(facts).items()):
        timed = [(a, e) for a, e in found if a.latency_ms is not None]
        if not timed:
            continue
        left = len(found) - len(timed)
        yield charts.scatter(
            Caption(
                f"trade-{n}",
                f"{_of(facts, graph, metric)} against latency",
                "Each mark is an artifact; to the left is faster, upwards is better. Below the dashed line the "
                "estimate itself is over budget; the verdict goes by its bound."
                + (f" {left} that did not run here have no latency and are not drawn." if left else ""),
            ),
            [Dot(a.latency_ms or 0.0, e.difference, _who(a), _verdict(e)) for a, e in timed],
            Axis("median latency of one run, ms"),
            Axis("difference from the original"),
            Limit(-(found[0][1].margin or 0.0), f"budget: a loss of {found[0][1].margin:g}"),
            [v for v in _VERDICTS if any(v == _verdict(e) for _, e in timed)],
        )


def _searched(facts: Facts) -> Iterator[str]:
    for n, search in enumerate(facts.searches):
        margins = {(e.graph, e.metric): e.margin for p in search.points for e in p.tuning if e.margin is not None}
        for m, ((graph, metric), margin) in enumerate(margins.items()):
            dots = list(_points(search, graph, metric))
            unit = UNITS.get(search.objective, "")
            yield charts.scatter(
                Caption(
                    f"search-{n}-{m}",
                    f"{_of(facts, graph, metric)} against {search.objective} on {search.target}, in the search",
                    "Each mark is a precision that the search tried, judged on the tuning data; to the left is "
                    f"cheaper. Costs: {search.basis}.",
                ),
                dots,
                Axis(f"{search.objective}, {unit}"),
                Axis("difference from the original"),
                Limit(-margin, f"budget: a loss of {margin:g}"),
                [s for s in _STATES if any(d.kind == s for d in dots)],
            )


def _points(search: Search, graph: str, metric: str) -> Iterator[Dot]:
    for point in search.points:
        cost = point.predicted if point.cost is None else point.cost
        for e in point.tuning:
            if (e.graph, e.metric) == (graph, metric) and cost is not None:
                yield Dot(
                    cost,
                    e.difference,
                    point.name,
                    _STATES[0 if point.name == search.chosen else 2 - bool(point.passed)],
                )


def _differences(facts: Facts) -> Iterator[str]:
    for n, ((graph, metric), found) in enumerate(_budgeted(facts).items()):
        yield charts.forest(
            Caption(
                f"difference-{n}",
                f"Differences in {_of(facts, graph, metric)}",
                "The mark is the estimate, the left end of the line the bound that the verdict goes by, the right end "
                "the upper end of the interval, the dashed line the margin. Non-inferior: all of it is to the right.",
            ),
            [_row(_who(a), e) for a, e in found],
            Axis("difference from the original; a loss is negative"),
            [v for v in _VERDICTS if any(v == _verdict(e) for _, e in found)],
        )


def _labels(facts: Facts, *, judged: bool) -> Iterator[str]:
    """A chart for each artifact below fp32 of which a label was measured by itself, and judged, or none was."""
    for n, artifact in enumerate(facts.artifacts):
        of_labels = [e for e in artifact.evidence if "[" in e.metric]
        if not of_labels or not is_lower(facts.variants[artifact.variant]):
            continue
        if any(e.margin is not None for e in of_labels) is judged:
            yield charts.forest(
                Caption(
                    f"label-{n}",
                    f"{_who(artifact)}, {artifact.graph}: labels and subgroups by themselves",
                    "The mark is the estimate, the line runs from its bound to the upper end of its interval. What has "
                    "no margin is reported, and not judged.",
                ),
                [_row(e.metric, e) for e in of_labels],
                Axis("difference from the original; a loss is negative"),
                [v for v in _VERDICTS if any(v == _verdict(e) for e in of_labels)],
            )


def _row(label: str, e: Evidence) -> Bar:
    limit = None if e.margin is None else -e.margin
    return Bar(label, e.difference, e.lower, e.interval[1], limit, _verdict(e))


def _sensitivity(facts: Facts) -> Iterator[str]:
    for n, search in enumerate(s for s in facts.searches if s.layers):
        errors = [{form: error for form, error in _errors(layer) if form != FLOAT} for layer in search.layers]
        names = [_short(layer.nodes) for layer in search.layers]
        text = (
            "How far the outputs move on calibration data when this group of layers alone has that format; +2 means "
            "two more that read the same tensor."
        )
        worst = sorted(
            (
                Bar(f"{name}, {form}", error, kind=_TAKEN[form != layer.format])
                for name, layer, by_format in zip(names, search.layers, errors, strict=True)
                for form, error in by_format.items()
            ),
            key=lambda bar: -bar.value,
        )
        yield charts.bars(
            Caption(f"sensitive-{n}", f"What moves the outputs most, on {search.target}", text),
            worst[:_MOST_ROWS],
            Axis("change of the outputs, as a share of them"),
            _TAKEN,
        )
        formats = list(dict.fromkeys(form for by_format in errors for form in by_format))
        yield charts.heat(
            Caption(
                f"layers-{n}",
                f"Every group of layers in graph order, on {search.target}",
                f"{text} The stronger the shade, the further.",
            ),
            formats,
            names,
            [[by_format.get(form) for by_format in errors] for form in formats],
            Axis("change of the outputs", log=True),
        )


def _errors(layer: LayerChoice) -> Iterator[tuple[str, float]]:
    yield layer.format, layer.error
    for other in layer.alternatives:
        yield other.format, other.error


def _clipping(facts: Facts) -> Iterator[str]:
    n = 0
    for variant, graphs in facts.clipping.items():
        for graph, found in graphs.items():
            cut = sorted((c for c in found if c.clipped), key=lambda c: -c.clipped)[:_MOST_ROWS]
            if cut:
                yield charts.bars(
                    Caption(
                        f"clipping-{n}",
                        f"Where calibration clipped: {variant}, {graph}",
                        f"Share of the values seen in calibration that lie outside the stored range, of the {len(cut)} "
                        f"tensors that are cut most. Of {len(found)} rounded tensors "
                        f"{sum(c.clipped == 0 for c in found)} are not cut at all.",
                    ),
                    [Bar(_short(c.layers), 100 * c.clipped) for c in cut],
                    Axis("values outside the range, %"),
                )
                yield charts.heat(
                    Caption(
                        f"ranges-{n}",
                        f"How much of the observed extent the range covers: {variant}, {graph}",
                        "In graph order; 100 is all of it. Values far from all others are few, and without them the "
                        "steps between all others are finer.",
                    ),
                    ["range"],
                    [_short(c.layers) for c in found],
                    [[_covered(c) for c in found]],
                    Axis("extent covered, %"),
                )
                n += 1


def _covered(one: Clipping) -> float | None:
    """In per cent; None where range and observation are not in one unit."""
    (low, high), (least, most) = one.range, one.observed
    if one.rescaled or most <= least:
        return None
    return max(0.0, min(100.0, 100 * (min(high, most) - max(low, least)) / (most - least)))


def _short(nodes: Sequence[str]) -> str:
    """A group of layers by its first, and how many more read the same tensor: `encoder.layer.3.attention.query +2`."""
    name = nodes[0].removesuffix("/MatMul") if nodes else ""
    return f"{name} +{len(nodes) - 1}" if len(nodes) > 1 else name
