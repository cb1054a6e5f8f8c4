"""What metrics look at: the predictions of both models on the same items, the right answers, the units.

Counts and cosines that several metrics share are made here, once. What a metric makes of them is in tasks.py and
pairs.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medcompile.errors import DataError
from medcompile.metrics.entities import EntityCounts, count_entities, entity_types
from medcompile.metrics.intervals import Floats
from medcompile.metrics.samples import UnitTotals

Ints = NDArray[np.int64]

VECTORS = ("embed", "image", "text")
"""Tasks whose values are vectors."""
QUERIES_AT_ONCE = 1024
_LABEL = re.compile(r"\[(?!worst:)(.+)\]$")


@dataclass(frozen=True)
class Predictions:
    """What one model said, item by item.

    values: token-classification: label ids of the words, int [words] per item; sequence-classification and fill-mask:
    one class or token id per item; embed: float32 [n, hidden]; image: embeddings of the images, float32 [images, dim];
    text: embeddings of the texts asked, float32 [texts, dim]; generate: log-likelihoods of each text's tokens, natural,
    float32 [tokens] per item.
    passages: embed on query/passage data: float32 [m, hidden], m >= n; passage i answers query i, the rest distract.
    confidences: token-classification and sequence-classification: the probability of each value, shaped like values;
    None where nobody kept it.
    scores: image and text: zero-shot probabilities, float [images, classes]; generate: how likely each answer to choose
    from is, a mean log-likelihood, [items, answers].
    image_to_text, text_to_image: image and text: the rank of each image's own text among all texts, and of each text's
    own image among all images, int64 [images], from 0, as partner_ranks gives them.
    top1: generate: the likeliest token at each place of values laid end to end, int32, -1 where there is none.
    positions: generate: places among those, int64 [n], rising. kept_ids: the reference's likeliest tokens there, and
    some drawn from its others (language.py), int32 [n, k]. kept_logs: their log-likelihoods by the model asked.
    """

    values: Sequence[NDArray[np.generic]] | NDArray[np.generic]
    passages: NDArray[np.floating] | None = None
    scores: NDArray[np.floating] | None = None
    image_to_text: Ints | None = None
    text_to_image: Ints | None = None
    top1: NDArray[np.integer] | None = None
    positions: Ints | None = None
    kept_ids: NDArray[np.integer] | None = None
    kept_logs: NDArray[np.floating] | None = None
    confidences: Sequence[NDArray[np.floating]] | NDArray[np.floating] | None = None


class MissingMaterial(DataError):
    """The data lack what a metric needs (gold labels, passages)."""


@dataclass(frozen=True)
class Material:
    """Everything that a metric of one task may look at, on the same items. unit: int [items], from 0, no gaps.

    The items of image and text are images; the texts that the task text embeds are other ones, and each stands alone.
    groups: by column, the group of every item. costs: Margin.costs.
    """

    task: str
    reference: Predictions
    candidate: Predictions
    gold: Sequence[NDArray[np.generic]] | NDArray[np.generic] | None
    unit: Ints
    labels: Sequence[str]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    costs: Mapping[str, Mapping[str, float] | float] = field(default_factory=dict)

    @property
    def items(self) -> int:
        return len(self.unit)

    def known(self, metric: str) -> Sequence[NDArray[np.generic]] | NDArray[np.generic]:
        """The gold answers. Raises MissingMaterial where there are none."""
        if self.gold is None:
            raise MissingMaterial(
                f"metric {metric} needs gold labels, and the evaluation data have none",
                fix=f"name a labelled set under evaluation.data, or budget agreement instead of {metric}",
            )
        return self.gold

    def of_classes(self, metric: str) -> NDArray[np.bool_]:
        """Which items a metric is about: those of the class in its brackets, else all. Raises MissingMaterial."""
        label = label_of(metric)
        gold = np.asarray(self.known(metric))
        of = np.ones(len(gold), dtype=bool) if label is None else gold == self.labels.index(label)
        if not of.any() and label is not None:
            raise no_item_with(metric, label)
        return of

    def scores(self, metric: str) -> tuple[Floats, Floats]:
        """Zero-shot probabilities of the reference and the candidate. Raises MissingMaterial where there are none."""
        if self.reference.scores is None or self.candidate.scores is None:
            raise MissingMaterial(
                f"metric {metric} needs zero-shot scores, and the evaluation data have no labels to ask for",
                fix="name a labelled set of images under evaluation.data, or budget cosine instead",
            )
        return matrix(self.reference.scores), matrix(self.candidate.scores)

    def confidences(self, metric: str) -> tuple[Floats, Floats]:
        """The probability of what the reference and the candidate chose: of each word, or of each item.

        Raises MissingMaterial where one of them was not asked for it.
        """
        if self.task in VECTORS:
            reference, candidate = (s.max(axis=1) for s in self.scores(metric))
            return reference, candidate
        if self.reference.confidences is None or self.candidate.confidences is None:
            raise MissingMaterial(
                f"metric {metric} needs the reference's confidences, and none were kept",
                fix="build the bundle again with this version of medcompile",
            )
        words = self.task == "token-classification"
        reference, candidate = (
            np.concatenate([*map(matrix, c)]) if words else matrix(c)
            for c in (self.reference.confidences, self.candidate.confidences)
        )
        return reference, candidate

    def ranks(self, metric: str) -> tuple[Ints, Ints]:
        """Partners' ranks in the metric's direction. Raises MissingMaterial where the images have no texts."""
        to_text = metric.startswith("image_to_text")
        reference, candidate = (p.image_to_text if to_text else p.text_to_image for p in self.both)
        if reference is None or candidate is None:
            raise MissingMaterial(
                f"metric {metric} needs images with texts, and the evaluation data have none",
                fix="name a set of images with captions under evaluation.data, or budget cosine instead",
            )
        return reference, candidate

    @property
    def both(self) -> tuple[Predictions, Predictions]:
        return self.reference, self.candidate

    @cached_property
    def broken(self) -> int:
        """Rows of the candidate's answers that hold NaN or Inf."""
        if self.task == "generate":
            return sum(not np.isfinite(v).all() for v in self.candidate.values)
        answers = [np.asarray(self.candidate.values)] if self.task in VECTORS else []
        answers += [a for a in (self.candidate.passages, self.candidate.scores) if a is not None]
        return int(sum((~np.isfinite(a).all(axis=1)).sum() for a in answers))

    @cached_property
    def entities(self) -> tuple[EntityCounts, EntityCounts]:
        gold = [np.asarray(g, dtype=np.int64) for g in self.known("f1")]
        reference, candidate = (
            count_entities(gold, [np.asarray(v, dtype=np.int64) for v in p.values], self.unit, self.labels)
            for p in self.both
        )
        return reference, candidate

    def entity_totals(self, label: str | None) -> UnitTotals:
        """Per unit: gold entities | predicted and right ones of the reference | the same of the candidate.

        label: a type of entity; None for all.
        """
        names = entity_types(self.labels)[2]
        types = list(range(len(names))) if label is None else [names.index(label)]

        def summed(counts: Ints) -> Floats:
            total: Floats = counts[:, types].sum(axis=1).astype(np.float64)
            return total

        reference, candidate = (np.stack([summed(c.predicted), summed(c.right)], axis=1) for c in self.entities)
        return UnitTotals(summed(self.entities[0].gold)[:, None], reference, candidate)

    @cached_property
    def cosines(self) -> tuple[Floats, Ints]:
        """Cosine of the candidate's embedding to the reference's and the unit, for every text (passages too)."""
        pairs = [(self.reference.values, self.candidate.values)]
        unit = [np.arange(len(self.reference.values)) if self.task == "text" else self.unit]
        if self.reference.passages is not None and self.candidate.passages is not None:
            pairs.append((self.reference.passages, self.candidate.passages))
            distractors = len(self.reference.passages) - self.items
            unit.append(np.r_[self.unit, int(self.unit.max()) + 1 + np.arange(distractors)])
        return np.concatenate([cosine(matrix(r), matrix(c)) for r, c in pairs]), np.concatenate(unit)

    def passages(self, metric: str) -> tuple[Floats, Floats]:
        """Passage embeddings of the reference and the candidate. Raises MissingMaterial where there are none."""
        if self.reference.passages is None or self.candidate.passages is None:
            raise MissingMaterial(
                f"metric {metric} needs query/passage pairs, and the evaluation data have none",
                fix="name a set with query and passage fields under evaluation.data, or budget cosine instead",
            )
        return matrix(self.reference.passages), matrix(self.candidate.passages)


