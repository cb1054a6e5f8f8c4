"""The metrics of every task: what each one counts in the predictions of the reference and of the candidate.

A metric is one entry of METRICS, a function from Material to a paired sample. A name that ends in @k takes a whole
number ("recall@5"), one that ends in [label] a label's name ("recall[Disease]"). Intervals and verdicts are not known
here. The metrics of image and text towers are in pairs.py, those of language models in language.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from medcompile.metrics.calibration import METRICS as CALIBRATION
from medcompile.metrics.decisions import METRICS as DECISIONS
from medcompile.metrics.intervals import Floats
from medcompile.metrics.language import METRICS as LANGUAGE
from medcompile.metrics.material import (
    QUERIES_AT_ONCE,
    Ints,
    Material,
    Predictions,
    directions,
    label_of,
    matrix,
    no_item_with,
    partner_ranks,
    per_unit,
    renumbered,
    share,
)
from medcompile.metrics.pairs import METRICS as PAIRS
from medcompile.metrics.samples import LowestValue, PairedFlips, PairedTotals, Sample, UnitTotals

COSINE_RESOLUTION = 1e-6  # float32 rounding of a cosine over a few hundred dimensions


def _f1(gold: Floats, predicted: Floats, right: Floats) -> Floats:
    return share(2.0 * right, gold + predicted)


def _entity_metric(name: str, m: Material) -> Sample:
    """Entity F1, precision or recall, micro-averaged or of one type, seqeval's default mode."""
    scores: dict[str, Callable[[Floats, Floats], Floats]] = {
        "f1": lambda gold, model: _f1(gold[..., 0], model[..., 0], model[..., 1]),
        "precision": lambda gold, model: share(model[..., 1], model[..., 0]),
        "recall": lambda gold, model: share(model[..., 1], gold[..., 0]),
    }
    m.known(name)
    score, label = name.partition("[")[0], label_of(name)
    totals = m.entity_totals(label)
    events = float((totals.reference if score == "precision" else totals.common)[:, 0].sum())
    if label is None:
        differing = sum(not np.array_equal(r, c) for r, c in zip(m.reference.values, m.candidate.values, strict=True))
        largest = 1 / events if 0 < events < m.items else None  # entities are rarer than sentences
        return PairedTotals(totals, scores[score], m.items, events, differing, largest=largest)
    if not totals.common.any():
        raise no_item_with(name, label)
    # Most sentences hold no entity of one type: they say nothing of it, and would make a rare type look well tested.
    telling = (totals.common > 0).any(axis=1) if score == "recall" else (totals.rows > 0).any(axis=1)
    totals = UnitTotals(totals.common[telling], totals.reference[telling], totals.candidate[telling])
    return PairedTotals(totals, scores[score], int(events), events, totals.differing)


def _word_agreement(name: str, m: Material) -> Sample:
    """Share of words that carry the reference's label."""
    words = [len(np.asarray(v)) for v in m.reference.values]
    reference, candidate = (np.concatenate([np.asarray(v) for v in p.values]) for p in (m.reference, m.candidate))
    unit = renumbered(np.repeat(m.unit, words))
    return PairedFlips(np.ones(len(reference), dtype=bool), reference == candidate, unit, one_way=True)


def _agreement(name: str, m: Material) -> Sample:
    same = np.asarray(m.reference.values) == np.asarray(m.candidate.values)
    return PairedFlips(np.ones(m.items, dtype=bool), same, m.unit, one_way=True)


def _accuracy(name: str, m: Material) -> Sample:
    """Share of right answers, over all items or over those of one class."""
    gold, of = np.asarray(m.known(name)), m.of_classes(name)
    reference, candidate = (np.asarray(p.values) == gold for p in m.both)
    return PairedFlips(reference[of], candidate[of], renumbered(m.unit[of]))


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
        lambda common, model: share(model[..., 0], common[..., 0]),
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
    reference, candidate = (
        partner_ranks(matrix(p.values), passages) < k for p, passages in zip(m.both, m.passages(name), strict=True)
    )
    return PairedFlips(reference, candidate, m.unit)


def _nearest_neighbour_agreement(name: str, m: Material) -> Sample:
    """Share of texts whose nearest neighbour is the reference's: among passages, or without them the other texts."""

    def nearest(p: Predictions) -> Ints:
        queries = directions(matrix(p.values))
        among = queries if p.passages is None else directions(matrix(p.passages))
        best = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            similar = queries[start : start + QUERIES_AT_ONCE] @ among.T
            if p.passages is None:
                rows = np.arange(len(similar))
                similar[rows, start + rows] = -np.inf
            best.append(similar.argmax(axis=1))
        return np.concatenate(best)

    same = nearest(m.reference) == nearest(m.candidate)
    return PairedFlips(np.ones(m.items, dtype=bool), same, m.unit, one_way=True)


Metric = Callable[[str, Material], Sample]

_FLIPS: Mapping[str, Metric] = {name: DECISIONS[name] for name in ("flips", "harmful_flips")}
_OF_PAIRS: Mapping[str, Metric] = {
    **PAIRS,
    "cosine": _cosine,
    "cosine_worst": _cosine_worst,
    **DECISIONS,
    **CALIBRATION,
}

METRICS: Mapping[str, Mapping[str, Metric]] = {
    "token-classification": {
        "f1": _entity_metric,
        "precision": _entity_metric,
        "recall": _entity_metric,
        "agreement": _word_agreement,
        "f1[label]": _entity_metric,
        "precision[label]": _entity_metric,
        "recall[label]": _entity_metric,
        **DECISIONS,
        **CALIBRATION,
    },
    "sequence-classification": {
        "accuracy": _accuracy,
        "macro_f1": _macro_f1,
        "agreement": _agreement,
        "accuracy[label]": _accuracy,
        **DECISIONS,
        **CALIBRATION,
    },
    "fill-mask": {"top1_agreement": _agreement, "accuracy": _accuracy, **_FLIPS},
    "embed": {
        "cosine": _cosine,
        "recall@k": _recall_at,
        "nearest_neighbour_agreement": _nearest_neighbour_agreement,
        "cosine_worst": _cosine_worst,
    },
    "image": _OF_PAIRS,
    "text": _OF_PAIRS,
    "generate": {**LANGUAGE, **_FLIPS},
}
"""What a budget may name, by task; adding a metric is one entry here."""

_OF_DECISIONS = ("flips", "harmful_flips", "cost", "ece")
BY_GROUP: Mapping[str, tuple[str, ...]] = {
    "token-classification": ("f1", "precision", "recall", "agreement", *_OF_DECISIONS),
    "sequence-classification": ("accuracy", "macro_f1", "agreement", *_OF_DECISIONS),
    "image": ("accuracy", "auroc", "agreement", *_OF_DECISIONS),
    "text": ("accuracy", "auroc", "agreement", *_OF_DECISIONS),
    "generate": ("accuracy", "perplexity", *_FLIPS),
}
"""The metrics that a budget may name of the worst subgroup, by task: those that hold for a part of the items."""

ON_DEMAND = ("cost", "flips")
"""Metrics that are told only where a margin asks: cost means nothing without costs, and flips is 1 - agreement."""

RECALL_DEPTHS = (1, 5)
"""The k that recall@k is reported at where no margin names one."""

MOST_LABELS = 12
"""With more labels than these, a metric is reported of each only where a margin names it; with one, it says no more."""

ITEM = {"token-classification": "sentence", "embed": "text", "image": "image", "text": "image", "generate": "text"}
"""What one item is called on screen; "item" elsewhere."""
