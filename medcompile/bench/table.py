"""A comparison on the terminal: one table for each shape, then what did not run, what to doubt, what changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from medcompile.bench import judgement, roofline
from medcompile.bench.judgement import Change
from medcompile.bench.peer import Missing
from medcompile.bench.results import Bench, Entry, Shape, Timing
from medcompile.bench.statistics import Ratio


def told(found: Bench) -> Iterator[RenderableType]:
    """Everything worth showing, in order."""
    yield Text(facts(found))
    for shape in found.shapes:
        yield _cell_table(found, shape)
    if silent := not_run(found):
        table = Table("contender", "why it did not run", "fix", title="not run", title_justify="left")
        for row in silent:
            table.add_row(*map(Text, row))
        yield table
    for warning in judgement.warnings(found):
        yield Text(f"warning: {warning}", style="yellow")


def not_run(found: Bench) -> list[tuple[str, str, str]]:
    """Contenders without a number in any cell: their titles, the reason, and what would change it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in found.entries:
        if not any(entry.timing(s.name) for s in found.shapes):
            missing = entry.missing or Missing(entry.error or _errors(entry))
            reasons.setdefault((missing.reason, missing.fix), []).append(entry.title)
    return [(", ".join(titles), reason, fix) for (reason, fix), titles in reasons.items()]


def facts(found: Bench) -> str:
    """What was measured, how and where, in a line or two."""
    what = {"model": "arrays in, arrays out: tokenization is outside the clock"}
    clock = what.get(found.clock, "texts or images in, answers out: tokenization is inside the clock")
    machine = ", ".join(found.machine[k] for k in ("cpu", "instructions", "gpu") if k in found.machine)
    power = f"energy: {found.energy}" if found.energy else f"no energy: {found.no_energy}"
    return (
        f"{found.name}, {found.task}; {clock}; {found.inputs}\n"
        f"{found.threads} threads, {found.rounds} rounds in random order (seed {found.seed}), one process each; "
        f"{machine}; {power}\n"
        f"ratio: time over that of {found.reference or 'none'} in the same round, the median over rounds, and its 95 % "
        "interval"
    )


Column = tuple[str, Callable[[Entry, Timing], str]]


def columns(found: Bench, shape: Shape) -> list[Column]:
    """Those that say something in this comparison."""
    timed = [(e, t) for e in found.entries if (t := e.timing(shape.name)) is not None]
    columns: list[Column] = [
        ("p50 ms", lambda e, t: number(t.p50)),
        ("p90", lambda e, t: number(t.p90)),
        ("p99", lambda e, t: number(t.p99)),
        ("ratio", lambda e, t: ratio(judgement.against_reference(found, e, shape.name), e.name == found.reference)),
        (throughput_unit(shape), lambda e, t: number(throughput(shape, t))),
        ("TTFT ms", lambda e, t: number(median(t.first))),
        ("TPOT ms", lambda e, t: number(median(t.step))),
        ("CPU ms", lambda e, t: number(t.cpu)),
        ("load s", lambda e, t: number(e.load_s, 2)),
        ("prepare s", lambda e, t: number(e.prepare_s)),
        ("peak MB", lambda e, t: number(t.peak_mb)),
        ("GPU MB", lambda e, t: number(t.gpu_mb)),
        ("J", lambda e, t: number(t.energy_j)),
        ("of the limit", lambda e, t: limit(found, e, t)),
        ("answers", lambda e, t: answers(t, e.name == found.reference)),
    ]
    return [c for c in columns if any(c[1](e, t) not in ("", "-") for e, t in timed)]


def _cell_table(found: Bench, shape: Shape) -> Table:
    shown = columns(found, shape)
    table = Table(title=title(found, shape), title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name, _ in shown:
        table.add_column(name, justify="left" if name in ("answers", "ratio", "of the limit") else "right")
    timed = [(t.p50 or 0.0, e, t) for e in found.entries if (t := e.timing(shape.name)) is not None]
    for _, entry, timing in sorted(timed, key=lambda row: row[0]):
        wrong = timing.accuracy is not None and bool(timing.accuracy.wrong)
        style = "red" if wrong else "bold" if entry.ours else ""
        table.add_row(Text(entry.title), *(Text(cell(entry, timing)) for _, cell in shown), style=style)
    for entry in found.entries:
        failed = next((t for t in entry.cells if t.cell == shape.name and t.error), None)
        if failed is not None:
            table.add_row(Text(entry.title), Text(f"failed: {failed.error}", overflow="fold"), style="red")
    return table


def title(found: Bench, shape: Shape) -> str:
    parts = [f"{shape.batch} x {shape.sequence} tokens" if shape.sequence else f"{shape.batch} items a run"]
    if shape.new:
        parts.append(f"{shape.new} generated")
    return f"{', '.join(parts)}; {found.threads} threads"


def throughput_unit(shape: Shape) -> str:
    return "tokens/s" if shape.new else "items/s"


def throughput(shape: Shape, timing: Timing) -> float | None:
    """Items a second, or tokens generated a second, all rows together, prompt included; by the median run."""
    return shape.batch * max(shape.new, 1) / timing.p50 * 1e3 if timing.p50 else None


def median(values: Iterable[float | None]) -> float | None:
    from statistics import median as middle

    known = [v for v in values if v is not None]
    return middle(known) if known else None


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits; whole numbers above a thousand."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def ratio(found: Ratio | None, is_reference: bool) -> str:
    if is_reference:
        return "reference"
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:.2f}, {found.rounds} rounds"
    same = " no difference" if found.no_difference else ""
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]{same}"


def answers(timing: Timing, is_reference: bool) -> str:
    """What the accuracy is, in a few words."""
    a = timing.accuracy
    if a is None:
        return "-"
    gold = [f"{a.gold_metric} {a.gold:.4f}"] if a.gold is not None else []
    if is_reference:
        return "; ".join(["reference", *gold])
    parts = [f"WRONG: {a.wrong}"] if a.wrong else []
    if a.cosine_mean is not None and a.cosine_worst is not None:
        parts.append(f"cosine {a.cosine_mean:.4f}, {a.cosine_worst:.4f} worst")
    if a.agreement is not None:
        parts.append(f"agreement {a.agreement:.4f}")
    return "; ".join([*parts, *gold])


def limit(found: Bench, entry: Entry, timing: Timing) -> str:
    """What share of the physical limit it reached, and what that limit is made of."""
    shown = [
        f"{s.share:.0%} {s.bound}{f', {s.phase}' if s.phase != 'run' else ''}"
        for s in roofline.shares(found, entry, timing)
    ]
    return "; ".join(shown) or "-"


def changes(found: Iterable[Change]) -> Table:
    """A comparison with an earlier run."""
    table = Table("contender", "shape", "ratio of ratios, then to now", "verdict", title_justify="left")
    for change in found:
        verdict = change.wrong or ("slower" if change.regressed else "")
        if change.ratio is not None and not verdict:
            verdict = "no difference" if change.ratio.no_difference else "within tolerance or faster"
        shown = ratio(change.ratio, False).removesuffix(" no difference")
        table.add_row(change.entry, change.cell, shown, verdict, style="red" if change.regressed else "")
    return table


def _errors(entry: Entry) -> str:
    return next((t.error for t in entry.cells if t.error), "it gave no numbers")
