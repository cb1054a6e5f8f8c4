"""Task metrics with their paired intervals, and the non-inferiority test of an artifact against its fp32 reference.

`evaluate` is the whole of it: predictions in, Evidence out. Running the models is not done here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medcompile.errors import UsageError
from medcompile.metrics.check import check_same_items
from medcompile.metrics.decisions import COSTS_OF_ENTITIES, Kind, check_costs
from medcompile.metrics.decisions import flips as flipped
from medcompile.metrics.judge import ALONE, Step, holm, judge
from medcompile.metrics.material import Material, MissingMaterial, Predictions, label_names, label_of, partner_ranks
from medcompile.metrics.samples import LowestValue, Sample
from medcompile.metrics.subgroups import GROUP, Subgroups, subgroups, worst_of
from medcompile.metrics.tasks import BY_GROUP, ITEM, METRICS, MOST_LABELS, ON_DEMAND, RECALL_DEPTHS, Metric
from medcompile.spec import Evidence, Margin, Verdict

__all__ = [
    "COSTS_OF_ENTITIES",
    "Predictions",
    "check_margins",
    "check_names",
    "evaluate",
    "flips",
    "is_cost",
    "is_metric",
    "metric_names",
    "partner_ranks",
]


def metric_names(task: str) -> tuple[str, ...]:
    """What a budget may name for a task: "recall@k" stands for recall@1, recall@5 and so on, "recall[label]" for the
    recall of any one label, "recall[worst:group]" for the worst group of any column. Raises UsageError."""
    if task not in METRICS:
        raise UsageError(f"no metrics are known for task {task!r}", fix=f"use one of {', '.join(METRICS)}")
    return (*METRICS[task], *(name + GROUP for name in BY_GROUP.get(task, ())))


def is_metric(task: str, name: str) -> bool:
    """True where a budget may name this metric for this task, if the model has the label that it names."""
    return _metric(task, name) is not None


def is_cost(name: str) -> bool:
    """True for the metric whose margin says what mistakes cost, and may be 1 or more."""
    return (worst_of(name) or (name, ""))[0] == "cost"


def check_names(task: str, names: Iterable[str], labels: Sequence[str]) -> None:
    """Raise UsageError for a metric that the task lacks, or one of a label that the model lacks."""
    known = label_names(task, labels)
    for name in names:
        label = label_of(name)
        if not is_metric(task, name):
            near = difflib.get_close_matches(name, metric_names(task), n=1, cutoff=0.4)
            fix = (f"did you mean {near[0]}? " if near else "") + f"{task} knows {', '.join(metric_names(task))}"
            raise UsageError(f"task {task} has no metric {name!r} that a budget can name", fix=fix)
        if label is not None and label not in known:
            near = difflib.get_close_matches(label, known, n=1, cutoff=0.4)
            fix = (f"did you mean {near[0]}? " if near else "") + f"the labels are {', '.join(known) or 'none'}"
            raise UsageError(f"metric {name}: there is no label {label!r}", fix=fix)


def check_margins(
    task: str, margins: Sequence[Margin], labels: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> None:
    """Raise UsageError for margins that the task can't have, and where the data has no such labels or groups."""
    check_names(task, [margin.metric for margin in margins], labels)
    for margin in margins:
        worst = worst_of(margin.metric)
        if worst and worst[1] not in groups:
            raise UsageError(
                f"metric {margin.metric}: the evaluation data have no groups {worst[1]!r}"
                + (f", only {', '.join(groups)}" if groups else ""),
                fix=f"name the column in the data's manifest, as groups: {{{worst[1]}: COLUMN}}",
            )
        if margin.costs:
            check_costs(task, margin.costs, labels)


