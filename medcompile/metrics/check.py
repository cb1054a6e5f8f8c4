"""Whether the two models, the right answers and the units are about the same items: asked before any metric.

What a candidate gets wrong, NaN included, is no mistake of the data: metrics count it against the candidate.
"""

from __future__ import annotations

import numpy as np

from medcompile.errors import DataError
from medcompile.metrics.material import VECTORS, Material, matrix

_FIX = "run the reference and the artifact on the same evaluation items, in the same order"


def check_same_items(material: Material) -> None:
    """Raise DataError where the two models, the gold answers and the units are not about the same items."""
    task, reference, candidate = material.task, material.reference, material.candidate
    values = {"reference": len(reference.values), "candidate": len(candidate.values)}
    about = {"unit": material.items} | ({} if material.gold is None else {"gold": len(material.gold)})
    for counts in (values, about) if task == "text" else (values | about,):
        if len(set(counts.values())) > 1:
            raise DataError(f"{task}: item counts differ: {', '.join(f'{k} {v}' for k, v in counts.items())}", fix=_FIX)
    if not len(reference.values):
        raise DataError(f"{task}: there are no evaluation items", fix="name a set with items under evaluation.data")
    if task == "token-classification":
        _check_words(material)
    if task in VECTORS:
        _check_vectors(material)
    if task == "generate":
        _check_tokens(material)
    if task in ("image", "text", "generate"):
        _check_scores(material)
    if task in ("image", "text"):
        _check_ranks(material)


def _check_words(m: Material) -> None:
    reference, candidate, gold = m.reference.values, m.candidate.values, m.gold
    for others in (candidate, *([] if gold is None else [gold])):
        for i, (first, second) in enumerate(zip(reference, others, strict=True)):
            if len(np.asarray(first)) != len(np.asarray(second)):
                raise DataError(f"{m.task}: item {i} has another number of words than the reference", fix=_FIX)
    for p in m.both:
        if p.confidences is not None and [*map(len, p.confidences)] != [*map(len, reference)]:
            raise DataError(f"{m.task}: confidences are not one for each word", fix=_FIX)
    for name, sentences in (("reference", reference), ("candidate", candidate), ("gold", gold or [])):
        _check_ids(m, name, np.concatenate([np.zeros(0, np.int64), *(np.asarray(s, np.int64) for s in sentences)]))
    if not sum(len(np.asarray(s)) for s in reference):
        raise DataError(f"{m.task}: the evaluation items hold no words", fix="check the words field of the data")


def _check_tokens(m: Material) -> None:
    reference, candidate = m.both
    for i, (first, second) in enumerate(zip(reference.values, candidate.values, strict=True)):
        if len(first) != len(second) or not len(first):
            raise DataError(
                f"{m.task}: item {i} has {len(first)} tokens for one and {len(second)} for the other", fix=_FIX
            )
        if not np.isfinite(first).all():
            raise DataError(f"{m.task}: the reference's values hold NaN or Inf", fix="check the source weights")
    for name in ("top1", "positions", "kept_ids", "kept_logs"):
        one, other = getattr(reference, name), getattr(candidate, name)
        same = one is None if other is None else one is not None and one.shape == other.shape
        if same and one is not None and name in ("positions", "kept_ids"):
            same = np.array_equal(one, other)
        if not same:
            raise DataError(f"{m.task}: reference and candidate differ in {name}", fix=_FIX)


def _check_ids(m: Material, name: str, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < len(m.labels):
        raise DataError(
            f"{m.task}: {name} holds label id {ids.max() if ids.min() >= 0 else ids.min()}, outside the"
            f" {len(m.labels)} label names",
            fix="check that the model's labels and the labels of the evaluation data are the same list",
        )


def _check_vectors(m: Material) -> None:
    for name, one, other in (
        ("values", m.reference.values, m.candidate.values),
        ("passages", m.reference.passages, m.candidate.passages),
    ):
        if (one is None) != (other is None):
            raise DataError(f"{m.task}: only one of reference and candidate has {name}", fix=_FIX)
        if one is not None and other is not None:
            if matrix(one).ndim != 2 or matrix(one).shape != matrix(other).shape:
                raise DataError(f"{m.task}: {name} are not two matrices of one shape", fix=_FIX)
            if not np.isfinite(matrix(one)).all():
                raise DataError(f"{m.task}: the reference's {name} hold NaN or Inf", fix="check the source weights")
    if m.reference.passages is not None and len(m.reference.passages) < m.items:
        raise DataError(f"{m.task}: fewer passages than queries", fix="give every query its own passage")


def _check_scores(m: Material) -> None:
    reference, candidate = m.reference.scores, m.candidate.scores
    if (reference is None) != (candidate is None):
        raise DataError(f"{m.task}: only one of reference and candidate has scores", fix=_FIX)
    if reference is None or candidate is None:
        return
    shape = (m.items, len(m.labels))
    if reference.shape != shape or candidate.shape != shape:
        raise DataError(
            f"{m.task}: scores of shape {reference.shape} (reference) and {candidate.shape} (candidate), for"
            f" {m.items} images and {len(m.labels)} classes",
            fix=_FIX,
        )
    if not np.isfinite(reference).all():
        raise DataError(f"{m.task}: the reference's scores hold NaN or Inf", fix="check the source weights")
    if m.gold is not None:
        _check_ids(m, "gold", np.asarray(m.gold, dtype=np.int64))


def _check_ranks(m: Material) -> None:
    for name in ("image_to_text", "text_to_image"):
        reference, candidate = (getattr(p, name) for p in m.both)
        if (reference is None) != (candidate is None):
            raise DataError(f"{m.task}: only one of reference and candidate has {name}", fix=_FIX)
        for ranks in () if reference is None else (reference, candidate):
            whole = np.issubdtype(ranks.dtype, np.integer) and ranks.shape == (m.items,) and not (ranks < 0).any()
            if not whole:
                raise DataError(f"{m.task}: {name} is not one rank from 0 for each of {m.items} images", fix=_FIX)
