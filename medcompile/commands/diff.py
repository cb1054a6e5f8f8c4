"""medcompile diff: what changed between two bundles, with a test of one against the other on the same items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medcompile.commands.options import AllowPhi, AsJson, Threads, Verbose
from medcompile.errors import DataError, PhiError, UsageError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from medcompile.bundle import Bundle
    from medcompile.change_record import Criteria
    from medcompile.diff import Diff
    from medcompile.paired import Paired

_SHOWN = 12
_COLORS = {"worse": "red", "better": "green", "differs": "yellow"}


def diff(
    a: Annotated[Path, typer.Argument(metavar="BUNDLE_A", help="The bundle before.")],
    b: Annotated[Path, typer.Argument(metavar="BUNDLE_B", help="The bundle after.")],
    data: Annotated[
        Path | None, typer.Option(help="Manifest of the evaluation data; default: calibration/NAME.yaml here.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a change record there: FILE.md or FILE.json.")
    ] = None,
    protocol: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Acceptance criteria, YAML or JSON; default: the budget of b.")
    ] = None,
    no_run: Annotated[bool, typer.Option("--no-run", help="Compare the files alone, and run nothing.")] = False,
    allow_phi: AllowPhi = False,
    threads: Threads = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what changed between two bundles: files, recipe, data, precision, evidence, speed; and test b against a.

    The test runs both on the data that both were judged on. --record writes what changed, how that was to be judged
    and what it did as one document.
    """
    from medcompile import bundle, terminal

    if record is not None and record.suffix not in (".md", ".json"):
        raise UsageError(f"--record {record}: a change record is .md or .json", fix="name it change.md, for example")
    before, after = bundle.read(a), bundle.read(b)
    from medcompile import change_record, manifest
    from medcompile.diff import diff as difference

    criteria = change_record.from_file(protocol, after) if protocol else change_record.from_budget(before, after)
    changed = difference(before, after)
    tested = _test(before, after, criteria, data=data, no_run=no_run, allow_phi=allow_phi, threads=threads)
    if as_json:
        parts = {"paired": tested, "criteria": criteria, "impact": change_record.impacts(tested)}
        plain = {"schema_version": change_record.SCHEMA_VERSION, **manifest.encode(changed)}
        typer.echo(json.dumps(plain | {name: manifest.encode(part) for name, part in parts.items()}, indent=1))
    elif changed.identical:
        typer.echo(f"{before.root} and {after.root} are identical: digest {before.digest}")
    else:
        _tell(changed, tested, criteria, verbose)
    if record is not None:
        _write(record, change_record.record(changed, tested, criteria, after))
        terminal.console(stderr=True).print(f"change record: {record}", markup=False, soft_wrap=True)


def _test(
    before: Bundle,
    after: Bundle,
    criteria: Criteria,
    *,
    data: Path | None,
    no_run: bool,
    allow_phi: bool,
    threads: int | None,
) -> Paired:
    """The paired test, or why there is none. Raises DataError and UsageError where --data names what can't be used."""
    from medcompile import paired, terminal, verify

    if no_run:
        return paired.Paired("it was left out, by --no-run")
    if before.digest == after.digest:
        return paired.Paired("the bundles are identical")
    if reason := paired.why_not(before, after):
        return paired.Paired(reason)
    if all(paired.unchanged(before, after, pair) for pair in paired.pairs(before, after)):
        return paired.run(before, after, None, criteria.margins)
    try:
        dataset = verify.evaluation(after, data, allow_phi=allow_phi)
    except (UsageError, DataError) as error:
        if data is not None or isinstance(error, PhiError):
            raise
        return paired.Paired(f"{error.message}; name it with --data")
    told = terminal.console(stderr=True)
    return paired.run(
        before, after, dataset, criteria.margins, threads, lambda what: told.print(what, markup=False, soft_wrap=True)
    )


