from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from medcompile.errors import BundleError, InputError, UsageError
from medcompile.runtime.encoder import Encoder
from tests.runtime.fakes import HIDDEN, LABELS, VOCABULARY, WORDS, FakeExecutor, spec, text_assets

TASKS = ("embed", "token-classification", "sequence-classification", "fill-mask")


def encoder(max_length: int = 64, tasks: tuple[str, ...] = TASKS, **facts: Any) -> Encoder:
    graphs = {t: spec(t, sequence=(4, 16, max_length)) for t in tasks}
    executors = {t: FakeExecutor(g) for t, g in graphs.items()}
    return Encoder(text_assets(max_length, **facts), executors, graphs, LABELS)


def note(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(["the", "patient", "kidney", "metformin", "xyz", ",", "fever."]) for _ in range(words))


def alone(task: str, text: str, pair: str | None = None) -> Any:
    """What the executor answers for the whole text as one unpadded row."""
    assets = text_assets()
    e = assets.tokenizer.encode(text) if pair is None else assets.tokenizer.encode(text, pair)
    feeds = {
        "input_ids": np.array([e.ids], np.int64),
        "attention_mask": np.ones((1, len(e.ids)), np.int64),
        "token_type_ids": np.array([e.type_ids], np.int64),
    }
    (answer,) = FakeExecutor(spec(task, sequence=(1, 16, 9000))).run(feeds).values()
    return answer[0]


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_embeddings_come_back_in_order_whatever_the_lengths_of_their_batch_mates() -> None:
    texts = [note(n, n) for n in (9, 0, 20, 3, 1, 15, 20, 2, 7, 11, 4)]
    got = encoder().embed(texts)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [alone("embed", t) for t in texts], rtol=1e-6)


def test_rows_that_only_fill_a_batch_up_to_the_profiles_min_do_not_count() -> None:
    graph = spec("embed", batch=(4, 4, 8))
    got = Encoder(text_assets(), {"embed": FakeExecutor(graph)}, {"embed": graph}).embed(["chest pain", "", "no"])
    np.testing.assert_allclose(got, [alone("embed", t) for t in ("chest pain", "", "no")], rtol=1e-6)


def test_a_single_text_embeds_to_one_row_and_no_text_to_none() -> None:
    assert encoder().embed("chest pain").shape == (1, HIDDEN)
    assert encoder().embed([]).shape == (0, HIDDEN)


@pytest.mark.parametrize("empty", ["", " \n\t", "\x00\x07", b""])
def test_an_empty_text_embeds_to_the_special_tokens_alone(empty: str | bytes) -> None:
    (row,) = encoder().embed([empty])
    np.testing.assert_allclose(row, FakeExecutor(spec("embed")).table[[2, 3]].mean(0), rtol=1e-6)


def test_embeddings_have_unit_length_where_the_model_says_so() -> None:
    texts = ["chest pain", "", note(300)]
    got = encoder(normalize=True).embed(texts)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
    plain = encoder().embed(texts)
    np.testing.assert_allclose(got, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5)


def test_a_long_texts_embedding_is_the_mean_of_its_windows_by_owned_tokens() -> None:
    text = note(150)
    e = encoder()
    tokens = e.text.encode([text])[0]
    windows = e.text.windows(0, tokens, 64)
    assert len(windows) > 2
    table = FakeExecutor(spec("embed")).table
    expected = np.average(
        [table[w.ids].mean(0) for w in windows], axis=0, weights=[w.own[1] - w.own[0] for w in windows]
    )
    np.testing.assert_allclose(e.embed([text, "pain"])[0], expected, rtol=1e-5)


def test_entities_of_a_long_note_are_those_of_a_model_without_a_window() -> None:
    text = note(1500, 4) + " Metformin\U0001f600 no  fever"
    windowed, whole = encoder(64).extract(text), encoder(9000).extract(text)
    assert len(windowed) > 50
    assert [(e.label, e.start, e.end) for e in windowed] == [(e.label, e.start, e.end) for e in whole]
    np.testing.assert_allclose([e.score for e in windowed], [e.score for e in whole], rtol=1e-6)
    assert all(e.text == text[e.start : e.end] and e.label == "Disease" for e in windowed)


