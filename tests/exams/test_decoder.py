"""The exam of language models: which tokens are scored, from what, and that a step model is asked the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile import exams, sources, verify
from medcompile.backends import Executor, get
from medcompile.data import Item
from medcompile.errors import DataError
from medcompile.exams import decoder
from medcompile.exams.decoder import DecoderExam, FreshSequence, fresh_step, windows
from medcompile.metrics import Predictions
from medcompile.metrics.language import LIKELIEST
from medcompile.models import llama
from medcompile.runtime.prompts import DecoderText
from medcompile.spec import GraphSpec, Margin, TensorSpec, Variant, Verdict
from tests import decoders

Array = np.ndarray[Any, Any]

SPEC = GraphSpec(
    "generate",
    (TensorSpec("input_ids", "int64", ("tokens",)),),
    (TensorSpec("logits", "float32", ("rows", decoders.VOCABULARY)),),
    (),
)
TEXTS = ("the dose was 5 mg twice a day", "no fever", "pain in the left arm, for two weeks now; none at night")


class Bigrams(Executor):
    """Logits that depend on the token before alone. runs: what was asked."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__(SPEC)
        rng = np.random.default_rng(0)
        self.table = rng.normal(0, 2, (decoders.VOCABULARY, decoders.VOCABULARY)).astype(np.float32)
        self.table += shift * rng.normal(0, 1, self.table.shape).astype(np.float32)
        self.runs: list[Array] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.runs.append(feeds["input_ids"])
        return {"logits": self.table[feeds["input_ids"]]}

    def close(self) -> None: ...

    def log(self, ids: Array) -> Array:
        """Log-likelihood of each token but the first."""
        rows = self.table[ids[:-1]].astype(np.float64)
        found: Array = (rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
        return found


def item(text: str, text_pair: str = "", label: str = "", document: str = "") -> Item:
    digest = hashlib.sha256(f"{text}|{text_pair}".encode()).hexdigest()
    return Item(digest, text, text_pair=text_pair, label=label, document=document)


def asked(*items: Item, window: int = 64) -> DecoderExam:
    text = DecoderText(decoders.tokenizer(), window)
    ids = tuple(text.encode(decoder.passage(i), decoders.VOCABULARY) for i in items)
    labels = sorted({i.label for i in items})
    choices = tuple(labels) if all(labels) and len(labels) > 1 else ()
    return DecoderExam(SPEC, text, items, ids, choices, decoders.VOCABULARY)


def examined(exam: DecoderExam, model: Executor) -> Predictions:
    return exam.answers({"generate": model})


@pytest.mark.parametrize(("length", "size"), [(2, 8), (8, 8), (9, 8), (15, 8), (16, 8), (40, 7)])
def test_windows_predict_every_token_but_the_first_once_and_begin_with_the_last_one_known(
    length: int, size: int
) -> None:
    cut = list(windows(np.arange(length), size))
    assert all(2 <= len(window) <= size for window in cut)
    assert np.concatenate([window[1:] for window in cut]).tolist() == list(range(1, length))
    assert [window[0] for window in cut[1:]] == [window[-1] for window in cut[:-1]]


@pytest.mark.parametrize("window", [64, 9])
def test_each_token_has_the_likelihood_that_the_model_gives_it(window: int) -> None:
    exam, model = asked(*map(item, TEXTS), window=window), Bigrams()
    found = examined(exam, model)
    for ids, logs in zip(exam.ids, found.values, strict=True):
        np.testing.assert_allclose(logs, model.log(ids), rtol=1e-5)
    assert max(map(len, model.runs)) <= window
    before = np.concatenate([ids[:-1] for ids in exam.ids])
    assert found.top1 is not None
    np.testing.assert_array_equal(found.top1, model.table[before].argmax(axis=1))


def test_the_likeliest_tokens_are_kept_and_some_drawn_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "POSITIONS", 20)
    monkeypatch.setattr(decoder, "_CELLS", decoders.VOCABULARY * 5)
    exam, model = asked(*map(item, TEXTS), window=16), Bigrams()
    found = examined(exam, model)
    assert found.positions is not None and found.kept_ids is not None and found.kept_logs is not None
    scored = sum(len(ids) - 1 for ids in exam.ids)
    assert 10 < len(found.positions) <= 20
    assert found.positions.tolist() == list(range(0, scored, -(-scored // 20)))
    before = np.concatenate([ids[:-1] for ids in exam.ids])[found.positions]
    likeliest = np.argsort(-model.table[before], axis=1)
    for row, order in zip(found.kept_ids, likeliest, strict=True):
        assert set(row[:LIKELIEST]) == set(order[:LIKELIEST])
        assert set(row[LIKELIEST:]) <= set(order[LIKELIEST:])
    right = np.take_along_axis(decoder.log_likelihoods(model.table[before]), found.kept_ids.astype(int), axis=1)
    np.testing.assert_allclose(found.kept_logs, right, rtol=1e-5)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    likely = np.concatenate([np.full(LIKELIEST, 0.99 / LIKELIEST), [0.006, 0.003, 0.001, 0.0]])
    rng = np.random.default_rng(0)
    with np.errstate(divide="ignore"):
        ids = decoder._chosen(np.log(np.tile(likely, (500, 1))), rng.random((500, 20)))
    assert (np.sort(ids[:, :LIKELIEST], axis=1) == np.arange(LIKELIEST)).all()
    counts = np.bincount(ids[:, LIKELIEST:].ravel(), minlength=len(likely))[LIKELIEST:]
    np.testing.assert_allclose(counts / 10_000, [0.6, 0.3, 0.1, 0.0], atol=0.02)


def test_a_candidate_is_asked_about_the_tokens_that_the_reference_kept() -> None:
    exam, model, other = asked(*map(item, TEXTS * 4)), Bigrams(), Bigrams(shift=0.5)
    reference = examined(exam, model)
    candidate = examined(exam.against(reference), other)
    assert reference.kept_ids is not None and candidate.kept_logs is not None and candidate.positions is not None
    np.testing.assert_array_equal(candidate.kept_ids, reference.kept_ids)
    before = np.concatenate([ids[:-1] for ids in exam.ids])[candidate.positions]
    log, right = (decoder.log_likelihoods(m.table[before]) for m in (model, other))
    kept = np.take_along_axis(right, reference.kept_ids.astype(int), axis=1)
    np.testing.assert_allclose(candidate.kept_logs, kept, rtol=1e-5)
    found = exams.judge(exam, [Margin("kl", 0.01, 0.95)], reference, candidate)[0]
    assert found.value == pytest.approx((np.exp(log) * (log - right)).sum(axis=1).mean(), rel=0.05)
    assert found.difference == -found.value


def test_a_question_is_answered_by_the_likeliest_of_the_labels() -> None:
    items = [
        item("is it so?", text_pair="it is.", label="yes", document="a"),
        item("is it so?", text_pair="it is not.", label="no", document="b"),
        item("is it ever?", text_pair="who knows.", label="maybe"),
    ]
    exam, model = asked(*items, window=200), Bigrams()
    assert exam.key.labels == ("maybe", "no", "yes")
    assert exam.key.gold is not None and np.asarray(exam.key.gold).tolist() == [2, 1, 0]
    assert list(exam.key.units) == ["a", "b", None]
    found = examined(exam, model)
    assert found.scores is not None and found.scores.shape == (3, 3)
    for i, one in enumerate(items):
        before = exam.text.encode(decoder.prompt(one), decoders.VOCABULARY)
        for j, choice in enumerate(exam.choices):
            whole = exam.text.encode(f"{decoder.prompt(one)} {choice}", decoders.VOCABULARY)
            right = model.log(whole)[len(before) - 1 :]
            assert len(right) == len(choice) + 1
            assert found.scores[i, j] == pytest.approx(right.mean(), rel=1e-5)
    assert decoder.prompt(items[0]) == "it is.\n\nQuestion: is it so?\nAnswer:"


def test_a_question_longer_than_the_window_loses_its_beginning() -> None:
    items = [item("so?", text_pair="words " * 40, label=label, document=label) for label in ("yes", "no")]
    exam, model = asked(*items, window=50), Bigrams()
    found = examined(exam, model)
    assert found.scores is not None and np.isfinite(found.scores).all()
    whole = exam.text.encode(f"{decoder.prompt(items[0])} yes", decoders.VOCABULARY)
    assert any(np.array_equal(run, whole[-50:-1]) for run in model.runs)


def test_calibration_is_fed_every_window_once_as_fresh_sequences() -> None:
    exam = asked(*map(item, TEXTS * 3), window=16)
    fed = list(exam.feeds(4))
    assert all(len(feeds["past_lens"]) <= 4 and not feeds["past_lens"].any() for feeds in fed)
    pieces = [
        feeds["input_ids"][start:end].tolist()
        for feeds in fed
        for start, end in zip(feeds["query_starts"][:-1], feeds["query_starts"][1:], strict=True)
    ]
    assert pieces == [window.tolist() for ids in exam.ids for window in windows(ids, 16)]


def test_a_fresh_step_gives_every_sequence_blocks_of_its_own() -> None:
    step = fresh_step([np.arange(40), np.arange(3), np.arange(32)], 16)
    assert step["block_table"].tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert step["query_starts"].tolist() == [0, 40, 43, 75]
    assert step["positions"].tolist() == [*range(40), *range(3), *range(32)]
    assert step["logit_rows"].tolist() == list(range(75))


def test_answers_come_back_from_a_bundle_s_file_as_they_were(tmp_path: Path) -> None:
    exam = asked(*(item(t, label=label) for t, label in zip(TEXTS, ("yes", "no", "no"), strict=True)))
    said = examined(exam, Bigrams())
    verify.write_reference(tmp_path / "generate.npz", exam, said)
    again = verify.read_reference(tmp_path / "generate.npz", exam)
    for name in ("scores", "top1", "positions", "kept_ids", "kept_logs"):
        np.testing.assert_array_equal(getattr(again, name), getattr(said, name))
    evidence = exams.judge(exam, [Margin("perplexity", 0.01, 0.95)], again, examined(exam.against(again), Bigrams()))
    assert (evidence[0].verdict, evidence[0].difference) == (Verdict.NON_INFERIOR, 0)
    assert {e.metric for e in evidence} == {
        "perplexity", "kl", "top1_agreement", "accuracy", "accuracy[no]", "accuracy[yes]", "harmful_flips"
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.write_checkpoint("llama", tmp_path_factory.mktemp("model"))


def dataset(*items: Item) -> Any:
    class Given:
        name = "given"

    found = Given()
    found.items = items  # type: ignore[attr-defined]
    return found


@pytest.mark.slow
def test_a_backend_s_step_model_is_judged_against_the_original_in_torch(folder: Path, tmp_path: Path) -> None:
    checkpoint = sources.resolve(f"path:{folder}", cache=tmp_path / "cache")
    program = decoders.simplified(folder)
    spec = program.graphs["generate"].spec
    (tmp_path / "assets").mkdir()
    llama.FAMILY.assets(checkpoint, decoders.OPTIONS, tmp_path / "assets")
    setting = exams.Setting({"generate": spec}, tmp_path / "assets", dataset(*map(item, TEXTS), item("x")), Path)
    exam = exams.of("generate", setting)
    assert isinstance(exam, DecoderExam)
    assert len(exam.items) == 3, "a text of one token predicts nothing"

    backend: Any = get("onnxruntime")
    typed = decoders.write_graph(program, tmp_path / "typed")
    (tmp_path / "out").mkdir()
    made = backend.build(typed, spec, Variant("fp32"), backend.probe("onnxruntime-cpu"), tmp_path / "out")
    model = backend.load_decoder(tmp_path / "out" / made.file, Variant("fp32"), 1, decoder.BLOCKS)
    with llama.FAMILY.reference(checkpoint, "generate", decoders.OPTIONS) as original:
        reference = examined(exam, original)
    with FreshSequence("generate", model) as lowered:
        candidate = examined(exam.against(reference), lowered)
    margins = [Margin(name, 0.2, 0.95) for name in ("perplexity", "kl")]
    evidence = exams.judge(exam, margins, reference, candidate)
    assert all(abs(e.difference) < 1e-4 for e in evidence)
    assert evidence[0].reference > 10
    worse = dataclasses.replace(candidate, values=[np.asarray(v, np.float64) - 0.5 for v in candidate.values])
    assert exams.judge(exam, margins, reference, worse)[0].difference == pytest.approx(1 - np.exp(0.5), rel=1e-3)


def test_data_without_texts_is_refused(tmp_path: Path) -> None:
    decoders.tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "decoder.json").write_text(json.dumps({"context": 64}))
    (tmp_path / "generation.json").write_text(json.dumps({"eos_ids": [2], "sampling": {}}))
    setting = exams.Setting({"generate": SPEC}, tmp_path, dataset(), Path)
    with pytest.raises(DataError, match="given holds no texts"):
        exams.of("generate", setting)
