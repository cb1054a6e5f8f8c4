"""What a comparison found: the dataclasses of bench.json, to and from a file.

Facts as measured; what follows from them (ratios, intervals, warnings) is computed when it is shown (judgement.py), so
that an old file is judged by today's rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medcompile import manifest
from medcompile.bench.peer import Missing, Note
from medcompile.errors import UsageError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Accuracy:
    """How a contender's answers compare with the reference's on the same batches.

    agreement: share of decisions that are the same (labels, tokens; of spans, F1); None of vectors. cosine_mean,
    cosine_worst: of vectors. gold: the metric of the data's own labels, where it has some, by gold_metric.
    wrong: why the answers are not to be used, if so.
    """

    items: int
    agreement: float | None = None
    cosine_mean: float | None = None
    cosine_worst: float | None = None
    gold: float | None = None
    gold_metric: str = ""
    wrong: str = ""


@dataclass(frozen=True)
class Timing:
    """One contender in one cell. Times in ms; a turn is one contender's share of a round.

    turns: median time of a run in each round; None where it had no turn. p50, p90, p99: over all runs of all rounds,
    each None where the runs are too few to tell (p90: 10; p99: 100). cpu: CPU time of a run, over all threads.
    first, step: of decoders, medians in each round of the time to the first token and of each later token.
    energy_j: of a run, of the whole machine. warm: each run while it warmed up.
    error: why the cell has no numbers, or fewer.
    """

    cell: str
    turns: tuple[float | None, ...] = ()
    runs: int = 0
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    cpu: float | None = None
    first: tuple[float | None, ...] = ()
    step: tuple[float | None, ...] = ()
    energy_j: float | None = None
    peak_mb: float | None = None
    gpu_mb: float | None = None
    warm: tuple[float, ...] = ()
    error: str = ""
    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class Entry:
    """One contender: peer's name and its option, what it is, what it cost to make and to load, and its cells.

    missing: why it was not started; error: why it ended before its time. MB are 10^6 bytes. rss_mb: resident after
    loading, libraries included; base_mb: of its process before that.
    """

    name: str
    title: str
    peer: str
    option: str = ""
    ours: bool = False
    engine: str = ""
    precision: str = ""
    float_precision: str = ""
    device: str = "cpu"
    missing: Missing | None = None
    error: str = ""
    prepare_s: float | None = None
    prepare_peak_mb: float | None = None
    load_s: float | None = None
    base_mb: float | None = None
    rss_mb: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Note] = field(default_factory=dict)
    cells: tuple[Timing, ...] = ()

    def timing(self, cell: str) -> Timing | None:
        """Its numbers in that cell; None if it has none."""
        return next((t for t in self.cells if t.cell == cell and any(v is not None for v in t.turns)), None)


@dataclass(frozen=True)
class Shape:
    """One cell as it was timed. runs: in a turn. orders: of the contenders, round by round.

    spin_ms: a fixed piece of arithmetic before each turn: how steady the clock is. other_load, stolen: the shares of
    the cores' time that other processes, and a hypervisor, had during the turns; None where it is not told.
    """

    name: str
    batch: int
    sequence: int
    new: int
    runs: int
    orders: tuple[tuple[str, ...], ...] = ()
    spin_ms: tuple[float, ...] = ()
    other_load: float | None = None
    stolen: float | None = None


@dataclass(frozen=True)
class Limits:
    """What the machine can do with these threads, measured: 10^9 bytes a second read from memory, and 10^9 operations a
    second by precision of both factors (a multiply and an add are two). by: what measured each. cache_mb: what fits in
    there is not read from memory each time."""

    memory_gbs: float | None = None
    cache_mb: float = 0.0
    gops: Mapping[str, float] = field(default_factory=dict)
    by: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a cell asks of whoever runs it. phase: run; of decoders first (up to the first token) and step (each later).

    linear_ops, attention_ops: operations, two for a multiply and an add. weights: elements of the linear layers, each
    read once. state_bytes: keys and values read, in 16 bits.
    """

    cell: str
    phase: str
    linear_ops: float
    attention_ops: float
    weights: float
    state_bytes: float = 0.0


@dataclass(frozen=True)
class Bench:
    """A whole comparison. name: the bundle's or the recipe's. digests: of the bundle and the inputs.

    energy: which meters were read; no_energy: why others were not. no_work: why there is no physical limit to tell.
    """

    name: str
    family: str
    task: str
    clock: str
    threads: int
    cpus: tuple[int, ...]
    rounds: int
    seed: int
    reference: str
    machine: Mapping[str, str]
    inputs: str
    digests: Mapping[str, str]
    entries: tuple[Entry, ...]
    shapes: tuple[Shape, ...]
    energy: str = ""
    no_energy: str = ""
    throttled: int | None = None
    limits: Limits = Limits()
    work: tuple[Work, ...] = ()
    no_work: str = ""
    version: str = ""
    schema_version: int = SCHEMA_VERSION

    def entry(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name), None)

    def shape(self, cell: str) -> Shape | None:
        return next((s for s in self.shapes if s.name == cell), None)


def write(found: Bench, path: Path) -> None:
    path.write_text(json.dumps(manifest.encode(found), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(path: Path) -> Bench:
    """Raises UsageError if that file is none of this version."""
    fix = "give the bench.json that an earlier `medcompile bench` wrote, or measure again"
    try:
        raw: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}", fix=fix) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{path}: schema version {version!r}; this medcompile reads {SCHEMA_VERSION}", fix=fix)
    try:
        found: Bench = manifest.decode(Bench, raw, "bench")
    except manifest.Malformed as error:
        raise UsageError(f"{path}: {error}", fix=fix) from None
    return replace(found)