def without_entities(metric: str) -> MissingMaterial:
    """The error of evaluation data that hold no entity at all."""
    return MissingMaterial(
        f"metric {metric}: the evaluation data hold no entity",
        fix="name a set that holds some under evaluation.data, and check the manifest's keep",
    )


def no_item_with(metric: str, label: str) -> MissingMaterial:
    """The error of a label that the evaluation data lack."""
    return MissingMaterial(
        f"metric {metric}: no evaluation item has the label {label!r}",
        fix=f"name a set that holds some under evaluation.data, or take {metric} out of the budget",
    )


def label_of(metric: str) -> str | None:
    """The label that a metric's name holds in brackets: "Disease" of "recall[Disease]". "[worst:site]" holds none."""
    found = _LABEL.search(metric)
    return found[1] if found else None


def label_names(task: str, labels: Sequence[str]) -> tuple[str, ...]:
    """What may stand in a metric's brackets: the types of the entities, or the classes."""
    return entity_types(labels)[2] if task == "token-classification" else tuple(labels)


def matrix(values: Sequence[NDArray[np.generic]] | NDArray[np.generic] | NDArray[np.floating]) -> Floats:
    return np.asarray(values, dtype=np.float64)


def directions(vectors: Floats) -> Floats:
    """Rows scaled to length 1; a row of zeros, or with NaN or Inf, becomes zeros and so resembles nothing."""
    clean = np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, 0.0)
    norms = np.linalg.norm(clean, axis=1, keepdims=True)
    unit: Floats = clean / np.where(norms > 0, norms, 1.0)
    return unit


