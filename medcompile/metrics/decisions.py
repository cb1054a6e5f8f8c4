"""What the two models decided, item by item: which decisions flipped, whom that harms, and what mistakes cost.

The metrics here are ones of which less is better; a margin says how much of it is tolerated. Accuracy and agreement,
which count the same decisions the other way round, are in tasks.py and pairs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medcompile.errors import UsageError
from medcompile.metrics.entities import found_entities
from medcompile.metrics.intervals import Floats
from medcompile.metrics.material import Ints, Material, per_unit, renumbered, share, without_entities
from medcompile.metrics.pairs import decided
from medcompile.metrics.samples import FlippedShare, PairedCost, Sample, UnitTotals

Bools = NDArray[np.bool_]
Kind = Literal["harmful", "healed", "other"]

COSTS_OF_ENTITIES = ("missed", "false_alarm")
_SCORED = ("image", "text", "generate")
_TOKENS = "token-classification"


def decisions(metric: str, m: Material) -> tuple[Ints, Ints]:
    """The class (or token) that each model chose for each item, [items]; of token-classification for each word."""
    if m.task in _SCORED:
        reference, candidate = (decided(scores) for scores in m.scores(metric))
        return reference, candidate
    joined = (np.concatenate([np.asarray(v) for v in p.values]) for p in m.both)
    reference, candidate = joined if m.task == _TOKENS else (np.asarray(p.values) for p in m.both)
    return reference, candidate


def words_of(m: Material) -> Ints:
    """The item of each word, [words]."""
    return np.repeat(np.arange(m.items), [len(np.asarray(v)) for v in m.reference.values])


def _found(metric: str, m: Material) -> tuple[Ints, Bools, Bools]:
    """The sentence of each entity in the gold labels, and whether the reference and the candidate find it."""
    gold = [np.asarray(g, np.int64) for g in m.known(metric)]
    (sentence, before), (_, after) = (
        found_entities(gold, [np.asarray(v, np.int64) for v in p.values], m.labels) for p in m.both
    )
    return sentence, before, after


def _flips(name: str, m: Material) -> Sample:
    """Share of decisions that differ from the reference's, right or wrong. Of token-classification: of words, so that
    it is 1 - agreement."""
    reference, candidate = decisions(name, m)
    unit = renumbered(m.unit[words_of(m)]) if m.task == _TOKENS else m.unit
    return FlippedShare(np.ones(len(reference), dtype=bool), reference == candidate, unit)


def _harmful_flips(name: str, m: Material) -> Sample:
    """Share of items that the reference decides rightly and the candidate wrongly; what it heals does not offset them.

    Of token-classification: of the entities in the gold labels, those that the reference finds and the candidate does
    not; words outside of entities, which are most, would hide them.
    """
    if m.task == _TOKENS:
        sentence, before, after = _found(name, m)
        if not len(sentence):
            raise without_entities(name)
        return FlippedShare(np.ones(len(sentence), dtype=bool), ~before | after, renumbered(m.unit[sentence]))
    gold = np.asarray(m.known(name))
    reference, candidate = (d == gold for d in decisions(name, m))
    return FlippedShare(np.ones(m.items, dtype=bool), ~reference | candidate, m.unit)


def flips(m: Material) -> list[tuple[int, Kind]] | None:
    """The items of which a decision flipped, and how: harmful (the reference was right, the candidate is wrong), healed
    (the other way round), other (both are wrong, or nobody knows).

    Of token-classification, by sentence: harmful where the candidate misses an entity that the reference found, else
    healed where it finds one that the reference missed, else other. None where nothing is decided.
    """
    scored = m.reference.scores is not None and m.candidate.scores is not None
    if not scored and m.task not in (_TOKENS, "sequence-classification", "fill-mask"):
        return None
    reference, candidate = decisions("flips", m)
    flipped, lost, gained = reference != candidate, np.zeros(m.items, bool), np.zeros(m.items, bool)
    if m.task == _TOKENS:
        flipped = np.bincount(words_of(m), weights=flipped, minlength=m.items) > 0
        if m.gold is not None:
            sentence, before, after = _found("flips", m)
            lost[sentence[before & ~after]] = True
            gained[sentence[after & ~before]] = True
    elif m.gold is not None:
        lost, gained = flipped & (reference == m.gold), flipped & (candidate == m.gold)
    kinds: dict[bool, Kind] = {True: "healed", False: "other"}
    return [(int(i), "harmful" if lost[i] else kinds[bool(gained[i])]) for i in np.flatnonzero(flipped)]


# ---- what mistakes cost


def check_costs(task: str, costs: Mapping[str, Mapping[str, float] | float], labels: Sequence[str]) -> None:
    """Raise UsageError for costs that the task can't have, or of labels that the model lacks."""
    if task == _TOKENS:
        for name, cost in costs.items():
            if name not in COSTS_OF_ENTITIES or isinstance(cost, Mapping):
                raise UsageError(
                    f"costs of {task}: {name!r} is not one of {', '.join(COSTS_OF_ENTITIES)}",
                    fix="write for example costs: {missed: 10, false_alarm: 1}",
                )
        return
    for gold, row in costs.items():
        if not isinstance(row, Mapping):
            raise UsageError(
                f"costs: {gold} has the cost {row:g}, but of a right answer's mistakes each has its own",
                fix="write costs by the right answer and then the wrong one: {disease: {healthy: 10}}",
            )
        for label in (gold, *row):
            if label not in labels:
                raise UsageError(
                    f"costs: there is no label {label!r}", fix=f"the labels are {', '.join(labels) or 'none'}"
                )
        if row.get(gold):
            raise UsageError(f"costs: a right answer, {gold} for {gold}, costs nothing", fix="remove it")


