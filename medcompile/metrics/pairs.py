"""The metrics of image and text towers: zero-shot classes and retrieval, over the same images.

METRICS joins the ones of tasks.py, whose cosines hold for any embedding. Scores and ranks come ready made: which
prompts and captions were asked is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from medcompile.metrics.intervals import RESAMPLES, Floats
from medcompile.metrics.material import Ints, Material, MissingMaterial, per_unit, renumbered, share
from medcompile.metrics.samples import PairedFlips, PairedTotals, Sample, UnitTotals


def decided(scores: Floats) -> Ints:
    """The class of the highest score in each row; -1, which is never right, where a score is NaN or Inf."""
    return np.where(np.isfinite(scores).all(axis=1), scores.argmax(axis=1), -1)


def _accuracy(name: str, m: Material) -> Sample:
    """Share of images whose likeliest class is the right one, over all images or over those of one class."""
    gold, of = np.asarray(m.known(name)), m.of_classes(name)
    reference, candidate = (decided(s) == gold for s in m.scores(name))
    return PairedFlips(reference[of], candidate[of], renumbered(m.unit[of]))


def _agreement(name: str, m: Material) -> Sample:
    reference, candidate = (decided(s) for s in m.scores(name))
    return PairedFlips(np.ones(m.items, dtype=bool), reference == candidate, m.unit, one_way=True)


def _recall_at(name: str, m: Material) -> Sample:
    k = int(name.partition("@")[2])
    reference, candidate = (ranks < k for ranks in m.ranks(name))
    return PairedFlips(reference, candidate, m.unit)


def _auroc(name: str, m: Material) -> Sample:
    """Area under the ROC curve, one class against the rest; without a label the mean over the classes that occur."""
    gold = np.asarray(m.known(name))
    reference, candidate = m.scores(name)
    classes = np.unique(gold[m.of_classes(name)])
    if len(np.unique(gold)) < 2:
        raise MissingMaterial(
            f"metric {name} needs images of two classes, and the evaluation data have one",
            fix="name a set of several classes under evaluation.data, or budget accuracy instead",
        )
    return auroc_sample(reference, candidate, gold, classes, m.unit)


def auroc_sample(
    reference: Floats,
    candidate: Floats,
    gold: NDArray[np.generic],
    classes: NDArray[np.generic],
    unit: Ints,
    resamples: int = RESAMPLES,
) -> PairedTotals:
    """Mean one-against-rest AUROC over the classes. scores: [n, all classes]; gold: [n]; unit: [n].

    A U-statistic is no function of totals, but its projection is: each item's placement (the share of the other side
    that it is ranked right against; DeLong, DeLong and Clarke-Pearson 1988) less half the area, averaged over each
    side, gives the area itself, and in resamples of units the spread that DeLong's variance has. Scores that are NaN
    or Inf in any class are ranked wrong against everything. Every class needs items on both sides.
    """
    mine = gold[:, None] == classes
    sides = [mine.sum(axis=0), (~mine).sum(axis=0)]
    largest = (np.where(mine, 1.0 / sides[0], 1.0 / sides[1]).mean(axis=1)).max()

    def placements(scores: Floats) -> Floats:
        """[units, 2 x classes]: sums over the items of the class, then over the others."""
        scores = np.where(np.isfinite(scores).all(axis=1, keepdims=True), scores, np.nan)
        columns = [_placements(scores[:, c], mine[:, i]) for i, c in enumerate(classes)]
        placed = np.stack(columns, axis=1)
        centred = placed - np.where(mine, placed, 0.0).sum(axis=0) / sides[0] / 2
        return per_unit(unit, np.concatenate([np.where(mine, centred, 0.0), np.where(mine, 0.0, centred)], axis=1))

    k = len(classes)
    totals = UnitTotals(
        per_unit(unit, np.concatenate([mine, ~mine], axis=1)), placements(reference), placements(candidate), resamples
    )
    same = (decided(reference) == decided(candidate)).sum()
    return PairedTotals(
        totals,
        lambda counts, sums: (share(sums, counts)[..., :k] + share(sums, counts)[..., k:]).mean(axis=-1),
        len(gold),
        1.0 / largest,
        len(gold) - int(same),
        largest=float(largest),
    )


def _placements(scores: Floats, mine: NDArray[np.bool_]) -> Floats:
    """The share of the other side that each item is ranked right against, ties half, NaN wrong. [n], [n] -> [n]."""
    scores = np.where(~np.isnan(scores), scores, np.where(mine, -np.inf, np.inf))
    placed = np.empty(len(scores))
    for side, sign in ((mine, 1.0), (~mine, -1.0)):
        others = np.sort(sign * scores[~side])
        below = np.searchsorted(others, sign * scores[side], "left")
        upto = np.searchsorted(others, sign * scores[side], "right")
        placed[side] = (below + upto) / 2 / len(others)
    return placed


METRICS: Mapping[str, Callable[[str, Material], Sample]] = {
    "accuracy": _accuracy,
    "accuracy[label]": _accuracy,
    "auroc": _auroc,
    "auroc[label]": _auroc,
    "agreement": _agreement,
    "image_to_text_recall@k": _recall_at,
    "text_to_image_recall@k": _recall_at,
}