def cosine(reference: Floats, candidate: Floats) -> Floats:
    """Row by row cosine, [n, hidden] each -> [n]."""
    cosines: Floats = (directions(reference) * directions(candidate)).sum(axis=1)
    return np.clip(cosines, -1.0, 1.0)


def partner_ranks(queries: Floats, others: Floats) -> Ints:
    """How many others come before each query's own, by cosine: row i's own is row i. [n, dim], [m, dim] -> [n], m >= n.

    Ties count against the model. A vector that is zero, or holds NaN or Inf, finds nothing and is not found.
    """
    queries, others = directions(matrix(queries)), directions(matrix(others))
    ranks = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        similar = queries[start : start + QUERIES_AT_ONCE] @ others.T
        similar[:, ~others.any(axis=1)] = -np.inf
        rows = np.arange(len(similar))
        own = similar[rows, start + rows][:, None]
        ranks.append((similar >= own - 1e-12).sum(axis=1) - 1)
    found = np.concatenate(ranks) if ranks else np.zeros(0, dtype=np.int64)
    ranked: Ints = np.where(queries.any(axis=1), found, len(others))
    return ranked


def renumbered(unit: Ints) -> Ints:
    """The units of a part of the items, numbered from 0 without gaps."""
    numbers: Ints = np.unique(unit, return_inverse=True)[1]
    return numbers


def share(numerator: Floats, denominator: Floats) -> Floats:
    """numerator / denominator, 0 where nothing was counted (seqeval's and sklearn's zero division)."""
    ratio: Floats = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    return ratio


def per_unit(unit: Ints, rows: NDArray[np.bool_] | Floats) -> Floats:
    """Sums of the rows [n, statistics] of each unit -> [units, statistics]."""
    sums = np.zeros((int(unit.max()) + 1, rows.shape[1]))
    np.add.at(sums, unit, rows.astype(np.float64))
    return sums