def evaluate(
    task: str,
    margins: Sequence[Margin],
    reference: Predictions,
    candidate: Predictions,
    gold: Sequence[NDArray[np.generic]] | NDArray[np.generic] | None = None,
    units: Sequence[Hashable | None] | None = None,
    labels: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Evidence, ...]:
    """Test the candidate against the reference on the same items, metric by metric.

    gold: the right answers, shaped like Predictions.values, or None; for image and text the class of every image.
    units: the document of each item (None for an item that stands alone); items of one document are not taken as
    independent. labels: label names, index = id; for image and text the classes of Predictions.scores. groups: by
    column of the data, the group of each item.
    Returns the evidence of every margin, in their order, then of the task's other metrics, which are not judged. The
    margins are one family, stepped down by Holm: that any is falsely called non-inferior is as rare as each alone.
    A candidate that answers with NaN or Inf anywhere is inferior by every margin.
    Raises UsageError for a metric or label that the task lacks, DataError where predictions do not match or a margin
    asks for what the data can't tell.
    """
    check_margins(task, margins, labels, groups or {})
    documents = units is not None and any(unit is not None for unit in units)
    items = _items(task, reference, gold) if units is None else len(units)
    material = Material(task, reference, candidate, gold, _unit_index(units, items), labels, groups or {})
    check_same_items(material)

    def sampled(name: str, of: Material = material) -> Sample | Subgroups:
        metric = _metric(task, name)
        assert metric is not None
        return subgroups(name, metric, of) if worst_of(name) else metric(name, of)

    def judged(name: str, sample: Sample | Subgroups, margin: Margin | None = None, step: Step = ALONE) -> Evidence:
        text = task == "text" and name.startswith("cosine")  # of the texts, which belong to no document
        unit = "text" if text else "document" if documents else ITEM.get(task, "item")
        return judge(sample, margin, metric=name, unit=unit, graph=task, step=step)

    tested = [(sampled(m.metric, replace(material, costs=m.costs) if m.costs else material), m) for m in margins]
    family = [(s, m) for s, m in tested if not isinstance(s, LowestValue)]
    steps = dict(zip([m.metric for _, m in family], holm(family), strict=True))
    evidence = [judged(m.metric, s, m, steps.get(m.metric, ALONE)) for s, m in tested]
    if material.broken:
        note = f"{material.broken} answers hold NaN or Inf"
        evidence = [replace(e, verdict=Verdict.INFERIOR, note=note, p_value=None) for e in evidence]
    for name in _reported(task, labels):
        try:
            if name not in {margin.metric for margin in margins}:
                evidence.append(judged(name, sampled(name)))
        except MissingMaterial:
            continue
    for column, name in _reported_groups(task, material):
        with suppress(MissingMaterial):
            found = subgroups(f"{name}[worst:{column}]", METRICS[task][name], material)
            evidence += [judged(f"{name}[{column}:{group}]", sample) for group, sample in found.samples.items()]
    return tuple(evidence)


def flips(
    task: str,
    reference: Predictions,
    candidate: Predictions,
    gold: Sequence[NDArray[np.generic]] | NDArray[np.generic] | None = None,
    labels: Sequence[str] = (),
) -> list[tuple[int, Kind]] | None:
    """The items whose decision the candidate changed, in order, and how: harmful, healed or other (decisions.py).

    Arguments as evaluate has them. None where nothing is decided, as by embeddings.
    """
    items = _items(task, reference, gold)
    return flipped(Material(task, reference, candidate, gold, np.arange(items, dtype=np.int64), labels))


def _metric(task: str, name: str) -> Metric | None:
    if name.endswith("@k"):
        return None
    if (worst := worst_of(name)) is not None:
        return METRICS[task][worst[0]] if worst[0] in BY_GROUP.get(task, ()) else None
    return METRICS.get(task, {}).get(re.sub(r"\[.+\]$", "[label]", re.sub(r"@[1-9][0-9]*$", "@k", name)))


def _reported(task: str, labels: Sequence[str]) -> list[str]:
    """The task's metrics, with numbers and labels filled in."""
    known = label_names(task, labels)
    names: list[str] = []
    for name in METRICS[task]:
        if name.endswith("@k"):
            names += [name[:-1] + str(depth) for depth in RECALL_DEPTHS]
        elif not name.endswith("[label]") and name not in ON_DEMAND:
            names.append(name)
        elif name.endswith("[label]") and 1 < len(known) <= MOST_LABELS:
            names += [name.replace("[label]", f"[{label}]") for label in known]
    return names


def _reported_groups(task: str, m: Material) -> list[tuple[str, str]]:
    """Column and metric, for the columns that have few enough groups to show each."""
    few = [column for column, values in m.groups.items() if 1 < len(set(values)) <= MOST_LABELS]
    return [(column, name) for column in few for name in BY_GROUP.get(task, ()) if name not in ON_DEMAND]


def _items(task: str, reference: Predictions, gold: Sequence[object] | NDArray[np.generic] | None) -> int:
    """How many items there are. The values of the task text are of texts; its items are images, which others tell."""
    about = (gold, reference.scores, reference.image_to_text, reference.text_to_image)
    return next((len(a) for a in about if a is not None), 0) if task == "text" else len(reference.values)


def _unit_index(units: Sequence[Hashable | None] | None, items: int) -> NDArray[np.int64]:
    """Number the units from 0 in order of appearance; an item without a document is a unit of its own."""
    if units is None:
        return np.arange(items, dtype=np.int64)
    numbers: dict[Hashable, int] = {}
    keys = [("alone", i) if unit is None else ("document", unit) for i, unit in enumerate(units)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