def _cost(name: str, m: Material) -> Sample:
    """Mean cost of the mistakes: per item, by the right answer and the wrong one, 1 where costs names none.

    Of token-classification: per entity in the gold labels, `missed` for each that is not found exactly and
    `false_alarm` for each that is found and not there; one found in the wrong place is both.
    """
    return _entity_cost(name, m) if m.task == _TOKENS else _class_cost(name, m)


def _entity_cost(name: str, m: Material) -> Sample:
    missed, false_alarm = (float(m.costs.get(kind, 1.0)) for kind in COSTS_OF_ENTITIES)  # type: ignore[arg-type]
    totals = m.entity_totals(None)
    gold = float(totals.common.sum())
    if not gold:
        raise without_entities(name)
    dearest, differing = max(missed, false_alarm), [missed, false_alarm]
    changed = sum(not np.array_equal(r, c) for r, c in zip(m.reference.values, m.candidate.values, strict=True))
    return PairedCost(
        totals,
        lambda common, model: share(
            missed * (common[..., 0] - model[..., 1]) + false_alarm * (model[..., 0] - model[..., 1]), common[..., 0]
        ),
        m.items,
        gold / _cheapest(differing),
        changed,
        largest=dearest / min(gold, m.items),
        scale=dearest * len(words_of(m)) / gold,
    )


def _class_cost(name: str, m: Material) -> Sample:
    gold, classes = np.asarray(m.known(name), np.int64), len(m.labels)
    table = 1.0 - np.eye(classes, classes + 1)  # the last column is of a decision that is none, NaN or Inf
    for label, row in m.costs.items():
        assert isinstance(row, Mapping)
        for wrong, cost in row.items():
            table[m.labels.index(label), m.labels.index(wrong)] = cost
    table[:, -1] = table.max(axis=1)
    reference, candidate = decisions(name, m)

    def sums(chosen: Ints) -> Floats:
        return per_unit(m.unit, table[gold, chosen][:, None])

    dearest = float(table.max())
    return PairedCost(
        UnitTotals(per_unit(m.unit, np.ones((m.items, 1))), sums(reference), sums(candidate)),
        lambda common, model: share(model[..., 0], common[..., 0]),
        m.items,
        m.items / _cheapest(np.unique(table[gold]).tolist()),
        int((reference != candidate).sum()),
        largest=dearest / m.items,
        scale=dearest,
    )


def _cheapest(costs: Sequence[float]) -> float:
    """The smallest cost that is one: less than that, no event can change the sum by."""
    return min((cost for cost in costs if cost > 0), default=1.0)


METRICS: Mapping[str, Callable[[str, Material], Sample]] = {
    "flips": _flips,
    "harmful_flips": _harmful_flips,
    "cost": _cost,
}
