"""The BERT family: every task and every age of checkpoint gives what transformers' own classes give."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from medcompile import sources
from medcompile.errors import ProfileError, SourceError, UsageError
from medcompile.models import bert
from medcompile.passes.export import export
from medcompile.sources import Checkpoint
from medcompile.spec import Axis, Profile
from tests import simplified, tiny
from tests.runtime import fakes

VOCABULARY = len(fakes.VOCABULARY)
# Random logits here are of size 1; fp32 in another order of summation stays far below.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
TEXTS = [
    "The patient denies chest pain, dyspnea (SOB) or fever.",
    "Caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u00dcber \u0130stanbul e\u0301",
    "\u60a3\u8005\u306f\u767a\u71b1 38.5\u2103 \u6297\u751f\u7269\u8d28",
    "ok \U0001f600 \U0001f9d1\u200d\u2695\ufe0f done",
    "tab\there\x00null\x07bell\u200bzero\u00a0nbsp\r\nline",
    "",
    "   ",
    "[MASK] of [CLS] and [SEP]",
    "5mg/kg q.d. x3 -- HbA1c=7.2%",
    "a" * 150,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "model")


def resolve(folder: Path) -> Checkpoint:
    return sources.resolve(f"path:{folder}")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("task", tiny.TASKS)
@pytest.mark.parametrize(("batch", "sequence"), [(3, 11), (1, 1), (1, tiny.POSITIONS), (8, 2)])
def test_each_task_answers_as_transformers_does(task: str, batch: int, sequence: int) -> None:
    given = simplified.feeds(batch, sequence, VOCABULARY, mask_position=task == "fill-mask")
    expected = simplified.of_transformers(simplified.checkpoint().folder, task, given)
    answer = simplified.run(simplified.simplified().graphs[task].model, given)
    real = given["attention_mask"].astype(bool) if task == "token-classification" else slice(None)
    np.testing.assert_allclose(answer[real], expected[real], **CLOSE)


@pytest.mark.parametrize("task", tiny.TASKS)
def test_the_reference_answers_as_transformers_does(task: str) -> None:
    given = simplified.feeds(3, 11, VOCABULARY, mask_position=task == "fill-mask")
    expected = simplified.of_transformers(simplified.checkpoint().folder, task, given)
    with bert.FAMILY.reference(simplified.checkpoint(), task, simplified.options()) as reference:
        (answer,) = reference.run(given).values()
    real = given["attention_mask"].astype(bool) if task == "token-classification" else slice(None)
    np.testing.assert_allclose(answer[real], expected[real], **CLOSE)


def test_cls_pooling_takes_the_first_token(folder: Path) -> None:
    program = export(bert.FAMILY, resolve(folder), simplified.options("embed", pooling="cls"))
    given = simplified.feeds(3, 9, VOCABULARY)
    expected = simplified.of_transformers(folder, "embed", given, pooling="cls")
    np.testing.assert_allclose(simplified.run(program.graphs["embed"].model, given), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_checkpoint_is_raised_to_float32(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    model = simplified.simplified_from(folder, "token-classification").graphs["token-classification"].model
    assert {str(v.dtype) for v in model.graph.initializers.values()} <= {"FLOAT", "INT64"}
    given = simplified.feeds(2, 9, VOCABULARY)
    expected = simplified.of_transformers(folder, "token-classification", given)
    real = given["attention_mask"].astype(bool)
    np.testing.assert_allclose(simplified.run(model, given)[real], expected[real], **CLOSE)


def test_an_old_bin_with_gamma_and_beta_and_no_prefix_gives_the_same_embeddings(folder: Path) -> None:
    given = simplified.feeds(2, 9, VOCABULARY)
    expected = simplified.of_transformers(folder, "embed", given)
    old = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("bert."):
            name = name.removeprefix("bert.")  # noqa: PLW2901
            old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
                tensor
            )
    old["embeddings.position_ids"] = torch.arange(tiny.POSITIONS)[None]
    (folder / "model.safetensors").unlink()
    torch.save(old, folder / "pytorch_model.bin")
    model = simplified.simplified_from(folder, "embed").graphs["embed"].model
    np.testing.assert_allclose(simplified.run(model, given), expected, **CLOSE)
    names = {node.name for node in model.graph}
    assert "encoder.layer.1.output.dense/MatMul" in names


def test_a_masked_word_head_that_is_stored_untied_is_used(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    decoder = torch.randn(tensors["bert.embeddings.word_embeddings.weight"].shape)
    tensors |= {"cls.predictions.decoder.weight": decoder, "cls.predictions.decoder.bias": torch.ones(VOCABULARY)}
    del tensors["cls.predictions.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = simplified.simplified_from(folder, "fill-mask").graphs["fill-mask"].model
    np.testing.assert_array_equal(
        model.graph.initializers["cls.predictions.decoder.weight.T"].const_value.numpy(), decoder.numpy().T
    )


@pytest.mark.parametrize("task", ["token-classification", "sequence-classification", "fill-mask"])
def test_a_checkpoint_without_the_task_s_head_is_refused(folder: Path, task: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if k.startswith("bert.") and "pooler" not in k}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(SourceError, match=f"no weights for {task}: .*(classifier|cls|pooler)"):
        export(bert.FAMILY, resolve(folder), simplified.options(task))


def test_weights_of_another_shape_than_the_config_says_are_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=48)
    with pytest.raises(SourceError, match=r"intermediate\.dense\.weight has shape \[64, 32\].*\[48, 32\]"):
        export(bert.FAMILY, resolve(folder), simplified.options("embed"))


def test_another_architecture_is_named(folder: Path) -> None:
    edit_config(folder, model_type="roberta")
    with pytest.raises(SourceError, match="this is a roberta model"):
        export(bert.FAMILY, resolve(folder), simplified.options("embed"))


def test_relative_positions_are_refused_rather_than_left_out(folder: Path) -> None:
    edit_config(folder, position_embedding_type="relative_key")
    with pytest.raises(SourceError, match="relative_key positions"):
        bert.FAMILY.graph_spec(resolve(folder), "embed", simplified.options("embed"))


def test_a_config_without_sizes_is_refused(folder: Path) -> None:
    edit_config(folder, hidden_size=None, vocab_size=None)
    with pytest.raises(SourceError, match="does not say hidden_size, vocab_size"):
        bert.FAMILY.graph_spec(resolve(folder), "embed", simplified.options("embed"))


def test_a_profile_longer_than_the_model_is_refused(folder: Path) -> None:
    profile = Profile("p", (Axis("batch", 1, 1, 1), Axis("sequence", 1, 8, tiny.POSITIONS + 1)))
    wanted = dataclasses.replace(simplified.options("embed"), profiles=(*simplified.PROFILES, profile))
    with pytest.raises(ProfileError, match="sequence up to 65 tokens, but the model has 64"):
        bert.FAMILY.graph_spec(resolve(folder), "embed", wanted)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, list(fakes.LABELS)),
        ({"id2label": None, "label2id": None}, ["LABEL_0", "LABEL_1"]),
        ({"id2label": None, "label2id": None, "num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {"10": "k", "9": "j", "2": "c"}}, ["c", "j", "k"]),
    ],
)
def test_labels_come_from_the_config(
    folder: Path, tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    edit_config(folder, **changes)
    bert.FAMILY.assets(resolve(folder), simplified.options("token-classification"), tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == expected
    spec = bert.FAMILY.graph_spec(resolve(folder), "token-classification", simplified.options())
    assert spec.outputs[0].shape == ("batch", "sequence", len(expected))


def test_labels_of_the_recipe_replace_those_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    wanted = simplified.options("token-classification", labels=("none", "begin", "inside"))
    bert.FAMILY.assets(resolve(folder), wanted, tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == ["none", "begin", "inside"]
    with pytest.raises(UsageError, match="names 2 labels, the checkpoint has 3"):
        bert.FAMILY.assets(resolve(folder), simplified.options("token-classification", labels=("a", "b")), tmp_path)


@pytest.mark.parametrize(("problem", "expected"), [("multi_label_classification", True), (None, False)])
def test_multi_label_models_are_marked(folder: Path, tmp_path: Path, problem: str | None, expected: bool) -> None:
    edit_config(folder, problem_type=problem)
    bert.FAMILY.assets(resolve(folder), simplified.options("sequence-classification"), tmp_path)
    text = json.loads((tmp_path / "text.json").read_text())
    assert text["multi_label"] is expected
    assert (text["max_length"], text["mask_token"]) == (tiny.POSITIONS, "[MASK]")


def vocabulary(cased: bool) -> list[str]:
    letters = {c for text in TEXTS for c in text if not c.isspace() and c.isprintable()} | set(
        "abcdefghijklmnopqrstuvwxyz"
    )
    if cased:
        letters |= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    else:
        letters = {c for c in letters if c == c.lower()}
    words = ["the", "patient", "chest", "pain", "caf", "##e", "ang", "##strom"] + (
        ["The", "Caf", "HbA"] if cased else []
    )
    pieces = [p for c in sorted(letters) for p in (c, f"##{c}")]
    return [*fakes.SPECIAL, *dict.fromkeys(words + pieces)]


@pytest.mark.parametrize("cased", [True, False])
@pytest.mark.parametrize("said", [True, False], ids=["settings", "no settings"])
def test_a_vocabulary_alone_tokenizes_as_transformers_does(
    folder: Path, tmp_path: Path, cased: bool, said: bool
) -> None:
    import transformers

    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(vocabulary(cased)) + "\n", encoding="utf-8")
    if said:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not cased}))
    notes = bert.FAMILY.assets(resolve(folder), simplified.options("embed"), tmp_path)
    assert bool(notes) is not said
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words = {word: i for i, word in enumerate(vocabulary(cased))}
    theirs = transformers.BertTokenizer(vocab=words, do_lower_case=not cased)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)
    first, second = TEXTS[:2]
    assert ours.encode(first, second).type_ids == theirs(first, second)["token_type_ids"]


def test_a_vocabulary_with_crlf_lines_is_read_as_without(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_bytes("\r\n".join(vocabulary(cased=False)).encode() + b"\r\n")
    bert.FAMILY.assets(resolve(folder), simplified.options("embed"), tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode("the patient").tokens == ["[CLS]", "the", "patient", "[SEP]"]


@pytest.mark.slow
def test_trained_sentence_embeddings_are_equal(minilm: Path) -> None:
    given = simplified.feeds(4, 48, 30000)
    given["token_type_ids"][:] = 0
    model = simplified.simplified_from(minilm, "embed").graphs["embed"].model
    expected = simplified.of_transformers(minilm, "embed", given)
    np.testing.assert_allclose(simplified.run(model, given), expected, atol=5e-6, rtol=0)


@pytest.mark.slow
def test_trained_token_labels_are_equal_on_every_token(shared: Path) -> None:
    folder = shared / "models/minilm-ner"
    given = simplified.feeds(4, 48, 20000)
    given["token_type_ids"][:] = 0
    model = simplified.simplified_from(folder, "token-classification").graphs["token-classification"].model
    expected = simplified.of_transformers(folder, "token-classification", given)
    answer = simplified.run(model, given)
    real = given["attention_mask"].astype(bool)
    np.testing.assert_allclose(answer[real], expected[real], atol=5e-5, rtol=0)
    assert (answer[real].argmax(-1) == expected[real].argmax(-1)).all()
