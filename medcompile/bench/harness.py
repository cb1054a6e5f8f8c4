"""The rounds: every contender in its own process, all alive, one at a time running, in an order drawn anew each round.

What is asked is a Plan; what is found is a results.Bench. A contender that fails becomes a line of the result and the
others go on; leaving in any way leaves no process.
"""

from __future__ import annotations

import json
import math
import random
import statistics as medians
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import medcompile
from medcompile import manifest
from medcompile.bench import accuracy, machine, peers, roofline, statistics
from medcompile.bench.peer import Cell, Job, Missing, Peer
from medcompile.bench.process import ContenderError, Process
from medcompile.bench.results import Bench, Entry, Limits, Shape, Timing
from medcompile.errors import UsageError

Tell = Callable[[str], None]

MAX_RUNS = 20
_LEAD_BELOW_S = 0.5
_MB = 1e6


@dataclass(frozen=True)
class Patience:
    """Seconds until a contender that does not answer is killed, and those that a turn should last."""

    prepare_s: float = 3600.0
    load_s: float = 600.0
    run_s: float = 120.0
    warm_s: float = 20.0
    turn_s: float = 0.25


@dataclass(frozen=True)
class Plan:
    """What is compared. job: with cells and inputs, without option. asked: contenders by name, each with or without
    `:option`; empty is all. pythons: another interpreter for some, by name. scratch: a folder for the run's files.
    reference: which contender is the yardstick; empty: the first that offers itself. limits: measure the machine's."""

    name: str
    job: Job
    scratch: Path
    asked: tuple[str, ...] = ()
    pythons: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""
    rounds: int = 10
    seed: int = 0
    inputs: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    limits: bool = True
    patience: Patience = Patience()


@dataclass
class Contender:
    """A contender while it competes. process: None before it is started, and after its end."""

    entry: Entry
    job: Job
    python: str
    peer: str
    prepares: bool = False
    reference: bool = False
    process: Process | None = None
    error: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    answers: dict[str, accuracy.Answers] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.entry.name

    def lost(self, error: ContenderError) -> str:
        """Take note of what went wrong; after a fatal error it competes no more."""
        if error.fatal:
            self.error = error.message
            if self.process is not None:
                self.process.close()
            self.process = None
        return error.message


def run(plan: Plan, tell: Tell) -> Bench:
    """Compare. tell: gets a line of progress now and then. Raises UsageError for contenders that nobody knows."""
    found = look(plan)
    if plan.reference and plan.reference not in [c.name for c in found]:
        raise UsageError(
            f"no contender {plan.reference!r} to compare with", fix=f"choose from: {', '.join(c.name for c in found)}"
        )
    runnable = [c for c in found if c.entry.missing is None and not c.error]
    throttled = machine.throttled()
    limits = Limits()
    if plan.limits:
        tell("measuring what this machine can do at most")
        limits = roofline.measure(plan.job.threads, plan.job.cpus)
    with ExitStack() as opened:
        for contender in runnable:
            _start(plan, contender, opened, tell)
        shapes = [
            _cell(plan, index, cell, [c for c in runnable if c.process is not None], tell)
            for index, cell in enumerate(plan.job.cells)
        ]
    reference = _reference(plan, found)
    if reference is not None:
        _judge(plan, found, reference)
    hot = machine.throttled()
    energy, no_energy = machine.energy_sources()
    work, no_work = roofline.work(plan.job)
    return Bench(
        name=plan.name,
        family=plan.job.family,
        task=plan.job.task,
        clock=plan.job.clock,
        threads=plan.job.threads,
        cpus=plan.job.cpus,
        rounds=plan.rounds,
        seed=plan.seed,
        reference=reference.name if reference else "",
        machine=machine.facts(),
        inputs=plan.inputs,
        digests=plan.digests,
        entries=tuple(replace(c.entry, error=c.error or c.entry.error, cells=tuple(c.timings.values())) for c in found),
        shapes=tuple(shapes),
        energy=energy,
        no_energy=no_energy,
        throttled=None if hot is None or throttled is None else hot - throttled,
        limits=limits,
        work=work,
        no_work=no_work,
        version=medcompile.__version__,
    )