def test_entity_offsets_are_characters_of_the_original_text() -> None:
    text = "\U0001f600 Jos\u00e9\x00, the  PATIENT\r\n\tdenies\u3000chest-pain \U0001f468\u200d\U0001f469 no fever"
    entities = encoder().extract(text)
    assert entities
    assert entities == encoder().extract(text.encode())
    words = {"\U0001f600", "Jos\u00e9", "PATIENT", "denies", "chest", "pain", "fever", "no", "the", ",", "-"}
    for entity in entities:
        assert text[entity.start : entity.end] == entity.text == entity.text.strip()
        assert entity.text.split()[0].split("-")[0] in words or entity.text[0] in ",-\U0001f468"


def test_extract_gives_one_list_for_a_text_and_a_list_of_lists_for_several() -> None:
    e = encoder()
    text = note(12)
    assert e.extract([text, "", "kidney injury"]) == [e.extract(text), [], e.extract("kidney injury")]
    assert e.extract("") == e.extract("  ") == e.extract(b"") == []
    assert e.extract([]) == []


def test_the_tokens_labels_are_the_models_own() -> None:
    text = "the patient denies chest pain"
    logits = alone("token-classification", text)[1:-1]
    labels, sure = encoder().label_words([text.split()])
    assert labels[0].tolist() == logits.argmax(1).tolist()
    assert sure[0] == pytest.approx(np.array([softmax(row).max() for row in logits]), rel=1e-5)


def test_each_word_is_labelled_by_its_first_token_and_a_word_without_tokens_is_outside() -> None:
    got, sure = encoder().label_words([["metformin", "", "\u200b", "pain"], [], ["\x00"], ["kidney"] * 200])
    logits = alone("token-classification", "metformin pain")[1:-1]  # met ##form ##in pain
    assert got[0].tolist() == [logits[0].argmax(), 0, 0, logits[3].argmax()]
    assert [len(g) for g in got] == [4, 0, 1, 200]
    assert got[2].tolist() == [0]
    assert sure[0].tolist()[1:3] == [1.0, 1.0]
    assert sure[0][3] == pytest.approx(softmax(logits[3]).max(), rel=1e-5)
    assert [len(s) for s in sure] == [4, 0, 1, 200]
    assert all(g.dtype == np.int64 for g in got)


def test_words_beyond_the_window_are_labelled_as_by_a_model_without_one() -> None:
    sentences = [note(n, n).split() for n in (5, 400, 80)]
    for short, whole in zip(
        encoder(64).label_words(sentences)[0], encoder(9000).label_words(sentences)[0], strict=True
    ):
        assert short.tolist() == whole.tolist()
    assert len(set(encoder().label_words(sentences)[0][1].tolist())) == 3


def test_classes_come_most_probable_first_and_add_up_to_one() -> None:
    texts = ["chest pain", "no fever", ""]
    for text, scores in zip(texts, encoder().classify(texts), strict=True):
        expected = dict(zip(LABELS, softmax(alone("sequence-classification", text)), strict=True))
        assert {s.label: s.score for s in scores} == pytest.approx(expected, rel=1e-5)
        assert [s.score for s in scores] == sorted((s.score for s in scores), reverse=True)
        assert sum(s.score for s in scores) == pytest.approx(1)
    classes, sure = encoder().class_ids(texts)
    assert classes.tolist() == [alone("sequence-classification", t).argmax() for t in texts]
    assert sure.tolist() == pytest.approx([s[0].score for s in encoder().classify(texts)], rel=1e-6)


def test_a_multi_label_model_gives_each_class_its_own_probability() -> None:
    (scores,) = encoder(multi_label=True).classify("chest pain")
    expected = 1 / (1 + np.exp(-alone("sequence-classification", "chest pain")))
    assert {s.label: s.score for s in scores} == pytest.approx(dict(zip(LABELS, expected, strict=True)), rel=1e-5)


def test_pairs_are_classified_together_and_their_order_matters() -> None:
    e = encoder()
    (scores,) = e.classify("kidney injury", "no fever")
    expected = softmax(alone("sequence-classification", "kidney injury", "no fever"))
    assert {s.label: s.score for s in scores} == pytest.approx(dict(zip(LABELS, expected, strict=True)), rel=1e-5)
    assert scores != e.classify("no fever", "kidney injury")[0]
    with pytest.raises(InputError, match="2 texts but 1 pairs"):
        e.classify(["a", "b"], ["c"])


def test_a_long_texts_classes_are_the_mean_of_its_windows_probabilities() -> None:
    text = note(200)
    e = encoder()
    windows = e.text.windows(0, e.text.encode([text])[0], 64)
    table = FakeExecutor(spec("sequence-classification")).table
    expected = np.average([softmax(table[w.ids].mean(0)) for w in windows], axis=0, weights=[w.weight for w in windows])
    (scores,) = e.classify([text])
    assert {s.label: s.score for s in scores} == pytest.approx(dict(zip(LABELS, expected, strict=True)), rel=1e-5)


