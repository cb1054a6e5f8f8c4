"""The change record as Markdown, for people. What it says is change_record.py's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from medcompile import layer_table
from medcompile.change_record import Assessment, Judged, Record
from medcompile.diff import Change, Diff, counted
from medcompile.spec import Evidence

_SHOWN = 40


def markdown(made: Record) -> str:
    return "\n".join(_lines(made)) + "\n"


def _lines(made: Record) -> Iterator[str]:
    changed, criteria = made.modifications, made.protocol.criteria
    yield f"# Change record: {changed.b.name}"
    yield ""
    yield f"Written {made.written} by medcompile {made.medcompile}."
    yield ""
    yield from _table(
        ("", "bundle", "digest"),
        (("a, before", changed.a.name, changed.a.digest), ("b, after", changed.b.name, changed.b.digest)),
    )
    yield "## 1. Description of modifications"
    yield ""
    yield from _modifications(changed)
    yield "## 2. Verification protocol"
    yield ""
    yield f"Acceptance criteria: {criteria.origin}." + (
        f" Dated {criteria.date}, sha256 {criteria.sha256}." if criteria.sha256 else ""
    )
    yield criteria.told
    yield ""
    yield from _table(
        ("metric", "largest tolerated loss", "confidence"),
        ((m.metric, f"{m.max_drop:g}", f"{m.confidence:g}") for m in criteria.margins),
    )
    known = made.protocol.data
    told = ", ".join(f"{key} {known[key]}" for key in ("name", "role", "items", "digest") if known.get(key))
    yield f"Data: {told or 'not recorded'}."
    yield ""
    yield made.protocol.method
    yield ""
    yield from _table(
        ("target", "graph", "a", "b", "criterion", "a's value", "b's value", "difference", "lower bound", "outcome"),
        (
            (o.target, o.graph, o.a, o.b, o.metric, *_figures(o.evidence), f"**{o.outcome}**" + _because(o))
            for o in made.protocol.outcomes
        ),
        empty="No criterion was tested.",
    )
    yield "### Recorded when they were built: each bundle against its own original"
    yield ""
    judged = [r for r in changed.metrics if any(e is not None and e.margin is not None for e in (r.a, r.b))]
    yield from _table(
        ("target", "variant", "graph", "metric", "a", "b"),
        ((r.target, r.variant, r.graph, r.metric, _recorded(r.a), _recorded(r.b)) for r in judged),
        empty="Neither holds judged metrics.",
    )
    yield "## 3. Impact assessment"
    yield ""
    yield from _impact(made.impact)
    yield "### Not assessed"
    yield ""
    yield from (f"- {one}" for one in made.impact.not_assessed)
    yield ""
    yield "## Use"
    yield ""
    yield made.use


def _recorded(e: Evidence | None) -> str:
    return "absent" if e is None else f"{e.value:.4f} ({e.difference:+.4f}), {e.verdict or 'not judged'}"


def _because(one: Judged) -> str:
    return f" ({one.why})" if one.why else ""


def _figures(e: Evidence | None) -> tuple[str, ...]:
    if e is None:
        return ("", "", "", "")
    return f"{e.reference:.4f}", f"{e.value:.4f}", f"{e.difference:+.4f}", f"{e.lower:+.4f}"


def _modifications(changed: Diff) -> Iterator[str]:
    if changed.identical:
        yield "None: the two bundles are the same, byte for byte."
        yield ""
        return
    same = []
    sections: tuple[tuple[str, tuple[Change, ...]], ...] = (
        ("Source model", changed.source),
        ("Recipe", changed.recipe),
        ("Data", changed.data),
        ("Budget", changed.budget),
        ("Variants", changed.variants),
        ("Library versions and targets", changed.versions),
    )
    for title, found in sections:
        if not found:
            same.append(title.lower())
            continue
        yield f"### {title}"
        yield ""
        yield from _table(("what", "a", "b"), ((c.key, _said(c.a), _said(c.b)) for c in found[:_SHOWN]))
        yield from _more(len(found))
    if changed.files:
        yield "### Files"
        yield ""
        yield from _table(
            ("where", "what", "files"), ((area, what, str(n)) for (area, what), n in counted(changed.files).items())
        )
    if changed.weights:
        yield "### Stored tensors"
        yield ""
        rows = [
            (
                w.variant,
                w.graph,
                w.name,
                f"{w.changed} of {w.elements}" if w.changed is not None else "",
                "" if w.relative is None else f"{w.relative:.3g}",
                "" if w.changed is not None else f"{w.a or 'absent'} to {w.b or 'absent'}",
            )
            for w in changed.weights
        ]
        yield from _table(("variant", "graph", "tensor", "numbers changed", "relative change", "type"), rows[:_SHOWN])
        yield from _more(len(rows))
    if changed.precision:
        yield "### Precision by layer"
        yield ""
        yield from _table(
            ("variant", "graph", "operator", "a", "b", "layers"),
            (
                (
                    p.variant,
                    p.graph,
                    p.op,
                    p.a or "absent",
                    p.b or "absent",
                    f"{len(p.layers)}: {', '.join(layer_table.groups(p.layers)[:6])}",
                )
                for p in changed.precision[:_SHOWN]
            ),
        )
        yield from _more(len(changed.precision))
    same += ["stored tensors"] if changed.weights == () else []
    if same:
        yield f"The same in both: {', '.join(same)}."
        yield ""


def _more(count: int) -> Iterator[str]:
    if count > _SHOWN:
        yield f"And {count - _SHOWN} more: `medcompile diff --json` has all."
        yield ""


def _impact(found: Assessment) -> Iterator[str]:
    if not any(pair.ran for pair in found.pairs):
        yield "Nothing was run, so nothing is known of b's answers beside a's."
        yield ""
        return
    yield "Differences are b's to a, signed so that a loss is below 0; intervals are two-sided at the confidence given."
    yield "Metrics without a criterion are not corrected for their number: of twenty, one may look changed by chance."
    yield ""
    for title, effects in (
        ("Worse", ("worse",)),
        ("Better", ("better",)),
        ("Answers that differ, right or wrong", ("differs",)),
        ("No change shown", ("no change shown", "none")),
    ):
        rows = [i for i in found.metrics if i.effect in effects]
        yield f"### {title}"
        yield ""
        yield from _table(
            ("target", "graph", "a", "b", "metric", "a's value", "b's value", "difference", "interval", "n"),
            (
                (
                    i.target,
                    i.graph,
                    i.a,
                    i.b,
                    i.evidence.metric,
                    *_figures(i.evidence)[:3],
                    _interval(i.evidence),
                    str(i.evidence.samples),
                )
                for i in rows
            ),
            empty="None of the metrics that were tested.",
        )
    yield "### Decisions that changed"
    yield ""
    kinds = ("harmful", "healed", "other")
    yield from _table(
        ("target", "graph", "a", "b", "items", "right in a, wrong in b", "wrong in a, right in b", "other"),
        (
            (p.target, p.graph, p.a, p.b, str(p.items), *(str(p.flips.get(kind, 0)) for kind in kinds))
            for p in found.pairs
            if p.flips is not None
        ),
        empty="No decisions were compared.",
    )
    yield "### Speed"
    yield ""
    yield from _table(
        ("target", "graph", "a", "b", "shape", "a ms", "b ms", "b / a", "quartiles", "machine"),
        (
            (
                p.target,
                p.graph,
                p.a,
                p.b,
                ", ".join(f"{k} {v}" for k, v in p.timing.shape.items()),
                f"{p.timing.a_ms:g}",
                f"{p.timing.b_ms:g}",
                f"{p.timing.ratio:.3f}",
                f"{p.timing.spread[0]:.3f} to {p.timing.spread[1]:.3f}",
                p.timing.machine,
            )
            for p in found.pairs
            if p.timing is not None
        ),
        empty="Not measured.",
    )


def _interval(e: Evidence) -> str:
    return f"{e.interval[0]:+.4f} to {e.interval[1]:+.4f} ({100 * e.confidence:g} %)"


def _said(value: Any) -> str:
    return "absent" if value is None else str(value) if len(str(value)) <= 90 else f"{str(value)[:87]}..."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], empty: str = "") -> Iterator[str]:
    """A Markdown table and an empty line after it; empty, or nothing, where there are no rows."""
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    if body:
        yield f"| {' | '.join(head)} |"
        yield f"|{'---|' * len(head)}"
        yield from (f"| {' | '.join(row)} |" for row in body)
        yield ""
    elif empty:
        yield empty
        yield ""
