"""Accuracy beside speed: a contender's answers against the reference's, from the very runs that were timed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medcompile.bench.peer import Array
from medcompile.bench.results import Accuracy

VECTORS = ("embed", "image", "text")
WORST_COSINE = 0.9
LEAST_AGREEMENT = 0.9
"""Below either, answers are called wrong: no budget of a medical model is as wide as that."""
LEAST_BEGUN = 0.5
"""Of generated texts, the share whose first token is the reference's. Those in 4 bits soon differ in a word, and from
there on in all; but they begin alike."""


@dataclass(frozen=True)
class Answers:
    """What one contender answered in one cell. values: by batch; spans: by batch, a list of spans for each item."""

    values: Mapping[int, Array]
    spans: Mapping[int, list[list[tuple[int, int, str]]]]


def read(path: Path) -> Answers:
    """What the contender's process wrote (worker.write_answers)."""
    with np.load(path, allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    values = {int(n.removeprefix("values-")): a for n, a in arrays.items() if n.startswith("values-")}
    spans: dict[int, Any] = {}
    for name, raw in arrays.items():
        if name.startswith("spans-"):
            found = json.loads(raw.tobytes())
            spans[int(name.removeprefix("spans-"))] = [[(a, b, str(label)) for a, b, label in item] for item in found]
    return Answers(values, spans)


def judge(task: str, own: Answers, reference: Answers) -> Accuracy:
    """own against reference on the batches that both answered."""
    if own.spans or reference.spans:
        return _of_spans(own, reference)
    shared = sorted(set(own.values) & set(reference.values))
    items = sum(len(own.values[k]) for k in shared)
    if not shared:
        return Accuracy(0, wrong="nothing was answered that the reference answered")
    pairs = [(own.values[k], reference.values[k]) for k in shared]
    for a, b in pairs:
        if a.shape != b.shape:
            return Accuracy(items, wrong=f"answers of shape {list(a.shape)}; the reference's are {list(b.shape)}")
        if not np.isfinite(a).all():
            return Accuracy(items, wrong="answers hold NaN or infinite values")
    if task in VECTORS:
        cosines = np.concatenate([_cosines(a, b) for a, b in pairs])
        worst = float(cosines.min())
        wrong = f"worst cosine below {WORST_COSINE}" if worst < WORST_COSINE else ""
        return Accuracy(items, cosine_mean=float(cosines.mean()), cosine_worst=worst, wrong=wrong)
    same = float(np.concatenate([_same(task, a, b) for a, b in pairs]).mean())
    if task != "generate":
        return _agreed(items, same)
    begun = float(np.concatenate([a[:, 0] == b[:, 0] for a, b in pairs]).mean())
    wrong = f"less than {LEAST_BEGUN} begin with the same token" if begun < LEAST_BEGUN else ""
    return Accuracy(items, agreement=same, wrong=wrong)


def with_gold(found: Accuracy, own: Answers, gold: Sequence[Any], batch: int) -> Accuracy:
    """found, with how the answers compare with the data's own labels: gold has an entry for each item, in order."""
    if own.spans:
        pairs = [(item, gold[k * batch + i]) for k, items in own.spans.items() for i, item in enumerate(items)]
        wanted = {(n, (a, b, name)) for n, (_, spans) in enumerate(pairs) for a, b, name in spans}
        given = {(n, span) for n, (spans, _) in enumerate(pairs) for span in spans}
        total = len(wanted) + len(given)
        return replace(found, gold=2 * len(wanted & given) / total if total else 1.0, gold_metric="F1")
    right = [int(row.argmax()) == gold[k * batch + i] for k, rows in own.values.items() for i, row in enumerate(rows)]
    return replace(found, gold=sum(right) / len(right), gold_metric="accuracy") if right else found


def _agreed(items: int, agreement: float) -> Accuracy:
    wrong = f"less than {LEAST_AGREEMENT} agree" if agreement < LEAST_AGREEMENT else ""
    return Accuracy(items, agreement=agreement, wrong=wrong)


def _cosines(a: Array, b: Array) -> Array:
    """Of the rows of two [n, d] arrays, in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray((x * y).sum(axis=1) / np.maximum(lengths, 1e-30))


def _same(task: str, a: Array, b: Array) -> Array:
    """Which decisions are the same, as numbers: labels by argmax; of generated tokens, the share of each row before the
    first that differs (after it the two write different texts)."""
    if task == "generate":
        differs = np.concatenate([a != b, np.ones((len(a), 1), bool)], axis=1)
        return np.asarray(differs.argmax(axis=1) / max(a.shape[1], 1))
    return np.asarray(a.argmax(axis=-1) == b.argmax(axis=-1), np.float64).ravel()


def _of_spans(own: Answers, reference: Answers) -> Accuracy:
    shared = sorted(set(own.spans) & set(reference.spans))
    found = {(k, i, span) for k in shared for i, item in enumerate(own.spans[k]) for span in item}
    wanted = {(k, i, span) for k in shared for i, item in enumerate(reference.spans[k]) for span in item}
    items = sum(len(own.spans[k]) for k in shared)
    total = len(found) + len(wanted)
    return _agreed(items, 2 * len(found & wanted) / total if total else 1.0)
