"""Exams: what a graph is asked on a data set, how its answers come about, and what they are judged by.

One file per kind of model: text.py (encoders), towers.py (image and text), decoder.py (language models). An exam runs
executors, the reference's as well as an artifact's; which artifacts are examined, and what becomes of the evidence, is
verify.py's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medcompile import metrics
from medcompile.backends import Executor
from medcompile.metrics import Predictions
from medcompile.metrics.subgroups import NO_GROUP
from medcompile.spec import Evidence, GraphSpec, Margin

if TYPE_CHECKING:
    import numpy as np

    from medcompile.data import Dataset, Item
    from medcompile.program import Feeds

    Array = np.ndarray[Any, Any]

_ROOMS = {"image": "towers", "text": "towers", "generate": "decoder"}


@dataclass(frozen=True)
class Setting:
    """What a model's exams are set from.

    assets: the folder with what its runtime needs. kept(graph): the file of the reference's answers to another graph's
    exam, asked for only by exams that build on it.
    """

    graphs: Mapping[str, GraphSpec]
    assets: Path
    dataset: Dataset
    kept: Callable[[str], Path]


@dataclass(frozen=True)
class Answers:
    """What answers are judged by. gold: the right ones, or None. units: each item's document, None where it has none.

    labels: names by id of what gold holds. groups: by column of the data, each item's group. names: of the items, what
    may be shown of them.
    """

    gold: Sequence[Array] | Array | None
    units: Sequence[str | None]
    labels: Sequence[str]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    names: Sequence[str] = ()


def key_of(gold: Sequence[Array] | Array | None, items: Sequence[Item], labels: Sequence[str]) -> Answers:
    """What answers to those items are judged by. An item is named by its id, or the beginning of its digest."""
    named = [dict(item.groups) for item in items]
    columns = dict.fromkeys(column for groups in named for column in groups)
    groups = {column: [one.get(column) or NO_GROUP for one in named] for column in columns}
    names = [item.id or item.digest[:12] for item in items]
    return Answers(gold, [item.document or None for item in items], labels, groups, names)


class Exam(Protocol):
    """The exam of one graph. spec: its face. graphs: every graph whose executor answers it, its own among them."""

    @property
    def spec(self) -> GraphSpec: ...
    @property
    def graphs(self) -> Mapping[str, GraphSpec]: ...
    @property
    def key(self) -> Answers: ...

    def digests(self) -> tuple[str, ...]:
        """Of each item that Predictions.values answer, hex, in order."""
        ...

    def answers(self, executors: Mapping[str, Executor]) -> Predictions:
        """What the executors (by graph name) answer."""
        ...

    def against(self, reference: Predictions) -> Exam:
        """The exam as a candidate has to take it: what it is asked may depend on what the reference answered."""
        ...

    def feeds(self, batch: int) -> Iterator[Feeds]:
        """The inputs of the graph for all items, about batch of them at a time: what calibration runs on."""
        ...


def of(graph: str, setting: Setting) -> Exam:
    """The graph's exam. Raises DataError if the data has nothing that it can be asked, or a label the model lacks."""
    room = importlib.import_module(f"{__name__}.{_ROOMS.get(graph, 'text')}")
    exam: Exam = room.exam(graph, setting)
    return exam


def judge(
    exam: Exam, margins: Sequence[Margin], reference: Predictions, candidate: Predictions
) -> tuple[Evidence, ...]:
    """Evidence of one graph: every margin that is a metric of its task, and the task's other metrics, not judged."""
    task, key = exam.spec.name, exam.key
    own = [m for m in margins if metrics.is_metric(task, m.metric)]
    return metrics.evaluate(task, own, reference, candidate, key.gold, key.units, key.labels, key.groups)


def flips(exam: Exam, reference: Predictions, candidate: Predictions) -> tuple[tuple[str, str], ...] | None:
    """The names of the items whose decision the candidate changed, each with how: harmful, healed or other.

    None where the graph decides nothing.
    """
    key = exam.key
    found = metrics.flips(exam.spec.name, reference, candidate, key.gold, key.labels)
    return None if found is None else tuple((key.names[index], kind) for index, kind in found)


def check(exam: Exam, margins: Sequence[Margin]) -> None:
    """Raise UsageError where the budget names a label or a group that the model or the data lack."""
    task, key = exam.spec.name, exam.key
    own = [m for m in margins if metrics.is_metric(task, m.metric)]
    metrics.check_margins(task, own, key.labels, key.groups)


class Recorder(Executor):
    """An executor that keeps what it is fed and answers zeros."""

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__(spec)
        self._fed: list[Feeds] = []

    def run(self, feeds: Feeds) -> dict[str, Array]:
        import numpy as np

        self._fed.append(feeds)
        sizes = {d: n for t in self.spec.inputs for d, n in zip(t.shape, feeds[t.name].shape, strict=True)}
        return {t.name: np.zeros([sizes.get(d, d) for d in t.shape], t.dtype) for t in self.spec.outputs}

    def take(self) -> list[Feeds]:
        """What was fed since the last call."""
        taken, self._fed = self._fed, []
        return taken

    def close(self) -> None:
        self._fed = []
