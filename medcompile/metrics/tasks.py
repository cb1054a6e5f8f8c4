"""The metrics of every task: what each one counts in the predictions of the reference and of the candidate.

A metric is one entry of METRICS, a function from Material to a paired sample. A name that ends in @k takes a whole
number ("recall@5"). Intervals and verdicts are not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medcompile.errors import DataError
from medcompile.metrics.entities import EntityCounts, count_entities
from medcompile.metrics.intervals import Floats
from medcompile.metrics.samples import LowestValue, PairedFlips, PairedTotals, Sample, UnitTotals

Ints = NDArray[np.int64]

COSINE_RESOLUTION = 1e-6  # float32 rounding of a cosine over a few hundred dimensions
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class Predictions:
    """What one model said, item by item.

    values: token-classification: label ids of the words, int [words] per item; sequence-classification and fill-mask:
    one class or token id per item; embed: float32 [n, hidden].
    passages: embed on query/passage data: float32 [m, hidden], m >= n; passage i answers query i, the rest distract.
    """

    values: Sequence[NDArray[np.generic]] | NDArray[np.generic]
    passages: NDArray[np.floating] | None = None


class MissingMaterial(DataError):
    """The data lack what a metric needs (gold labels, passages)."""


@dataclass(frozen=True)
class Material:
    """Everything that a metric of one task may look at, on the same items. unit: int [items], from 0, no gaps."""

    reference: Predictions
    candidate: Predictions
    gold: Sequence[NDArray[np.generic]] | NDArray[np.generic] | None
    unit: Ints
    labels: Sequence[str]

    @property
    def items(self) -> int:
        return len(self.reference.values)

    def known(self, metric: str) -> Sequence[NDArray[np.generic]] | NDArray[np.generic]:
        """The gold answers. Raises MissingMaterial where there are none."""
        if self.gold is None:
            raise MissingMaterial(
                f"metric {metric} needs gold labels, and the evaluation data have none",
                fix=f"name a labelled set under evaluation.data, or budget agreement instead of {metric}",
            )
        return self.gold

    @cached_property
    def entities(self) -> tuple[EntityCounts, EntityCounts]:
        gold = [np.asarray(g, dtype=np.int64) for g in self.known("f1")]
        reference, candidate = (
            count_entities(gold, [np.asarray(v, dtype=np.int64) for v in p.values], self.unit, self.labels)
            for p in (self.reference, self.candidate)
        )
        return reference, candidate

    @cached_property
    def entity_totals(self) -> UnitTotals:
        """Per unit: gold entities | predicted and right ones of the reference | the same of the candidate."""
        reference, candidate = (
            np.stack([c.predicted.sum(axis=1), c.right.sum(axis=1)], axis=1).astype(np.float64) for c in self.entities
        )
        return UnitTotals(self.entities[0].gold.sum(axis=1, keepdims=True).astype(np.float64), reference, candidate)

    @cached_property
    def cosines(self) -> tuple[Floats, Ints]:
        """Cosine of the candidate's embedding to the reference's and the unit, for every text (passages too)."""
        pairs = [(self.reference.values, self.candidate.values)]
        unit = [self.unit]
        if self.reference.passages is not None and self.candidate.passages is not None:
            pairs.append((self.reference.passages, self.candidate.passages))
            distractors = len(self.reference.passages) - self.items
            unit.append(np.r_[self.unit, int(self.unit.max()) + 1 + np.arange(distractors)])
        return np.concatenate([cosine(_matrix(r), _matrix(c)) for r, c in pairs]), np.concatenate(unit)

    def passages(self, metric: str) -> tuple[Floats, Floats]:
        """Passage embeddings of the reference and the candidate. Raises MissingMaterial where there are none."""
        if self.reference.passages is None or self.candidate.passages is None:
            raise MissingMaterial(
                f"metric {metric} needs query/passage pairs, and the evaluation data have none",
                fix="name a set with query and passage fields under evaluation.data, or budget cosine instead",
            )
        return _matrix(self.reference.passages), _matrix(self.candidate.passages)


def _matrix(values: Sequence[NDArray[np.generic]] | NDArray[np.generic] | NDArray[np.floating]) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _directions(vectors: Floats) -> Floats:
    """Rows scaled to length 1; a row of zeros, or with NaN or Inf, becomes zeros and so resembles nothing."""
    clean = np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, 0.0)
    norms = np.linalg.norm(clean, axis=1, keepdims=True)
    unit: Floats = clean / np.where(norms > 0, norms, 1.0)
    return unit


def cosine(reference: Floats, candidate: Floats) -> Floats:
    """Row by row cosine, [n, hidden] each -> [n]."""
    cosines: Floats = (_directions(reference) * _directions(candidate)).sum(axis=1)
    return np.clip(cosines, -1.0, 1.0)


def _share(numerator: Floats, denominator: Floats) -> Floats:
    """numerator / denominator, 0 where nothing was counted (seqeval's and sklearn's zero division)."""
    share: Floats = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    return share


def per_unit(unit: Ints, rows: NDArray[np.bool_] | Floats) -> Floats:
    """Sums of the rows [n, statistics] of each unit -> [units, statistics]."""
    sums = np.zeros((int(unit.max()) + 1, rows.shape[1]))
    np.add.at(sums, unit, rows.astype(np.float64))
    return sums


def _f1(gold: Floats, predicted: Floats, right: Floats) -> Floats:
    return _share(2.0 * right, gold + predicted)


def _entity_metric(name: str, m: Material) -> Sample:
    """Entity F1, precision or recall, micro-averaged, seqeval's default mode."""
    scores: dict[str, Callable[[Floats, Floats], Floats]] = {
        "f1": lambda gold, model: _f1(gold[..., 0], model[..., 0], model[..., 1]),
        "precision": lambda gold, model: _share(model[..., 1], model[..., 0]),
        "recall": lambda gold, model: _share(model[..., 1], gold[..., 0]),
    }
    m.known(name)
    totals = m.entity_totals
    differing = sum(not np.array_equal(r, c) for r, c in zip(m.reference.values, m.candidate.values, strict=True))
    events = totals.reference[:, 0] if name == "precision" else totals.common[:, 0]
    return PairedTotals(totals, scores[name], m.items, float(events.sum()), differing)


