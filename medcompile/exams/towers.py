"""The exams of the two towers: zero-shot classes, retrieval of captions, and the embeddings themselves.

The image tower is examined beside the text tower of the same variant and target, as the pair will run; the text tower
against the reference's embeddings of the images, so that the images are run once. Either alone has embeddings only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from medcompile.backends import Executor
from medcompile.data import Item
from medcompile.errors import DataError
from medcompile.exams import Answers, Recorder, Setting, key_of
from medcompile.metrics import Predictions, partner_ranks
from medcompile.runtime.towers import Towers
from medcompile.spec import GraphSpec

if TYPE_CHECKING:
    from medcompile.program import Feeds

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Towers:
    """What both exams ask about: the images, their classes and their captions.

    prompts: what each class is called, by label; empty where the data has no labels.
    """

    setting: Setting
    items: tuple[Item, ...]
    prompts: Mapping[str, str]

    @cached_property
    def key(self) -> Answers:
        ids = {label: i for i, label in enumerate(self.prompts)}
        gold = np.array([ids[i.label] for i in self.items], np.int64) if ids else None
        return key_of(gold, self.items, tuple(self.prompts))

    @property
    def captions(self) -> list[str]:
        """Each image's caption; none where an image has none."""
        return [item.text for item in self.items] if all(item.text for item in self.items) else []

    def towers(self, executors: Mapping[str, Executor]) -> Towers:
        return Towers.read(self.setting.assets, executors, self.setting.graphs)

    def against(self, reference: Predictions) -> Self:
        return self

    def compared(self, values: Array, images: Array, towers: Towers) -> Predictions:
        """values, with what images [n, dim] and the texts in towers say of each other."""
        scores = towers.scores(images, towers.classes(self.prompts)) if self.prompts else None
        if not self.captions:
            return Predictions(values, scores=scores)
        captions = towers.embed_texts(self.captions)
        ranks = partner_ranks(images, captions), partner_ranks(captions, images)
        return Predictions(values, scores=scores, image_to_text=ranks[0], text_to_image=ranks[1])


@dataclass(frozen=True)
class ImageExam(_Towers):
    """Values are the embeddings of the images."""

    @property
    def spec(self) -> GraphSpec:
        return self.setting.graphs["image"]

    @property
    def graphs(self) -> Mapping[str, GraphSpec]:
        asked = self.prompts or self.captions
        return {n: s for n, s in self.setting.graphs.items() if n == "image" or (n == "text" and asked)}

    def digests(self) -> tuple[str, ...]:
        return tuple(item.digest for item in self.items)

    def answers(self, executors: Mapping[str, Executor]) -> Predictions:
        towers = self.towers(executors)
        values = self._embeddings(towers, self.items)
        return self.compared(values, values, towers) if "text" in executors else Predictions(values)

    def feeds(self, batch: int) -> Iterator[Feeds]:
        recorder = Recorder(self.spec)
        for start in range(0, len(self.items), batch):
            self._embeddings(self.towers({"image": recorder}), self.items[start : start + batch])
            yield from recorder.take()

    def _embeddings(self, towers: Towers, items: Sequence[Item]) -> Array:
        return towers.embed_images(item.image.open() for item in items if item.image is not None)


@dataclass(frozen=True)
class TextExam(_Towers):
    """Values are the embeddings of texts: every class in every template, then the captions. texts: without doubles."""

    texts: tuple[str, ...]

    @property
    def spec(self) -> GraphSpec:
        return self.setting.graphs["text"]

    @property
    def graphs(self) -> Mapping[str, GraphSpec]:
        return {"text": self.spec}

    def digests(self) -> tuple[str, ...]:
        return tuple(hashlib.sha256(text.encode()).hexdigest() for text in self.texts)

    def answers(self, executors: Mapping[str, Executor]) -> Predictions:
        towers = self.towers(executors)
        values = towers.embed_texts(self.texts)
        if "image" not in self.setting.graphs or not self.items:
            return Predictions(values)
        with np.load(self.setting.kept("image"), allow_pickle=False) as kept:
            return self.compared(values, kept["values"], towers)

    def feeds(self, batch: int) -> Iterator[Feeds]:
        recorder = Recorder(self.spec)
        towers, texts = self.towers({"text": recorder}), sorted(self.texts, key=len)
        for start in range(0, len(texts), batch):
            towers.embed_texts(texts[start : start + batch])
            yield from recorder.take()


def exam(graph: str, setting: Setting) -> ImageExam | TextExam:
    """The exam of `image` or `text`. Raises DataError if the data holds nothing that the tower can be asked."""
    items = tuple(item for item in setting.dataset.items if item.image is not None)
    prompts = _prompts(items, setting)
    if graph == "image":
        if not items:
            raise DataError(
                f"{setting.dataset.name} holds no images, so it says nothing of the image tower",
                fix="name a manifest of format images or npz; see docs/recipes.md",
            )
        return ImageExam(setting, items, prompts)
    templates = Towers.read(setting.assets, {}, setting.graphs).templates
    texts = [t.replace("{}", name) for name in prompts.values() for t in templates]
    texts += [item.text for item in setting.dataset.items if item.text]
    if not texts:
        raise DataError(
            f"{setting.dataset.name} holds neither captions nor labels, so it says nothing of the text tower",
            fix="name captions with fields.text, or classes with fields.label, in a manifest",
        )
    return TextExam(setting, items, prompts, tuple(dict.fromkeys(texts)))


def _prompts(items: Sequence[Item], setting: Setting) -> dict[str, str]:
    """Label -> what the class is called, in alphabetical order. One class is none; a label only named is one more."""
    named = setting.dataset.prompts
    labels = sorted({item.label for item in items} | set(named))
    if len(labels) < 2 or not all(item.label for item in items):
        return {}
    return {label: named.get(label, label) for label in labels}
