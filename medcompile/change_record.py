"""The change record: what was modified, how that was to be judged, and what it did, of a bundle that follows another.

Three parts, filled from diff.py and paired.py; change_markdown.py writes it for people. It says what was measured and
what was not, and never whether any rule is met.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medcompile import __version__, metrics
from medcompile.diff import Diff, budget
from medcompile.errors import UsageError
from medcompile.paired import Pair, Paired
from medcompile.spec import Evidence, Margin, Verdict

if TYPE_CHECKING:
    from medcompile.bundle import Bundle

SCHEMA_VERSION = 1
USE = (
    "A record of this form is usually filed with the change control of the software that the model is part of. It says"
    " what was measured and what was not. Whether that is enough, and for what, is for those to decide who answer for"
    " the device."
)
METHOD = (
    "Paired: both bundles answer the same items on one machine, and b's answers are tested against a's for"
    " non-inferiority, each metric with its margin at its confidence, stepped down by Holm's procedure where a graph"
    " has several (docs/evidence.md). Each pair of artifacts is judged by itself. *Met* means that a drop of the margin"
    " or more is ruled out, *not met* that one is shown, *not shown* that neither is. That b loses little against a"
    " does not say what both lost against the original; that is what each bundle recorded when it was built, below."
)

Outcome = Literal["met", "not met", "not shown", "not tested"]
Effect = Literal["worse", "better", "no change shown", "differs", "none"]

_OUTCOMES: dict[Verdict, Outcome] = {
    Verdict.NON_INFERIOR: "met",
    Verdict.INFERIOR: "not met",
    Verdict.INCONCLUSIVE: "not shown",
}
_DISTANCES = (
    "agreement",
    "top1_agreement",
    "nearest_neighbour_agreement",
    "cosine",
    "cosine_worst",
    "kl",
    "flips",
    "harmful_flips",
)
"""Metrics of how far b's answers are from a's: nothing can be gained by them, and what b heals is not counted."""
_ROUNDING = 1e-6
_GROUP = re.compile(r"\[[^\]]+:[^\]]+\]$")


@dataclass(frozen=True)
class Criteria:
    """What b was to be judged by. origin: where they come from. fixed_before: False where they were changed along with
    the bundle, None where that can't be told from here; told: the same in words. sha256, date: of a protocol file; the
    date is what the file says."""

    margins: tuple[Margin, ...]
    origin: str
    fixed_before: bool | None
    told: str
    sha256: str = ""
    date: str = ""


@dataclass(frozen=True)
class Judged:
    """One criterion on one pair. evidence: None where it was not tested; why then says why."""

    target: str
    graph: str
    a: str
    b: str
    metric: str
    outcome: Outcome
    evidence: Evidence | None
    why: str = ""


@dataclass(frozen=True)
class Impact:
    """What became of one metric on one pair."""

    target: str
    graph: str
    a: str
    b: str
    effect: Effect
    evidence: Evidence


@dataclass(frozen=True)
class Protocol:
    criteria: Criteria
    data: dict[str, Any]
    method: str
    outcomes: tuple[Judged, ...]


@dataclass(frozen=True)
class Assessment:
    """metrics: each that was tested, worse ones first. pairs: with flips and times. not_assessed: in words."""

    metrics: tuple[Impact, ...]
    pairs: tuple[Pair, ...]
    not_assessed: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """written: when, UTC."""

    schema_version: int
    kind: str
    written: str
    medcompile: str
    modifications: Diff
    protocol: Protocol
    impact: Assessment
    use: str


# ---- criteria


def from_budget(a: Bundle, b: Bundle) -> Criteria:
    """The budget of b's recipe, and whether a's was the same."""
    margins = budget(b)
    if {m.metric: m for m in margins} == {m.metric: m for m in budget(a)}:
        told = "They are the budget of both recipes: it was not changed along with the bundle."
        return Criteria(margins, "the budget of b's recipe", True, told)
    told = (
        "They were NOT fixed before this modification: the budget of b's recipe is not that of a's. To judge b"
        " by criteria that were there before, build it with a's budget, or name a protocol."
    )
    return Criteria(margins, "the budget of b's recipe", False, told)


def from_file(path: Path, b: Bundle) -> Criteria:
    """The criteria of a protocol file, YAML or JSON. Raises RecipeError with every problem, and UsageError where it
    names a metric that none of b's graphs has."""
    from pydantic import BaseModel, ConfigDict, Field

    from medcompile import recipe_yaml
    from medcompile.errors import RecipeError
    from medcompile.recipe import MarginKeys

    class Keys(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

        date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", examples=["2026-01-31"])
        title: str = Field(default="", examples=["Acceptance of a new precision"])
        criteria: dict[str, MarginKeys] = Field(min_length=1, examples=["{f1: {max_drop: 0.01}}"])

    document = recipe_yaml.read(path, str(path))
    keys = recipe_yaml.validate(Keys, document) if document.value is not None else None
    if keys is None or document.problems:
        raise RecipeError(document.in_order())
    for metric in keys.criteria:
        if not any(metrics.is_metric(graph, metric) for graph in b.graphs):
            known = sorted({name for graph in b.graphs for name in metrics.metric_names(graph)})
            raise UsageError(
                f"{path}: criteria: no metric {metric!r} for {', '.join(b.graphs)}",
                fix=f"choose from: {', '.join(known)}",
            )
    told = (
        "The file bears this date itself; that it was written before b was built can't be shown from here. Its digest"
        " can be held against a copy that was kept elsewhere."
    )
    margins = tuple(Margin(name, **m.model_dump(exclude_none=True)) for name, m in keys.criteria.items())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Criteria(margins, f"the protocol {keys.title or path.name}", None, told, digest, keys.date)


# ---- the record


def record(changed: Diff, paired: Paired, criteria: Criteria, b: Bundle) -> Record:
    outcomes = tuple(_judged(paired, criteria))
    return Record(
        schema_version=SCHEMA_VERSION,
        kind="change record",
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        medcompile=__version__,
        modifications=changed,
        protocol=Protocol(
            criteria=criteria,
            data=dict(b.provenance.get("evaluation") or {}),
            method=METHOD,
            outcomes=outcomes,
        ),
        impact=Assessment(
            metrics=impacts(paired),
            pairs=paired.pairs,
            not_assessed=tuple(dict.fromkeys(_not_assessed(changed, paired, outcomes))),
        ),
        use=USE,
    )


def _judged(paired: Paired, criteria: Criteria) -> Iterator[Judged]:
    for pair in paired.pairs:
        there = {e.metric: e for e in pair.evidence}
        for margin in criteria.margins:
            if not metrics.is_metric(pair.graph, margin.metric):
                continue
            place = (pair.target, pair.graph, pair.a, pair.b, margin.metric)
            found = there.get(margin.metric)
            if found is not None and found.verdict is not None:
                yield Judged(*place, _OUTCOMES[found.verdict], found, found.note)
            elif pair.unchanged:
                yield Judged(*place, "met", None, "nothing that could change an answer differs")
            else:
                yield Judged(*place, "not tested", None, pair.reason or "the data can't tell")


def impacts(paired: Paired) -> tuple[Impact, ...]:
    """Every metric that was tested, and which way it went."""
    found = [
        Impact(p.target, p.graph, p.a, p.b, effect(e), e) for p in paired.pairs if not p.unchanged for e in p.evidence
    ]
    order: tuple[Effect, ...] = ("worse", "differs", "no change shown", "better", "none")
    return tuple(sorted(found, key=lambda i: order.index(i.effect)))


def effect(e: Evidence) -> Effect:
    """By the two-sided interval of the difference; of a distance, whether there is one at all."""
    if e.metric.partition("[")[0] in _DISTANCES:
        return "differs" if abs(e.difference) > _ROUNDING else "none"
    if e.interval[1] < 0:
        return "worse"
    return "better" if e.interval[0] > 0 else "no change shown"


def _not_assessed(changed: Diff, paired: Paired, outcomes: Sequence[Judged]) -> Iterator[str]:
    if paired.reason:
        yield f"b against a on the same items: {paired.reason}"
    yield from changed.notes
    for pair in paired.pairs:
        what = f"{pair.graph} for {pair.target}, {pair.b} against {pair.a}"
        if not pair.unchanged and not pair.ran:
            yield f"{what}: {pair.reason}"
        elif pair.reason:
            yield f"{what}: the artifacts themselves, for their graphs stood in for them: {pair.reason}"
    for one in outcomes:
        if one.outcome == "not tested":
            yield f"{one.metric} of {one.graph} for {one.target}, {one.b} against {one.a}: {one.why}"
    names = [e.metric for pair in paired.pairs for e in pair.evidence]
    if names and not any(_GROUP.search(name) for name in names):
        yield "subgroups: the evaluation data name no groups"
    if names and not any(name.endswith("]") for name in names):
        yield "single labels: none was tested by itself"
    yield "any data but the evaluation data named above, and whether the original model is right on it"
    yield "any machine but the one that this was run on"