def _word_agreement(name: str, m: Material) -> Sample:
    """Share of words that carry the reference's label."""
    words = [len(np.asarray(v)) for v in m.reference.values]
    reference, candidate = (np.concatenate([np.asarray(v) for v in p.values]) for p in (m.reference, m.candidate))
    unit = np.unique(np.repeat(m.unit, words), return_inverse=True)[1]
    return PairedFlips(np.ones(len(reference), dtype=bool), reference == candidate, unit, one_way=True)


def _agreement(name: str, m: Material) -> Sample:
    same = np.asarray(m.reference.values) == np.asarray(m.candidate.values)
    return PairedFlips(np.ones(m.items, dtype=bool), same, m.unit, one_way=True)


def _accuracy(name: str, m: Material) -> Sample:
    gold = np.asarray(m.known(name))
    return PairedFlips(np.asarray(m.reference.values) == gold, np.asarray(m.candidate.values) == gold, m.unit)


def _macro_f1(name: str, m: Material) -> Sample:
    """Mean F1 over the classes that occur in the gold labels; the set is fixed, so no model can change it."""
    gold = np.asarray(m.known(name))
    classes = np.unique(gold)
    reference, candidate = np.asarray(m.reference.values), np.asarray(m.candidate.values)
    is_gold = gold[:, None] == classes

    def model(values: NDArray[np.generic]) -> Floats:
        predicted = values[:, None] == classes
        return np.concatenate([per_unit(m.unit, predicted), per_unit(m.unit, predicted & is_gold)], axis=1)

    k = len(classes)
    totals = UnitTotals(per_unit(m.unit, is_gold), model(reference), model(candidate))
    return PairedTotals(
        totals,
        lambda common, counts: _f1(common, counts[..., :k], counts[..., k:]).mean(axis=-1),
        m.items,
        float(k * is_gold.sum(axis=0).max()),
        int((reference != candidate).sum()),
    )


def _cosine(name: str, m: Material) -> Sample:
    cosines, unit = m.cosines
    texts, sums = per_unit(unit, np.ones((len(unit), 1))), per_unit(unit, cosines[:, None])
    return PairedTotals(
        UnitTotals(texts, texts, sums),
        lambda common, model: _share(model[..., 0], common[..., 0]),
        len(cosines),
        resolution=COSINE_RESOLUTION,
    )


def _cosine_worst(name: str, m: Material) -> Sample:
    cosines, unit = m.cosines
    lowest = np.full(int(unit.max()) + 1, np.inf)
    np.minimum.at(lowest, unit, cosines)
    return LowestValue(lowest, len(cosines))


def _recall_at(name: str, m: Material) -> Sample:
    """Whether a query's own passage is among the k most similar of the set; ties count against the model."""
    k = int(name.partition("@")[2])

    def found(queries: Floats, passages: Floats) -> NDArray[np.bool_]:
        hits = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            similar = queries[start : start + _QUERIES_AT_ONCE] @ passages.T
            rows = np.arange(len(similar))
            own = similar[rows, start + rows][:, None]
            hits.append((similar >= own - 1e-12).sum(axis=1) <= k)
        return np.concatenate(hits)

    reference, candidate = (
        found(_directions(_matrix(p.values)), _directions(passages))
        for p, passages in zip((m.reference, m.candidate), m.passages(name), strict=True)
    )
    return PairedFlips(reference, candidate, m.unit)