def _write(path: Path, made: Any) -> None:
    from medcompile import change_markdown, manifest

    text = (
        change_markdown.markdown(made) if path.suffix == ".md" else json.dumps(manifest.encode(made), indent=1) + "\n"
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--record {path}: {error.strerror}", fix="name a file in a folder that can be written"
        ) from error


# ---- for people


def _tell(changed: Diff, tested: Paired, criteria: Criteria, verbose: bool) -> None:
    from medcompile import terminal

    console = terminal.console()
    console.print(
        terminal.facts(
            [
                ("a", f"{changed.a.name} ({changed.a.root}), digest {changed.a.digest[:12]}"),
                ("b", f"{changed.b.name} ({changed.b.root}), digest {changed.b.digest[:12]}"),
            ]
        )
    )
    for table in _file_tables(changed, None if verbose else _SHOWN):
        console.print(table)
    for table in _run_tables(tested, verbose):
        console.print(table)
    same = [
        what
        for what in ("source", "weights", "recipe", "data", "budget", "variants", "precision", "versions")
        if getattr(changed, what) == ()
    ]
    notes = [f"the same in both: {', '.join(same)}"] if same else []
    notes += [f"note: {note}" for note in changed.notes]
    if tested.reason:
        notes.append(f"note: b was not tested against a: {tested.reason}")
    else:
        notes.append(f"criteria: {criteria.origin}. {criteria.told}")
    for pair in tested.pairs:
        what = f"{pair.graph} for {pair.target}, {pair.b} against {pair.a}"
        if pair.unchanged:
            notes.append(f"{what}: nothing that could change an answer differs; not run")
        elif not pair.ran:
            notes.append(f"{what}: not tested: {pair.reason}")
        elif pair.reason:
            notes.append(f"{what}: {pair.ran}, for an artifact does not run here: {pair.reason}")
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def _file_tables(changed: Diff, most: int | None) -> Iterator[Table]:
    """What the files tell; of long lists the first."""
    from medcompile import layer_table
    from medcompile.diff import counted

    for title, found in (
        ("source", changed.source),
        ("recipe", changed.recipe),
        ("data", changed.data),
        ("budget", changed.budget),
        ("variants", changed.variants),
        ("versions and targets", changed.versions),
    ):
        yield from _table(title, "what|a|b", [(c.key, _said(c.a), _said(c.b)) for c in found], most)
    files = counted(changed.files)
    yield from _table("files", "where|what|>files", [(w, what, str(n)) for (w, what), n in files.items()])
    weights = [
        (
            w.variant,
            w.graph,
            w.name,
            f"{w.a or 'absent'} -> {w.b or 'absent'}" if w.changed is None else f"{w.changed:,} of {w.elements:,}",
            "" if w.relative is None else f"{w.relative:.2e}",
            "" if w.largest is None else f"{w.largest:.2e}",
        )
        for w in sorted(changed.weights or (), key=lambda w: -(w.relative or 0.0))
    ]
    head = "variant|graph|tensor|>numbers changed|>relative change|>largest"
    yield from _table("stored tensors, those that changed most first", head, weights, most)
    precision = [
        (
            p.variant,
            p.graph,
            p.op,
            p.a or "absent",
            p.b or "absent",
            str(len(p.layers)),
            _few(layer_table.groups(p.layers)),
        )
        for p in changed.precision
    ]
    yield from _table("precision", "variant|graph|operator|a|b|>count|layers", precision, most)
    recorded = [
        (r.target, r.variant, r.graph, r.metric, *(_value(e) for e in (r.a, r.b)), *(_verdict(e) for e in (r.a, r.b)))
        for r in changed.metrics
        if any(e is not None and e.margin is not None for e in (r.a, r.b))
    ]
    head = "target|variant|graph|metric|>a|>b|a's verdict|b's verdict"
    yield from _table("recorded, each against its own original (difference)", head, recorded, most)
    built = [
        (x.target, x.variant, x.graph, *(_size(f) for f in (x.a, x.b)), *(_latency(f) for f in (x.a, x.b)), _machine(x))
        for x in changed.artifacts
    ]
    head = "target|variant|graph|>a MB|>b MB|>a ms|>b ms|recorded on"
    yield from _table("sizes and recorded latencies", head, built)