# ---- who competes


def look(plan: Plan) -> list[Contender]:
    """Every contender that was asked for, also those that can't run, each with its reason."""
    asked: dict[str, list[str]] = {}
    for name in plan.asked or peers.names():
        own, _, option = name.partition(":")
        asked.setdefault(own, []).append(option)
    for name in plan.pythons:
        if name not in asked:
            raise UsageError(f"--python names {name!r}, which does not compete", fix=f"choose from: {', '.join(asked)}")
    found: list[Contender] = []
    for name, options in asked.items():
        try:
            peer = peers.get(name)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  a fault in one contender's file is that contender's result
            broken = Missing(f"its file is broken: {type(error).__name__}: {error}")
            found.append(Contender(Entry(name, name, name, missing=broken), plan.job, sys.executable, name))
            continue
        python = plan.pythons.get(name, sys.executable)
        missing, offered = _offers(plan, name, peer, python)
        chosen = [o for o in offered if "" in options or o in options]
        if missing is None and (unknown := set(options) - {"", *offered}):
            raise UsageError(f"{name} has no option {', '.join(unknown)}", fix=f"choose from: {', '.join(offered)}")
        for option in chosen if missing is None else [""]:
            entry = Entry(
                f"{peer.name}:{option}" if option else peer.name,
                f"{peer.title} {option}".strip(),
                peer.name,
                option,
                ours=peer.ours,
                engine=peer.engine,
                precision=peer.precision,
                float_precision=peer.float_precision,
                device=peer.device,
                missing=missing,
            )
            prepares = type(peer).prepare is not Peer.prepare
            job = replace(plan.job, option=option)
            found.append(Contender(entry, job, python, name, prepares, reference=peer.reference))
    return found


def _offers(plan: Plan, name: str, peer: Peer, python: str) -> tuple[Missing | None, list[str]]:
    """Why a contender can't run, or the options that it has."""
    if python == sys.executable:
        try:
            missing = peer.missing(plan.job)
            return missing, [] if missing else list(peer.options(plan.job))
        except Exception as error:  # noqa: BLE001  a fault in one contender's file is that contender's result
            return Missing(f"{type(error).__name__}: {error}"), []
    try:
        with _process(plan, name, plan.job, python, "look") as process:
            told = process.answer(plan.patience.run_s, "look")
    except ContenderError as error:
        return Missing(error.message, f"check --python {name}={python}"), []
    missing = Missing(**told["missing"]) if told["missing"] else None
    return missing, list(told["options"])


def _process(plan: Plan, peer: str, job: Job, python: str, step: str) -> Process:
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=plan.scratch, delete=False, encoding="utf-8") as file:
        json.dump(manifest.encode(job), file)
    return Process(python, [peer, file.name, step], Path(file.name).with_suffix(".log"), job.threads)


def _start(plan: Plan, contender: Contender, opened: ExitStack, tell: Tell) -> None:
    """Prepare and load; on an error it is out."""
    peer = contender.peer
    try:
        if contender.prepares:
            tell(f"{contender.name}: preparing its files, unless an earlier run did")
            with _process(plan, peer, contender.job, contender.python, "prepare") as process:
                told = process.answer(plan.patience.prepare_s, "prepare")
            contender.entry = replace(
                contender.entry, prepare_s=told["seconds"], prepare_peak_mb=told["peak_bytes"] / _MB
            )
        tell(f"{contender.name}: loading")
        contender.process = opened.enter_context(_process(plan, peer, contender.job, contender.python, "serve"))
        told = contender.process.ask("load", plan.patience.load_s)
        contender.process.pause()
    except ContenderError as error:
        contender.lost(ContenderError(error.message, fatal=True))
        return
    contender.entry = _described(
        replace(
            contender.entry,
            load_s=told["seconds"],
            base_mb=told["before_bytes"] / _MB,
            rss_mb=told["rss_bytes"] / _MB,
            versions=told["versions"],
        ),
        told["notes"],
    )