def _nearest_neighbour_agreement(name: str, m: Material) -> Sample:
    """Share of texts whose nearest neighbour is the reference's: among passages, or without them the other texts."""

    def nearest(p: Predictions) -> Ints:
        queries = _directions(_matrix(p.values))
        among = queries if p.passages is None else _directions(_matrix(p.passages))
        best = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            similar = queries[start : start + _QUERIES_AT_ONCE] @ among.T
            if p.passages is None:
                rows = np.arange(len(similar))
                similar[rows, start + rows] = -np.inf
            best.append(similar.argmax(axis=1))
        return np.concatenate(best)

    same = nearest(m.reference) == nearest(m.candidate)
    return PairedFlips(np.ones(m.items, dtype=bool), same, m.unit, one_way=True)


Metric = Callable[[str, Material], Sample]

METRICS: Mapping[str, Mapping[str, Metric]] = {
    "token-classification": {
        "f1": _entity_metric,
        "precision": _entity_metric,
        "recall": _entity_metric,
        "agreement": _word_agreement,
    },
    "sequence-classification": {"accuracy": _accuracy, "macro_f1": _macro_f1, "agreement": _agreement},
    "fill-mask": {"top1_agreement": _agreement, "accuracy": _accuracy},
    "embed": {
        "cosine": _cosine,
        "recall@k": _recall_at,
        "nearest_neighbour_agreement": _nearest_neighbour_agreement,
    },
}
"""What a budget may name, by task; adding a metric is one entry here."""

REPORTED: Mapping[str, Mapping[str, Metric]] = {"embed": {"cosine_worst": _cosine_worst}}
"""What is written to the evidence but can't be budgeted."""

RECALL_DEPTHS = (1, 5)
"""The k that recall@k is reported at where no margin names one."""

ITEM = {"token-classification": "sentence", "embed": "text"}
"""What one item is called on screen; "item" elsewhere."""


def check_same_items(task: str, material: Material) -> None:
    """Raise DataError where the two models, the gold answers and the units are not about the same items."""
    reference, candidate, gold = material.reference, material.candidate, material.gold
    counts = {"reference": len(reference.values), "candidate": len(candidate.values), "unit": len(material.unit)}
    if gold is not None:
        counts["gold"] = len(gold)
    fix = "run the reference and the artifact on the same evaluation items, in the same order"
    if len(set(counts.values())) > 1:
        raise DataError(f"{task}: item counts differ: {', '.join(f'{k} {v}' for k, v in counts.items())}", fix=fix)
    if not material.items:
        raise DataError(f"{task}: there are no evaluation items", fix="name a set with items under evaluation.data")
    if task == "token-classification":
        for others in (candidate.values, *([] if gold is None else [gold])):
            for i, (first, second) in enumerate(zip(reference.values, others, strict=True)):
                if len(np.asarray(first)) != len(np.asarray(second)):
                    raise DataError(f"{task}: item {i} has another number of words than the reference", fix=fix)
        for name, sentences in (("reference", reference.values), ("candidate", candidate.values), ("gold", gold or [])):
            ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in sentences] or [np.zeros(0, dtype=np.int64)])
            if ids.size and not 0 <= ids.min() <= ids.max() < len(material.labels):
                raise DataError(
                    f"{task}: {name} holds label id {ids.max() if ids.min() >= 0 else ids.min()}, outside the"
                    f" {len(material.labels)} label names",
                    fix="check that the model's labels and the labels of the evaluation data are the same list",
                )
        if not sum(len(np.asarray(s)) for s in reference.values):
            raise DataError(f"{task}: the evaluation items hold no words", fix="check the words field of the data")
    if task == "embed":
        for name, one, other in (
            ("values", reference.values, candidate.values),
            ("passages", reference.passages, candidate.passages),
        ):
            if (one is None) != (other is None):
                raise DataError(f"{task}: only one of reference and candidate has {name}", fix=fix)
            if one is not None and other is not None:
                if _matrix(one).ndim != 2 or _matrix(one).shape != _matrix(other).shape:
                    raise DataError(f"{task}: {name} are not two matrices of one shape", fix=fix)
                if not np.isfinite(_matrix(one)).all():
                    raise DataError(f"{task}: the reference's {name} hold NaN or Inf", fix="check the source weights")
        if reference.passages is not None and len(reference.passages) < material.items:
            raise DataError(f"{task}: fewer passages than queries", fix="give every query its own passage")
