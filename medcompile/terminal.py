"""What the command line shows: build progress, evidence and layer tables. Data goes to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medcompile.program import PassRecord, Progress
from medcompile.spec import Artifact, Verdict

if TYPE_CHECKING:
    from rich.status import Status

    from medcompile.bundle import Bundle
    from medcompile.layer_errors import LayerError

_FILE_WIDTH = 180
_COLORS = {Verdict.NON_INFERIOR: "green", Verdict.INFERIOR: "red", Verdict.INCONCLUSIVE: "yellow", None: "dim"}


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; into a file or a pipe as wide as a table needs, so that no figure is cut."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=_FILE_WIDTH)


class LiveProgress:
    """One line per step with its time and peak memory; where stderr is a terminal, the running one is live."""

    def __init__(self, verbose: bool) -> None:
        self._console = console(stderr=True)
        self._verbose = verbose
        self._status: Status | None = None
        self._name = ""

    def begin(self, name: str) -> None:
        self.close()  # a step that a target refused has no end
        self._name = name
        if self._console.is_terminal:
            self._status = self._console.status(name)
            self._status.start()
        elif self._verbose:
            self._console.print(f"{name} ...")

    def step(self, message: str, done: int = 0, total: int = 0) -> None:
        counted = f" {done}/{total}" if total else ""
        if self._status is not None:
            self._status.update(f"{self._name}{counted} [dim]{message}[/dim]")
        elif self._verbose:
            self._console.print(f"  {self._name}{counted} {message}", markup=False)

    def end(self, record: PassRecord) -> None:
        self.close()
        if not record.cached:
            figures = f"{record.seconds:7.2f} s  {record.peak_rss_bytes / 2**20:6.0f} MiB"
            self._console.print(f"{record.name:<44}{figures}", markup=False)
        elif self._verbose:
            self._console.print(f"{record.name:<44} cached", markup=False)

    def note(self, message: str) -> None:
        self._console.print(f"note: {message}", markup=False, soft_wrap=True)

    def close(self) -> None:
        """Give the terminal back: what was running has ended or failed."""
        if self._status is not None:
            self._status.stop()
            self._status = None


class JsonProgress:
    """One JSON object per event on stderr, for other programs."""

    def begin(self, name: str) -> None:
        self._write(event="begin", name=name)

    def step(self, message: str, done: int = 0, total: int = 0) -> None:
        self._write(event="step", message=message, done=done, total=total)

    def end(self, record: PassRecord) -> None:
        self._write(
            event="end",
            name=record.name,
            key=record.key,
            seconds=round(record.seconds, 4),
            peak_rss_bytes=record.peak_rss_bytes,
            cached=record.cached,
        )

    def note(self, message: str) -> None:
        self._write(event="note", message=message)

    def _write(self, **fields: str | int | float | bool) -> None:
        sys.stderr.write(json.dumps(fields) + "\n")


@contextmanager
def progress(as_json: bool, verbose: bool) -> Iterator[Progress]:
    """Progress on stderr, as JSON or for people."""
    if as_json:
        yield JsonProgress()
        return
    live = LiveProgress(verbose)
    try:
        yield live
    finally:
        live.close()


def evidence_table(artifacts: Iterable[Artifact], title: str, judged_only: bool = False) -> Table:
    """One row per artifact and metric: reference, value, difference with its bound, verdict, power, and what ran."""
    artifacts = tuple(artifacts)
    several = len({artifact.graph for artifact in artifacts}) > 1
    table = Table(title=Text(title), title_justify="left")
    for name in ("variant", "target", *(["graph"] if several else []), "metric"):
        table.add_column(name)
    for name in ("reference", "value", "difference", "lower bound", "margin", "n"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_column("power (n for 0.8)", justify="right")
    table.add_column("what ran")
    for artifact in artifacts:
        shown = [e for e in artifact.evidence if e.margin is not None or not judged_only]
        for i, e in enumerate(shown):
            power = "" if e.power is None else f"{e.power:.2f}"
            needed = f" ({e.samples_needed})" if e.samples_needed is not None else ""
            color = _COLORS[e.verdict]
            table.add_row(
                artifact.variant if i == 0 else "",
                artifact.target.name if i == 0 else "",
                *([artifact.graph if i == 0 else ""] if several else []),
                e.metric,
                f"{e.reference:.4f}",
                f"{e.value:.4f}",
                f"{e.difference:+.4f}",
                f"{e.lower:+.4f}",
                "" if e.margin is None else f"{e.margin:g}",
                str(e.samples),
                f"[{color}]{e.verdict or 'reported'}[/{color}]",
                power + needed,
                ("engine" if artifact.ran else "graph on CPU") if i == 0 else "",
            )
    return table


def size_table(bundle: Bundle) -> Table:
    """One row per artifact: size on disk, latency where measured, verdict."""
    table = Table(title="artifacts", title_justify="left")
    for name in ("variant", "target", "graph"):
        table.add_column(name)
    for name in ("size MB", "latency ms"):
        table.add_column(name, justify="right")
    for name in ("verdict", "verified on", "library"):
        table.add_column(name)
    for a in bundle.artifacts:
        size = sum(bundle.files[p].size for p in bundle.under(bundle.folder_of(a)))
        latency = "" if a.latency_ms is None else f"{a.latency_ms:.1f}"
        verdict = f"[{_COLORS[a.verdict]}]{a.verdict or 'not judged'}[/{_COLORS[a.verdict]}]"
        library = f"{a.target.backend} {a.target.version}"
        table.add_row(a.variant, a.target.name, a.graph, f"{size / 1e6:.1f}", latency, verdict, a.verified_on, library)
    return table


def layer_table(layers: Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]]) -> Table:
    """Counts of operators by precision, per variant and graph."""
    table = Table(title="operators by precision", title_justify="left")
    for name in ("variant", "graph", "operator", "precision"):
        table.add_column(name)
    table.add_column("count", justify="right")
    for variant, graphs in layers.items():
        for graph, rows in graphs.items():
            counts = Counter((row["op"], row["precision"]) for row in rows)
            for (op, precision), count in sorted(counts.items()):
                table.add_row(variant, graph, op, precision, str(count))
    return table


def engine_tables(engine: Mapping[str, Any], title: str) -> Iterator[Table]:
    """What a backend tells of an engine that it built (layers.json beside the plan): size, tensors, linear layers, and
    every layer with its operands."""
    plan, products = engine["plan"], Counter(engine["products"].values())
    yield facts(
        [
            ("engine", title),
            ("built by", engine["library"]),
            ("plan", f"{plan['size_bytes'] / 1e6:.1f} MB, sha256 {plan['sha256']}"),
            ("linear layers", ", ".join(f"{n} {f or 'not found'}" for f, n in sorted(products.items())) or "none"),
            ("layers", str(len(engine["layers"]))),
        ]
    )
    tensors = Table(title="inputs and outputs (-1: dynamic)", title_justify="left")
    for name in ("tensor", "mode", "format", "shape", "profiles: smallest, usual, largest"):
        tensors.add_column(name)
    for t in engine["bindings"]:
        profiles = "\n".join(", ".join(map(str, ends)) for ends in t.get("profiles", ()))
        tensors.add_row(*map(Text, (t["name"], t["mode"], t["format"], str(t["shape"]), profiles)))
    yield tensors
    layers = Table(title="layers, in the order of execution", title_justify="left")
    for name in ("kind", "inputs", "weights", "outputs"):
        layers.add_column(name)
    layers.add_column("computes", overflow="fold")
    for row in engine["layers"]:
        nodes = row["nodes"]
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        operands = ("\n".join(row[part]) for part in ("inputs", "weights", "outputs"))
        layers.add_row(*map(Text, (row["kind"], *operands, f"{nodes[0]}{more}" if nodes else row["name"])))
    yield layers


def layer_error_table(rows: Sequence[LayerError], title: str) -> Table:
    """One row per layer: its relative error beside the running level; those that jump stand out."""
    table = Table(title=Text(title), title_justify="left")
    for name in ("layer", "operator"):
        table.add_column(name)
    for name in ("relative error", "running level"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        mark = Text("jumps", "red") if row.jumped else Text("")
        table.add_row(Text(row.node), row.op, f"{row.error:.5f}", f"{row.level:.5f}", mark)
    return table


def table(title: str, head: str, rows: Iterable[Sequence[str | Text]]) -> Table:
    """A table of plain text. head: the columns' names with | between them; those that begin with > are set right."""
    made = Table(title=Text(title), title_justify="left")
    for name in head.split("|"):
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return made


def facts(rows: Iterable[tuple[str, Any]]) -> Table:
    """Two columns without a frame: a name and what it is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), value if isinstance(value, Text) else Text(str(value)))
    return table