def _described(entry: Entry, notes: Mapping[str, Any]) -> Entry:
    """The entry with what the contender says of itself."""
    own = {k: str(notes[k]) for k in ("engine", "precision", "float_precision", "device") if k in notes}
    rest = {k: v for k, v in notes.items() if k not in own}
    return replace(entry, notes=rest, **own)  # type: ignore[arg-type]


# ---- one cell


class _Tally:
    """What one contender's turns in one cell gave."""

    def __init__(self, rounds: int) -> None:
        self.turns: list[float | None] = [None] * rounds
        self.first: list[float | None] = [None] * rounds
        self.step: list[float | None] = [None] * rounds
        self.runs: list[float] = []
        self.cpu: list[float] = []
        self.joules: list[float] = []
        self.warm: list[float] = []
        self.error = ""

    def add(self, k: int, told: Mapping[str, Any], joules: float | None) -> None:
        """Round k, as the contender's process told of it."""
        took = [ns / 1e6 for ns in told["ns"]]
        self.turns[k] = medians.median(took)
        self.runs += took
        self.cpu.append(told["run_cpu_ns"] / 1e6 / len(took))
        if told["first_ns"]:
            self.first[k] = medians.median(told["first_ns"]) / 1e6
        if told["steps_ns"]:
            self.step[k] = medians.median(told["steps_ns"]) / 1e6
        if joules is not None:
            self.joules.append(joules)

    def timing(self, cell: str) -> Timing:
        decoder = any(value is not None for value in self.first)
        p50, p90, p99 = (statistics.percentile(self.runs, share) for share in (0.5, 0.9, 0.99))
        return Timing(
            cell,
            tuple(self.turns),
            len(self.runs),
            p50,
            p90,
            p99,
            cpu=medians.median(self.cpu) if self.cpu else None,
            first=tuple(self.first) if decoder else (),
            step=tuple(self.step) if decoder else (),
            energy_j=medians.median(self.joules) if self.joules else None,
            warm=tuple(self.warm),
            error=self.error,
        )


def _cell(plan: Plan, index: int, cell: Cell, alive: Sequence[Contender], tell: Tell) -> Shape:
    """Warm up, then the rounds, then the answers. Every contender's Timing goes into its timings."""
    tallies = {c.name: _Tally(plan.rounds) for c in alive}
    running = []
    for contender in alive:
        tell(f"{cell.name}: {contender.name} warms up")
        told = _asked(contender, tallies, "warm", plan.patience.run_s, cell=index, limit_s=plan.patience.warm_s)
        if told is not None:
            tallies[contender.name].warm = [ns / 1e6 for ns in told["ns"]]
            running.append(contender)
    settled = {c.name: medians.median(tallies[c.name].warm[-5:]) / 1e3 for c in running}
    count = max(1, min(MAX_RUNS, math.ceil(plan.patience.turn_s / min(settled.values())))) if settled else 1
    order = random.Random(f"{plan.seed} {cell.name}")
    orders: list[tuple[str, ...]] = []
    watch = _Watch(plan.job.cpus)
    for k in range(plan.rounds):
        running = [c for c in running if not tallies[c.name].error]
        if not running:
            break
        order.shuffle(running)
        orders.append(tuple(c.name for c in running))
        tell(f"{cell.name}: round {k + 1} of {plan.rounds}")
        for contender in running:
            lead = int(settled[contender.name] < _LEAD_BELOW_S)
            timeout = max(plan.patience.run_s, 20 * (count + lead) * settled[contender.name])
            watch.begin()
            told = _asked(contender, tallies, "run", timeout, first=k * count, count=count, lead=lead)
            if told is not None:
                joules = watch.end(told["cpu_ns"] / 1e9)
                tallies[contender.name].add(k, told, None if joules is None else joules / (count + lead))
    for k, contender in enumerate(alive):
        tally = tallies[contender.name]
        contender.timings[cell.name] = tally.timing(cell.name)
        path = plan.scratch / f"answers-{index}-{k}.npz"
        told = _asked(contender, tallies, "answers", plan.patience.run_s, path=str(path)) if tally.runs else None
        if told is not None:
            contender.entry = _described(contender.entry, told["notes"])
            contender.answers[cell.name] = accuracy.read(path)
            gpu_mb = None if told["gpu_bytes"] is None else told["gpu_bytes"] / _MB
            memory = {"peak_mb": told["peak_bytes"] / _MB, "gpu_mb": gpu_mb}
            contender.timings[cell.name] = replace(contender.timings[cell.name], **memory)
    other, stolen = watch.shares()
    return Shape(
        cell.name, cell.batch, cell.sequence, cell.new, count, tuple(orders), tuple(watch.spins), other, stolen
    )


