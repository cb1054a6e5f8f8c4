"""Paired: two bundles run on the same items, b judged against a: what their own records can't tell.

The answers of a's artifact are the reference, b's are the candidate, and what each item is asked, how it is judged and
what stands in where an artifact can't run here is as in verify.py. Both are timed in turns, so that what else the
machine does meets both.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medcompile import backends, exams, metrics, verify
from medcompile.bundle import Bundle
from medcompile.data import Dataset
from medcompile.diff import files_under, same_items
from medcompile.errors import BackendError, DataError, InputError, ProfileError
from medcompile.exams import Exam
from medcompile.spec import GRAPH_VERIFIED, Artifact, Axis, Evidence, GraphSpec, Margin, Profile, Verdict

ROUNDS = 25
"""Turns that both are timed for, unless that takes longer than SECONDS; FEWEST at least."""
SECONDS = 8.0
FEWEST = 5
_UNLABELLED = ("embed", "fill-mask")  # what the model's other heads call their classes is nothing to them


@dataclass(frozen=True)
class Timing:
    """Medians of so many rounds in turns, at one shape (axis name -> size), on one machine.

    ratio: of b's median to a's; below 1 b is faster. spread: the quartiles of b's time over a's, round by round.
    """

    shape: dict[str, int]
    machine: str
    rounds: int
    a_ms: float
    b_ms: float
    ratio: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Pair:
    """An artifact of a and one of b, of one target and graph, and what running both came to.

    unchanged: built from the same graphs and assets by the same library, so nothing was run. reason: why the test could
    not be made, or, where it was, why their graphs stood in for the artifacts. ran: what was run, as in
    Artifact.verified_on; empty if nothing was. flips: how many items' decisions changed, by kind (as
    metrics/decisions.py has them); None of a task without decisions. timing: None where the artifacts did not run.
    """

    target: str
    graph: str
    a: str
    b: str
    unchanged: bool = False
    reason: str = ""
    ran: str = ""
    items: int = 0
    evidence: tuple[Evidence, ...] = ()
    flips: dict[str, int] | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class Paired:
    """reason: why no pair could be tested at all; empty where pairs tell for themselves."""

    reason: str = ""
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = field(default=())


def pairs(a: Bundle, b: Bundle) -> Iterator[Pair]:
    """What can be set against each other: by target and graph, variants of one name, and, where they differ in name,
    those that load() would take."""
    for target in dict.fromkeys(x.target.name for x in a.artifacts):
        ours, theirs = _variants(a, target), _variants(b, target)
        names = [(v, v) for v in ours if v in theirs]
        best = (_best(a, ours), _best(b, theirs))
        if None not in best and best[0] != best[1]:
            names.append(best)  # type: ignore[arg-type]
        for one, other in names:
            shared = {x.graph for x in ours[one]} & {x.graph for x in theirs[other]}
            yield from (Pair(target, graph, one, other) for graph in a.graphs if graph in shared)


def _variants(found: Bundle, target: str) -> dict[str, list[Artifact]]:
    there: dict[str, list[Artifact]] = {}
    for artifact in found.artifacts:
        if artifact.target.name == target:
            there.setdefault(artifact.variant, []).append(artifact)
    return there


def _best(found: Bundle, variants: Mapping[str, Sequence[Artifact]]) -> str | None:
    """The fastest variant as recorded of which every graph is non-inferior; None where none is, or was timed."""
    good = [
        (sum(x.latency_ms for x in artifacts if x.latency_ms is not None), name)
        for name, artifacts in variants.items()
        if len(artifacts) == len(found.graphs)
        and all(x.verdict is Verdict.NON_INFERIOR and x.latency_ms is not None for x in artifacts)
    ]
    return min(good)[1] if good else None


def unchanged(a: Bundle, b: Bundle, pair: Pair) -> bool:
    """True if both were built from the same bytes by the same library for the same machine, by one variant."""
    if pair.a != pair.b or a.variants[pair.a] != b.variants[pair.b] or a.graphs != b.graphs:
        return False
    folders = (f"graphs/{pair.a}", "assets")
    targets = [{x.target for x in found.artifacts if _of(x, pair.target, pair.a)} for found in (a, b)]
    return targets[0] == targets[1] and all(files_under(a, folder) == files_under(b, folder) for folder in folders)


def _of(artifact: Artifact, target: str, variant: str) -> bool:
    return (artifact.target.name, artifact.variant) == (target, variant)


def run(
    a: Bundle,
    b: Bundle,
    dataset: Dataset | None,
    margins: Sequence[Margin],
    threads: int | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Paired:
    """Every pair, tested with margins and timed. told: hears of each before it.

    dataset: what both were judged on; None will do where every pair is unchanged. Raises UsageError where margins name
    a label that the model or the data lack.
    """
    made = []
    for pair in pairs(a, b):
        if unchanged(a, b, pair):
            made.append(replace(pair, unchanged=True))
            continue
        assert dataset is not None
        told(f"{pair.graph} for {pair.target}: {pair.b} of b against {pair.a} of a")
        made.append(_run(a, b, pair, dataset, margins, threads))
    return Paired(pairs=tuple(made))


def why_not(a: Bundle, b: Bundle) -> str:
    """Why no test of b against a can be made, whatever the machine; empty if one can."""
    if not same_items(a, b):
        return "they were judged on different evaluation data, and a paired test is made on the same items"
    if not any(True for _ in pairs(a, b)):
        return "they share no target with a graph that both have"
    return ""


def _run(a: Bundle, b: Bundle, pair: Pair, dataset: Dataset, margins: Sequence[Margin], threads: int | None) -> Pair:
    try:
        before, after = (exams.of(pair.graph, verify.setting(found, dataset)) for found in (a, b))
        if differs := _other_questions(before, after):
            return replace(pair, reason=differs)
        with ExitStack() as opened:
            sides = _Side(a, pair.a, pair.target, before), _Side(b, pair.b, pair.target, after)
            reason = ""
            try:
                first, second = (side.artifacts(opened, threads) for side in sides)
                machine = backends.get(sides[0].backend).probe(pair.target)
                ran = machine.verified_on
            except BackendError as error:
                reason, ran = error.message, GRAPH_VERIFIED
                opened.close()
                first, second = (side.typed(opened) for side in sides)
            reference = before.answers(first)
            candidate = after.against(reference).answers(second)
            evidence = exams.judge(after, margins, reference, candidate)
            key = after.key
            flipped = metrics.flips(pair.graph, reference, candidate, key.gold, key.labels)
            kinds = None if flipped is None else dict(Counter[str](kind for _, kind in flipped))
            timing = None if reason else _timed(first[pair.graph], second[pair.graph], before.spec, after.spec, ran)
    except (BackendError, DataError, InputError, ProfileError) as error:
        return replace(pair, reason=error.message)
    return replace(
        pair,
        reason=reason,
        ran=ran,
        items=len(after.key.units),
        evidence=evidence,
        flips=kinds,
        timing=timing,
    )


def _other_questions(a: Exam, b: Exam) -> str:
    """Why the answers to two exams can't be held against each other; empty if they can."""
    if a.key.labels != b.key.labels and a.spec.name not in _UNLABELLED:
        return f"their labels differ: {', '.join(a.key.labels) or 'none'}; and {', '.join(b.key.labels) or 'none'}"
    if a.digests() != b.digests():
        return "the items that they can be asked differ"
    if (a.key.gold is None) != (b.key.gold is None) or not _same(a.key.gold, b.key.gold):
        return "the same items mean other questions to them, as after a change of tokenizer"
    return ""


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class _Side:
    """One bundle's half of a pair: what answers its exam."""

    bundle: Bundle
    variant: str
    target: str
    exam: Exam

    @property
    def _built(self) -> dict[str, Artifact]:
        return {x.graph: x for x in self.bundle.artifacts if _of(x, self.target, self.variant)}

    @property
    def backend(self) -> str:
        return next(iter(self._built.values())).target.backend

    def artifacts(self, opened: ExitStack, threads: int | None) -> dict[str, backends.Executor]:
        """Executors of the artifacts. Raises BackendError where this machine can't run one."""
        variant = self.bundle.variants[self.variant]
        backend = backends.get(self.backend)
        backend.probe(self.target)
        return {
            name: opened.enter_context(
                verify.loaded(
                    backend,
                    self.bundle.root / self._built[name].path,
                    spec,
                    variant.on(name),
                    self._built[name].target,
                    threads,
                )
            )
            for name, spec in self.exam.graphs.items()
        }

    def typed(self, opened: ExitStack) -> dict[str, backends.Executor]:
        """Executors of the graphs that the artifacts were built from. Raises BackendError."""
        folder = self.bundle.root / "graphs" / self.variant
        return {
            name: opened.enter_context(verify.on_cpu(folder / f"{name}.onnx", spec))
            for name, spec in self.exam.graphs.items()
        }


