"""The exams of text encoders: embeddings, token and sequence classification, masked words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from medcompile.backends import Executor
from medcompile.data import Item
from medcompile.errors import DataError
from medcompile.exams import Answers, Recorder, Setting, key_of
from medcompile.metrics import Predictions
from medcompile.runtime.encoder import Encoder
from medcompile.runtime.text import TextAssets, read_json
from medcompile.spec import GraphSpec

if TYPE_CHECKING:
    from medcompile.program import Feeds

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Question:
    """An evaluation item as one task asks it. text: for fill-mask, with the mask token in it; gold: a token's id."""

    item: Item
    text: str
    gold: int = -1


@dataclass(frozen=True)
class TextExam:
    """asked: the items of the data that the task can ask, as it asks them."""

    spec: GraphSpec
    text: TextAssets
    labels: tuple[str, ...]
    asked: tuple[Question, ...]

    @property
    def graphs(self) -> Mapping[str, GraphSpec]:
        return {self.spec.name: self.spec}

    @cached_property
    def key(self) -> Answers:
        gold = _gold(self.spec.name, self.asked, self.labels)
        return key_of(gold, [q.item for q in self.asked], self.labels)

    def digests(self) -> tuple[str, ...]:
        return tuple(q.item.digest for q in self.asked)

    def answers(self, executors: Mapping[str, Executor]) -> Predictions:
        return self._answers(executors, self.asked)

    def against(self, reference: Predictions) -> Self:
        return self

    def feeds(self, batch: int) -> Iterator[Feeds]:
        # Texts of one length share a batch, so that little of it is padding. What is observed of a text stays the same.
        asked = sorted(self.asked, key=lambda q: (len(q.text), q.item.digest))
        recorder = Recorder(self.spec)
        for start in range(0, len(asked), batch):
            self._answers({self.spec.name: recorder}, asked[start : start + batch])
            yield from recorder.take()

    def _answers(self, executors: Mapping[str, Executor], asked: Sequence[Question]) -> Predictions:
        task = self.spec.name
        encoder = Encoder(self.text, executors, {task: self.spec}, self.labels)
        if task == "token-classification":
            labels, sure = encoder.label_words([q.item.words for q in asked])
            return Predictions(labels, confidences=sure)
        if task == "sequence-classification":
            pairs = [q.item.text_pair for q in asked]
            classes, certain = encoder.class_ids([q.text for q in asked], pairs if any(pairs) else None)
            return Predictions(classes, confidences=certain)
        if task == "fill-mask":
            return Predictions(encoder.mask_ids([q.text for q in asked]))
        values = encoder.embed([q.text for q in asked])
        passages = [q.item.text_pair for q in asked]
        return Predictions(values, encoder.embed(passages) if all(passages) else None)


def exam(task: str, setting: Setting) -> TextExam:
    """The exam of that task. Raises DataError if none of the items suits it, or one has a label the model lacks."""
    text = TextAssets.read(setting.assets)
    path = setting.assets / "labels.json"
    labels = tuple(str(name) for name in read_json(path, list)) if path.is_file() else ()
    found = TextExam(setting.graphs[task], text, labels, questions(task, setting.dataset.items, text))
    found.key  # noqa: B018  an unknown label shows here
    return found


def questions(task: str, items: Sequence[Item], text: TextAssets) -> tuple[Question, ...]:
    """The items that the task can ask. fill-mask hides one word that is a single token, chosen by the item's digest.

    An item without words is asked for token-classification by its white space, so that plain text can calibrate.

    Raises DataError if none of the items suits the task.
    """
    items = [item for item in items if item.text]
    if task == "fill-mask":
        asked = tuple(q for item in items if (q := _masked(item, text)))
    elif task == "token-classification":
        asked = tuple(Question(i if i.words else replace(i, words=tuple(i.text.split())), i.text) for i in items)
    else:
        asked = tuple(Question(item, item.text) for item in items)
    if not asked:
        raise DataError(
            f"none of the {len(items)} items with text can be asked for {task}",
            fix="token-classification needs words and labels, the other tasks text; see the manifest's fields",
        )
    return asked


def _masked(item: Item, text: TextAssets) -> Question | None:
    words = (item.text_pair or item.text).split()
    tokens = text.encode_words([words])[0]
    counts = np.bincount(tokens.words, minlength=len(words)) if len(tokens) else np.zeros(len(words), int)
    single = [i for i, word in enumerate(words) if counts[i] == 1 and word.isalpha()]
    if not single or text.mask_token is None:
        return None
    chosen = single[int(item.digest[:12], 16) % len(single)]
    gold = int(tokens.ids[tokens.words == chosen][0])
    return Question(item, " ".join([*words[:chosen], text.mask_token, *words[chosen + 1 :]]), gold)


def _gold(task: str, asked: Sequence[Question], labels: Sequence[str]) -> list[Array] | Array | None:
    """The right answers as ids, or None where the data has none. Raises DataError on a label the model lacks."""
    if task == "fill-mask":
        return np.array([q.gold for q in asked], np.int64)
    ids = {label: i for i, label in enumerate(labels)}
    if task == "token-classification" and all(q.item.labels for q in asked):
        return [np.array([_id(ids, label) for label in q.item.labels], np.int64) for q in asked]
    if task == "sequence-classification" and all(q.item.label for q in asked):
        return np.array([_id(ids, q.item.label) for q in asked], np.int64)
    return None


def _id(ids: Mapping[str, int], label: str) -> int:
    if label not in ids:
        raise DataError(
            f"the evaluation data has the label {label!r}; the model's labels are {', '.join(ids)}",
            fix="rename it with label_map, or drop it with keep, in the data's manifest",
        )
    return ids[label]