def _asked(
    contender: Contender, tallies: Mapping[str, _Tally], do: str, timeout_s: float, **arguments: Any
) -> dict[str, Any] | None:
    """The answer, and then it is paused; None, and a note in its tally, where it failed."""
    if contender.process is None:
        return None
    try:
        told = contender.process.ask(do, timeout_s, **arguments)
        contender.process.pause()
    except ContenderError as error:
        tallies[contender.name].error = contender.lost(error)
        return None
    return told


class _Watch:
    """What else the machine did during the turns of a cell: its clock, other work on the same cores, energy."""

    def __init__(self, cores: Sequence[int]) -> None:
        self._cores = cores
        self._wall = self._other = self._stolen = 0.0
        self.spins: list[float] = []

    def begin(self) -> None:
        self.spins.append(machine.spin_ms())
        self._busy, self._energy, self._start = machine.busy_s(self._cores), machine.energy_j(), time.perf_counter()

    def end(self, own_s: float) -> float | None:
        """own_s: CPU time of the contender itself. Returns joules of the turn, where there is a meter."""
        wall, busy, energy = time.perf_counter() - self._start, machine.busy_s(self._cores), machine.energy_j()
        if busy is not None and self._busy is not None:
            self._wall += wall * len(self._cores)
            self._other += busy[0] - self._busy[0] - own_s
            self._stolen += busy[1] - self._busy[1]
        used = None if energy is None or self._energy is None else energy - self._energy
        return None if used is None or used < 0 else used  # the meter starts again at zero now and then

    def shares(self) -> tuple[float | None, float | None]:
        """Of the cores' time: what others had, and what a hypervisor took."""
        if not self._wall:
            return None, None
        return max(0.0, self._other / self._wall), max(0.0, self._stolen / self._wall)


# ---- against whom


def _reference(plan: Plan, found: Sequence[Contender]) -> Contender | None:
    """The one that was named, else the first that offers itself, else ours in float32, else the first that ran."""
    ran = [c for c in found if any(t.runs for t in c.timings.values())]
    if plan.reference:
        return next((c for c in ran if c.name == plan.reference), None)
    ranked = [c for c in ran if c.reference] or [c for c in ran if c.entry.ours and c.entry.precision == "float32"]
    return next(iter(ranked or ran), None)


def _judge(plan: Plan, found: Sequence[Contender], reference: Contender) -> None:
    """Every contender's answers against the reference's, and against the data's own labels where it has some."""
    for cell in plan.job.cells:
        path = Path(plan.job.inputs) / f"{cell.name}.gold.json"
        gold = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        for contender in found:
            answers = contender.answers.get(cell.name)
            if answers is not None and cell.name in reference.answers:
                judged = accuracy.judge(plan.job.task, answers, reference.answers[cell.name])
                if gold is not None and not judged.wrong.startswith("answers"):
                    judged = accuracy.with_gold(judged, answers, gold, cell.batch)
                contender.timings[cell.name] = replace(contender.timings[cell.name], accuracy=judged)
