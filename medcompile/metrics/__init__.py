"""Task metrics with their paired intervals, and the non-inferiority test of an artifact against its fp32 reference.

`evaluate` is the whole of it: predictions in, Evidence out. Running the models is not done here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from medcompile.errors import UsageError
from medcompile.metrics.judge import judge
from medcompile.metrics.tasks import (
    ITEM,
    METRICS,
    RECALL_DEPTHS,
    REPORTED,
    Material,
    Metric,
    MissingMaterial,
    Predictions,
    check_same_items,
)
from medcompile.spec import Evidence, Margin

__all__ = ["Predictions", "evaluate", "is_metric", "metric_names"]


def metric_names(task: str) -> tuple[str, ...]:
    """What a budget may name for a task; "recall@k" stands for recall@1, recall@5 and so on. Raises UsageError."""
    if task not in METRICS:
        raise UsageError(f"no metrics are known for task {task!r}", fix=f"use one of {', '.join(METRICS)}")
    return tuple(METRICS[task])


def is_metric(task: str, name: str) -> bool:
    """True where a budget may name this metric for this task."""
    return _metric(task, name) is not None


def evaluate(
    task: str,
    margins: Sequence[Margin],
    reference: Predictions,
    candidate: Predictions,
    gold: Sequence[NDArray[np.generic]] | NDArray[np.generic] | None = None,
    units: Sequence[Hashable | None] | None = None,
    labels: Sequence[str] = (),
) -> tuple[Evidence, ...]:
    """Test the candidate against the reference on the same items, metric by metric.

    gold: the right answers, shaped like Predictions.values, or None. units: the document of each item (None for an
    item that stands alone); items of one document are not taken as independent. labels: label names, index = id.
    Returns the evidence of every margin, in their order, then of the task's other metrics, which are not judged.
    Raises UsageError for a metric that the task lacks, DataError where predictions do not match or a margin asks for
    what the data can't tell.
    """
    known = metric_names(task)
    documents = units is not None and any(unit is not None for unit in units)
    material = Material(reference, candidate, gold, _unit_index(units, len(reference.values)), labels)
    for margin in margins:
        if not is_metric(task, margin.metric):
            raise _unknown(task, margin.metric)
    check_same_items(task, material)

    unit = "document" if documents else ITEM.get(task, "item")
    evidence = []
    for margin in margins:
        metric = _metric(task, margin.metric)
        assert metric is not None
        sample = metric(margin.metric, material)
        evidence.append(judge(sample, margin, metric=margin.metric, unit=unit, graph=task))
    judged = {margin.metric for margin in margins}
    others = [n for name in known for n in (_depths(name) if name.endswith("@k") else (name,)) if n not in judged]
    for name in [*others, *REPORTED.get(task, {})]:
        metric = _metric(task, name) or REPORTED[task][name]
        try:
            sample = metric(name, material)
        except MissingMaterial:
            continue
        evidence.append(judge(sample, None, metric=name, unit=unit, graph=task))
    return tuple(evidence)


def _metric(task: str, name: str) -> Metric | None:
    if name.endswith("@k"):
        return None
    return METRICS.get(task, {}).get(re.sub(r"@[1-9][0-9]*$", "@k", name))


def _depths(name: str) -> tuple[str, ...]:
    return tuple(name[:-1] + str(depth) for depth in RECALL_DEPTHS)


def _unit_index(units: Sequence[Hashable | None] | None, items: int) -> NDArray[np.int64]:
    """Number the units from 0 in order of appearance; an item without a document is a unit of its own."""
    if units is None:
        return np.arange(items, dtype=np.int64)
    numbers: dict[Hashable, int] = {}
    keys = [("alone", i) if unit is None else ("document", unit) for i, unit in enumerate(units)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _unknown(task: str, name: str) -> UsageError:
    names = metric_names(task)
    if name in REPORTED.get(task, {}):
        fix = f"{name} is always reported, but an extreme has no bound to judge by; budget one of {', '.join(names)}"
    else:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        fix = (f"did you mean {near[0]}? " if near else "") + f"{task} knows {', '.join(names)}"
    return UsageError(f"task {task} has no metric {name!r} that a budget can name", fix=fix)
