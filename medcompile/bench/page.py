"""bench.html: one file with the tables and the plots of a comparison, without script or network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from medcompile import charts
from medcompile.bench import judgement, roofline, table
from medcompile.bench.results import Bench, Entry, Shape, Timing
from medcompile.charts import Axis, Bar, Caption, Dot, Series
from medcompile.page import STYLE, document, escape
from medcompile.page import table as html_table

_LINES = 8
"""Contenders in a plot of lines: with more, none can be told from the others."""
_EXACT = 1e-7
"""Errors are drawn no smaller: float32 in another order of summing."""
_PHASES = {"run": "", "first": ", first token", "step": ", later tokens"}


def html(found: Bench) -> str:
    """The page, as one string."""
    title = f"{found.name}, {found.task}: ways to run it"
    doubts = "".join(f"<li>{escape(w)}</li>" for w in judgement.warnings(found))
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in table.facts(found).splitlines()),
        "</header><main>",
        f"<h2>What to doubt</h2><ul>{doubts}</ul>" if doubts else "",
        *(_shape(found, shape, k) for k, shape in enumerate(found.shapes)),
        *_sweeps(found),
        _memory(found),
        _limits(found),
        _not_run(found),
        _versions(found),
        "</main>",
    ]
    return document(title, "\n".join(parts), STYLE + charts.STYLE)


def _timed(found: Bench, shape: Shape) -> list[tuple[Entry, Timing]]:
    """With numbers in that cell, the fastest first."""
    timed = [(e, t) for e in found.entries if (t := e.timing(shape.name)) is not None]
    return sorted(timed, key=lambda pair: pair[1].p50 or 0.0)


def _kind(entry: Entry) -> str:
    return "ours" if entry.ours else "others"


def _shape(found: Bench, shape: Shape, k: int) -> str:
    timed = _timed(found, shape)
    columns = table.columns(found, shape)
    heading = table.title(found, shape)
    rows = [(e.title, *(cell(e, t) for _, cell in columns)) for e, t in timed]
    failed = [
        f"<p>{escape(e.title)} failed: {escape(t.error)}</p>"
        for e in found.entries
        for t in e.cells
        if t.cell == shape.name and t.error
    ]
    parts = [f"<h2>{escape(heading)}</h2>", html_table(heading, ("contender", *(name for name, _ in columns)), rows)]
    return "\n".join([*parts, *failed, _ratios(found, shape, k), _tradeoff(found, shape, k)])


def _ratios(found: Bench, shape: Shape, k: int) -> str:
    rows = []
    for entry, _ in _timed(found, shape):
        ratio = judgement.against_reference(found, entry, shape.name)
        if ratio is not None:
            low, high = (None if end is None else 100 * (end - 1) for end in (ratio.low, ratio.high))
            rows.append(Bar(entry.title, 100 * (ratio.value - 1), low, high, None, _kind(entry)))
    if not rows:
        return ""
    text = f"Left of zero is faster than {found.reference}. An interval that holds zero is no difference."
    axis = Axis(f"% more time than {found.reference}")
    return charts.forest(Caption(f"ratios-{k}", "Time against the reference", text), rows, axis, ("ours", "others"))


def _tradeoff(found: Bench, shape: Shape, k: int) -> str:
    dots = []
    for entry, timing in _timed(found, shape):
        accuracy = timing.accuracy
        if accuracy is None or timing.p50 is None or entry.name == found.reference:
            continue
        right = accuracy.cosine_mean if accuracy.agreement is None else accuracy.agreement
        if right is not None:
            kind = "answers wrong" if accuracy.wrong else _kind(entry)
            dots.append(Dot(timing.p50, max(1 - right, _EXACT), entry.title, kind))
    if not dots:
        return ""
    what = (
        "1 - mean cosine"
        if any(t.accuracy and t.accuracy.cosine_mean for _, t in _timed(found, shape))
        else "disagreement"
    )
    text = f"The lower left is better: fast, and near to what {found.reference} answers."
    caption = Caption(f"tradeoff-{k}", "Latency against accuracy", text)
    kinds = ("ours", "others", "answers wrong")
    return charts.scatter(caption, dots, Axis("p50, ms", log=True), Axis(what, log=True), kinds=kinds)


def _sweeps(found: Bench) -> Iterator[str]:
    """Throughput against batch, and time against sequence, where cells differ in that alone."""
    fastest = [e for e, _ in _timed(found, found.shapes[0])][:_LINES] if found.shapes else []
    sequences = sorted({s.sequence for s in found.shapes})
    batches = sorted({s.batch for s in found.shapes})
    for sequence in sequences:
        line = sorted((s for s in found.shapes if s.sequence == sequence), key=lambda s: s.batch)
        if len({s.batch for s in line}) > 1:
            series = _series(fastest, line, lambda s: s.batch, table.throughput)
            text = f"At {sequence} tokens. " if sequence else ""
            caption = Caption(f"batches-{sequence}", "Throughput against batch", f"{text}The fastest {len(series)}.")
            unit = table.throughput_unit(line[0])
            yield charts.lines(caption, series, Axis("batch", log=True), Axis(unit, log=True))
    for batch in batches:
        line = sorted((s for s in found.shapes if s.batch == batch), key=lambda s: s.sequence)
        if len({s.sequence for s in line}) > 1:
            series = _series(fastest, line, lambda s: s.sequence, lambda s, t: t.p50)
            caption = Caption(
                f"sequences-{batch}", "Time against sequence", f"At batch {batch}. The fastest {len(series)}."
            )
            yield charts.lines(caption, series, Axis("tokens", log=True), Axis("p50, ms", log=True))


def _series(
    entries: Sequence[Entry],
    shapes: Sequence[Shape],
    x: Callable[[Shape], int],
    y: Callable[[Shape, Timing], float | None],
) -> list[Series]:
    found = []
    for entry in entries:
        points = [(float(x(s)), v) for s in shapes if (t := entry.timing(s.name)) and (v := y(s, t)) is not None]
        found.append(Series(entry.title, tuple(points)))
    return found


def _memory(found: Bench) -> str:
    rows = []
    for entry in found.entries:
        peaks = [t.peak_mb for t in entry.cells if t.peak_mb is not None]
        if peaks:
            rows.append(Bar(entry.title, max(peaks), kind=_kind(entry)))
    if not rows:
        return ""
    text = "Peak resident memory of the process while it ran, libraries and weights included, over all shapes."
    rows.sort(key=lambda row: row.value)
    return charts.bars(Caption("memory", "Memory", text), rows, Axis("MB"), ("ours", "others"))


def _limits(found: Bench) -> str:
    heading = "<h2>The physical limit</h2>"
    if not found.work or found.limits.memory_gbs is None:
        return f"{heading}<p>Not told: {escape(found.no_work or 'the machine could not be measured')}.</p>"
    peaks = ", ".join(f"{p} {v:.0f} ({found.limits.by.get(p, '')})" for p, v in found.limits.gops.items())
    said = f"Measured here: {found.limits.memory_gbs:.1f} GB/s read from memory; 10^9 operations a second: {peaks}."
    figures = []
    for shape in found.shapes:
        rows = [
            Bar(f"{entry.title}{_PHASES[share.phase]}", 100 * share.share, kind=f"bound by {share.bound}")
            for entry, timing in _timed(found, shape)
            for share in roofline.shares(found, entry, timing)
        ]
        if rows:
            text = (
                "The least time in which the work could be done here, in the contender's own precision, over its time."
            )
            caption = Caption(f"limit-{shape.name}", f"Share of the physical limit, {shape.name}", text)
            kinds = ("bound by arithmetic", "bound by memory")
            figures.append(charts.bars(caption, rows, Axis("% of what is possible"), kinds))
    return f"{heading}<p>{escape(said)}</p>" + "".join(figures)


def _not_run(found: Bench) -> str:
    rows = [(title, reason, fix) for title, reason, fix in table.not_run(found)]
    if not rows:
        return ""
    return "<h2>Not run</h2>" + html_table("Not run", ("contender", "why", "what would change it"), rows)


def _versions(found: Bench) -> str:
    rows = [
        (
            e.title,
            ", ".join(f"{name} {version}" for name, version in e.versions.items()),
            "; ".join(f"{name}: {value}" for name, value in e.notes.items()),
        )
        for e in found.entries
        if e.load_s is not None
    ]
    facts = [(name, value) for name, value in (*found.machine.items(), *found.digests.items())]
    return (
        "<h2>What ran</h2>"
        + html_table("Contenders", ("contender", "versions", "what it decided"), rows)
        + html_table("Machine and inputs", ("what", "value"), facts)
    )