def test_each_mask_is_filled_from_its_own_place() -> None:
    text = "the [MASK] denies [MASK]"
    filled = encoder().fill_mask(text, top_k=3)
    whole = FakeExecutor(spec("fill-mask", sequence=(1, 16, 64)))
    ids = text_assets().tokenizer.encode(text).ids
    assert len(filled) == 2
    for position, fills in zip([2, 4], filled, strict=True):
        feeds = {n: np.array([ids]) for n in ("input_ids",)} | {
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "token_type_ids": np.zeros((1, len(ids)), np.int64),
            "mask_position": np.array([position]),
        }
        logits = whole.run(feeds)["logits"][0]
        assert [f.token_id for f in fills] == np.argsort(-logits)[:3].tolist()
        assert [f.score for f in fills] == pytest.approx(np.sort(softmax(logits))[::-1][:3].tolist(), rel=1e-5)
        assert [f.token for f in fills] == [VOCABULARY[f.token_id] for f in fills]
    assert encoder().mask_ids([text, "[MASK]"]).shape == (3,)


def test_masks_deep_in_a_long_note_are_filled_as_by_a_model_without_a_window() -> None:
    words = note(600, 2).split()
    for at in (0, 41, 42, 47, 48, 300, 599):
        words[at] = "[MASK]"
    text = " ".join(words)
    got = encoder(64).mask_ids([text, "no [MASK]"])
    assert got.tolist() == encoder(9000).mask_ids([text, "no [MASK]"]).tolist()
    assert len(set(got.tolist())) > 2
    assert len(encoder().fill_mask(text)) == 7


def test_top_k_is_bounded_by_the_vocabulary_and_must_be_positive() -> None:
    (fills,) = encoder().fill_mask("[MASK]", top_k=10_000)
    assert len(fills) == len(VOCABULARY)
    assert sum(f.score for f in fills) == pytest.approx(1)
    with pytest.raises(UsageError, match="top_k is 0"):
        encoder().fill_mask("[MASK]", top_k=0)


@pytest.mark.parametrize("text", ["", "no mask here", "[mask"])
def test_a_text_without_a_mask_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=r"text 0 has no \[MASK\]"):
        encoder().fill_mask(text)


def test_fill_mask_takes_one_text() -> None:
    with pytest.raises(InputError, match="takes one text, not 2"):
        encoder().fill_mask(["[MASK]", "[MASK]"])  # type: ignore[arg-type]


def test_a_task_the_bundle_lacks_is_a_usage_error_that_names_those_it_has() -> None:
    with pytest.raises(UsageError, match=r"no task fill-mask here; the tasks are: embed, token-classification"):
        encoder(tasks=("embed", "token-classification")).fill_mask("[MASK]")


def test_labels_that_do_not_fit_the_graph_are_refused() -> None:
    graph = spec("token-classification")
    with pytest.raises(BundleError, match=r"has 3 classes, but labels\.json names 1"):
        Encoder(text_assets(), {}, {graph.name: graph}, ["O"])


def test_bad_input_is_found_before_the_model_runs() -> None:
    e = encoder()
    for bad in (["fine", 3], b"\xff", ["\ud800"], None):
        for call in (e.embed, e.extract, e.classify, e.fill_mask):
            with pytest.raises(InputError):
                call(bad)  # type: ignore[arg-type]
    assert all(not x.shapes for x in e._executors.values())  # type: ignore[attr-defined]


def test_a_note_of_one_megabyte_runs_in_thousands_of_bounded_batches() -> None:
    line = " ".join(WORDS[:7]) + "\n"
    text = line * (1_000_000 // len(line) + 1)
    e = encoder()
    assert len(text) > 1_000_000
    entities = e.extract(text)
    shapes = e._executors["token-classification"].shapes  # type: ignore[attr-defined]
    assert sum(rows for rows, _ in shapes) > 2_000
    assert max(rows * length for rows, length in shapes) <= 8 * 64
    assert entities[-1].end > len(text) - 60
    assert e.embed(text).shape == (1, HIDDEN)


def test_a_megabyte_without_a_space_runs_too() -> None:
    assert encoder().embed("x" * 1_000_000).shape == (1, HIDDEN)
