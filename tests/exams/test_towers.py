"""The exams of two towers: what each asks, of whom, and that a fault in either tower is seen."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile import backends, bundle, data, exams, verify
from medcompile.backends import Executor
from medcompile.errors import DataError
from medcompile.exams.towers import ImageExam, TextExam
from medcompile.spec import GraphSpec
from tests import tiny
from tests.tiny import Workshop
from tests.tiny_pair import CLASSES, LABELS, write_images

Array = np.ndarray[Any, Any]


class Negated(Executor):
    """An executor whose answers point the other way. runs: how often it was asked."""

    def __init__(self, right: Executor) -> None:
        super().__init__(right.spec)
        self.right = right
        self.runs = 0

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.runs += 1
        return {name: -values for name, values in self.right.run(feeds).items()}

    def close(self) -> None:
        self.right.close()


def exam(pair: Workshop, graph: str, manifest: Path | None = None) -> ImageExam | TextExam:
    found = data.read(data.load_manifest(manifest or pair.root / "calibration/held-out.yaml"))
    asked = exams.of(graph, verify.setting(bundle.read(pair.bundle), found))
    assert isinstance(asked, ImageExam | TextExam)
    return asked


def executors(pair: Workshop, opened: ExitStack, graphs: Mapping[str, GraphSpec]) -> dict[str, Executor]:
    """Of fp32."""
    built = bundle.read(pair.bundle)
    backend = backends.for_target("onnxruntime-cpu")
    there = {a.graph: a for a in built.artifacts if a.variant == "fp32"}
    return {
        name: opened.enter_context(
            backend.load(pair.bundle / there[name].path, spec, built.variants["fp32"], there[name].target, 1)
        )
        for name, spec in graphs.items()
    }


def evidence(pair: Workshop, graph: str, wrong: str) -> dict[str, float]:
    """Metrics of the graph's exam with one tower of the artifact answering the wrong way."""
    asked = exam(pair, graph)
    reference = verify.read_reference(pair.bundle / f"reference/{graph}.npz", asked)
    with ExitStack() as opened:
        right = executors(pair, opened, asked.graphs)
        found = exams.judge(asked, (), reference, asked.answers(right | {wrong: Negated(right[wrong])}))
    return {e.metric: e.value for e in found}


def test_the_evidence_of_the_image_tower_falls_with_a_wrong_text_tower_and_its_own_cosine_does_not(
    pair: Workshop,
) -> None:
    found = evidence(pair, "image", wrong="text")
    assert found["agreement"] == 0  # of two classes, always the other one
    assert found["cosine"] > 1 - 1e-6


def test_the_evidence_of_the_text_tower_is_made_with_the_references_images(pair: Workshop) -> None:
    asked = exam(pair, "text")
    assert set(asked.graphs) == {"text"}
    found = evidence(pair, "text", wrong="text")
    assert found["agreement"] == 0 and found["cosine"] < -1 + 1e-6


def test_images_are_asked_as_a_pair_and_texts_as_every_class_in_every_template_and_every_caption(
    pair: Workshop,
) -> None:
    images, texts = exam(pair, "image"), exam(pair, "text")
    assert set(images.graphs) == {"image", "text"}
    assert images.key.labels == LABELS and len(images.digests()) == 24
    assert isinstance(texts, TextExam)
    assert len(texts.texts) == len(set(texts.texts)) == 2 * len(CLASSES) + 24
    assert set(CLASSES.values()) | {f"an image of {name}" for name in CLASSES.values()} <= set(texts.texts)
    assert len(texts.digests()) == len(texts.texts)


def test_feeds_hold_every_image_and_every_text_once(pair: Workshop) -> None:
    for graph in ("image", "text"):
        asked = exam(pair, graph)
        fed = list(asked.feeds(10))
        assert sum(len(f[asked.spec.inputs[0].name]) for f in fed) == len(asked.digests())
        assert all(set(f) == {t.name for t in asked.spec.inputs} for f in fed)


def test_a_label_that_is_only_named_is_one_more_class_to_choose(pair: Workshop, tmp_path: Path) -> None:
    manifest = write_images(tmp_path, "more", 4, 3, prompts={**CLASSES, "effusion": "pleural effusion"})
    asked = exam(pair, "image", manifest)
    assert asked.key.labels == ("bars", "disc", "effusion")
    assert np.array(asked.key.gold).tolist() == [0, 1, 0, 1]


def test_images_without_labels_are_judged_by_captions_and_embeddings_alone(pair: Workshop, tmp_path: Path) -> None:
    asked = exam(pair, "image", write_images(tmp_path, "captioned", 6, 4, without=("label",)))
    with ExitStack() as opened:
        found = asked.answers(executors(pair, opened, asked.graphs))
    assert found.scores is None and asked.key.gold is None
    assert found.image_to_text is not None and sorted(found.image_to_text)[0] >= 0
    assert len(found.values) == 6


def test_images_with_labels_alone_have_no_retrieval(pair: Workshop, tmp_path: Path) -> None:
    asked = exam(pair, "image", write_images(tmp_path, "labelled", 6, 5, without=("text",)))
    with ExitStack() as opened:
        found = asked.answers(executors(pair, opened, asked.graphs))
    assert found.image_to_text is None and found.scores is not None
    np.testing.assert_allclose(found.scores.sum(axis=1), 1, rtol=1e-5)


def test_bare_images_need_the_image_tower_alone_and_say_nothing_of_texts(pair: Workshop, tmp_path: Path) -> None:
    manifest = write_images(tmp_path, "bare", 4, 6, without=("text", "label"))
    assert set(exam(pair, "image", manifest).graphs) == {"image"}
    with pytest.raises(DataError, match="neither captions nor labels") as caught:
        exam(pair, "text", manifest)
    assert "fields.text" in caught.value.fix


def test_texts_alone_say_nothing_of_the_image_tower(pair: Workshop, tmp_path: Path) -> None:
    manifest = tiny.write_data(tmp_path, "captions", [{"text": f"chest pain {i}"} for i in range(5)])
    with pytest.raises(DataError, match="holds no images"):
        exam(pair, "image", manifest)
    asked = exam(pair, "text", manifest)
    with ExitStack() as opened:
        found = asked.answers(executors(pair, opened, asked.graphs))
    assert len(found.values) == 5 and found.scores is None