# ---- time


def _timed(
    a: backends.Executor, b: backends.Executor, spec_a: GraphSpec, spec_b: GraphSpec, machine: str
) -> Timing | None:
    """None where their profiles share no shape."""
    profile = common(spec_a.profiles[0], spec_b.profiles[0])
    if profile is None:
        return None
    runs = verify.one_run(a, spec_a, profile), verify.one_run(b, spec_b, profile)
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    while len(times[0]) < ROUNDS and (len(times[0]) < FEWEST or time.perf_counter() - started < SECONDS):
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for side in order:
            runs[side]()  # uncounted: the other's threads may still spin, and the caches are full of its weights
            start = time.perf_counter()
            runs[side]()
            times[side].append((time.perf_counter() - start) * 1000)
    ratios = [after / before for before, after in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = [statistics.median(side) for side in times]
    return Timing(
        shape={x.name: x.opt for x in profile.axes if not backends.is_paged(spec_b) or x.name == "sequences"},
        machine=machine,
        rounds=len(ratios),
        a_ms=round(medians[0], 3),
        b_ms=round(medians[1], 3),
        ratio=round(medians[1] / medians[0], 4),
        spread=(round(low, 4), round(high, 4)),
    )


def common(a: Profile, b: Profile) -> Profile | None:
    """b's profile at a shape that a takes as well, as near b's opt as can be; None where there is none."""
    known = {axis.name: axis for axis in a.axes}
    if set(known) != {axis.name for axis in b.axes}:
        return None
    axes = []
    for axis in b.axes:
        low, high = max(axis.min, known[axis.name].min), min(axis.max, known[axis.name].max)
        if low > high:
            return None
        axes.append(Axis(axis.name, low, min(max(axis.opt, low), high), high))
    return Profile(b.name, tuple(axes))