def _run_tables(tested: Paired, verbose: bool) -> Iterator[Table]:
    """What running both told: what was judged, and of the rest what moved, unless all is wanted."""
    from rich.text import Text

    from medcompile.change_record import impacts

    found = impacts(tested)
    shown = [i for i in found if verbose or i.evidence.verdict or i.effect in _COLORS]
    rows = [
        (
            i.target,
            i.graph,
            _names(i),
            i.evidence.metric,
            f"{i.evidence.reference:.4f}",
            f"{i.evidence.value:.4f}",
            f"{i.evidence.difference:+.4f}",
            f"{i.evidence.interval[0]:+.4f} .. {i.evidence.interval[1]:+.4f}",
            "" if i.evidence.margin is None else f"{i.evidence.margin:g}",
            str(i.evidence.verdict or ""),
            Text(i.effect, _COLORS.get(i.effect, "dim")),
        )
        for i in shown
    ]
    title = "b against a, on the same items"
    if len(shown) < len(found):
        title += f" (and {len(found) - len(shown)} other metrics without a change; -v or --json for all)"
    head = "target|graph|variant|metric|>a|>b|>difference|interval|>margin|verdict|effect"
    yield from _table(title, head, rows)
    flips = [
        (p.target, p.graph, _names(p), str(p.items), *(str(p.flips.get(k, 0)) for k in ("harmful", "healed", "other")))
        for p in tested.pairs
        if p.flips is not None
    ]
    head = "target|graph|variant|>items|>right in a only|>right in b only|>other"
    yield from _table("items of which a decision changed", head, flips)
    times = [
        (
            p.target,
            p.graph,
            _names(p),
            ", ".join(f"{k} {v}" for k, v in p.timing.shape.items()),
            f"{p.timing.a_ms:.2f}",
            f"{p.timing.b_ms:.2f}",
            f"{p.timing.ratio:.3f}",
            f"{p.timing.spread[0]:.3f} .. {p.timing.spread[1]:.3f}",
            str(p.timing.rounds),
        )
        for p in tested.pairs
        if p.timing is not None
    ]
    head = "target|graph|variant|shape|>a ms|>b ms|>b / a|quartiles|>rounds"
    yield from _table("latency, in turns on this machine", head, times)


def _table(title: str, head: str, rows: Sequence[Sequence[str | Text]], most: int | None = None) -> Iterator[Table]:
    """A table as terminal.table has it, unless there are no rows; of more than most, the first and how many more."""
    from medcompile import terminal

    more = f" (first {most} of {len(rows)}; -v or --json for all)" if most is not None and len(rows) > most else ""
    if rows:
        yield terminal.table(title + more, head, rows[:most])


def _names(pair: Any) -> str:
    return f"{pair.b} / {pair.a}" if pair.a != pair.b else str(pair.a)


def _said(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _value(evidence: Any) -> str:
    return "absent" if evidence is None else f"{evidence.value:.4f} ({evidence.difference:+.4f})"


def _verdict(evidence: Any) -> str:
    return "" if evidence is None else str(evidence.verdict or "not judged")


def _size(figures: Any) -> str:
    return "absent" if figures is None else f"{figures.size_bytes / 1e6:.2f}"


def _latency(figures: Any) -> str:
    return "" if figures is None or figures.latency_ms is None else f"{figures.latency_ms:.2f}"


def _machine(built: Any) -> str:
    """Where the latencies are from; both, if they are not from one kind of machine."""
    return "; ".join(dict.fromkeys(f.machine for f in (built.a, built.b) if f is not None and f.latency_ms is not None))
