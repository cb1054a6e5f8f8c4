"""What the contenders that are installed here answer on tiny models, beside the reference; the others are skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medcompile.bench import peers
from medcompile.bench.peer import MODEL, TEXT, Answer, Batch, Cell, Job
from tests import decoders, tiny
from tests.runtime import fakes

Array = np.ndarray[Any, Any]

TASKS = ("embed", "token-classification", "sequence-classification", "fill-mask")
EXACT = ("onnxruntime_fp32", "openvino_fp32")
ROUNDED = ("torch_bf16", "torch_int8", "onnxruntime_int8", "openvino_bf16", "openvino_int8", "openvino_throughput")
TEXTS = ("the patient denies chest pain", "no fever, kidney injury", "metformin", "chest pain no fever the patient")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tiny.write_checkpoint(tmp_path_factory.mktemp("bert"))


def feeds(rows: int, sequence: int, seed: int = 0) -> dict[str, Array]:
    """Ragged rows, padded: what a contender that forgets the mask gets wrong."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, len(fakes.VOCABULARY), (rows, sequence))
    lengths = random.integers(3, sequence + 1, rows)
    lengths[0] = sequence
    mask = (np.arange(sequence) < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def job(checkpoint: Path, work: Path, task: str = "embed") -> Job:
    cells = (Cell(3, 11), Cell(1, 7))
    calibration = work / "calibration.npz"
    np.savez(calibration, **feeds(24, 11, seed=1))
    return Job("bert", task, str(checkpoint), cells=cells, calibration=str(calibration), work=str(work), max_length=32)


def answers(name: str, asked: Job) -> list[Answer]:
    """The contender's answer to each cell, in order and then once more: state left behind would show."""
    peer = peers.get(name)
    option = peer.options(asked)[0]
    asked = replace(asked, option=option)
    if missing := peer.missing(asked):
        pytest.skip(f"{name}: {missing.reason}")
    peer.prepare(asked)
    runner = peer.open(asked)
    try:
        found = [runner.run(batch) for batch in (*batches(asked), *batches(asked))]
    finally:
        runner.close()
    half = len(found) // 2
    for first, again in zip(found[:half], found[half:], strict=True):
        if first.values is not None:
            np.testing.assert_array_equal(first.values, again.values)
    return found[:half]


def batches(asked: Job) -> list[Batch]:
    if asked.clock == TEXT:
        return [Batch(cell, items=TEXTS[: cell.batch]) for cell in asked.cells]
    if asked.task == "generate":
        random = np.random.default_rng(0)
        return [
            Batch(cell, {"input_ids": random.integers(3, decoders.VOCABULARY, (cell.batch, cell.sequence))})
            for cell in asked.cells
        ]
    found = []
    for cell in asked.cells:
        given = feeds(cell.batch, cell.sequence)
        if asked.task == "fill-mask":
            given["mask_position"] = np.arange(cell.batch) % 3
        found.append(Batch(cell, given))
    return found


def compared(name: str, reference: str, asked: Job, work: Path) -> list[tuple[Array, Array]]:
    """(the contender's, the reference's) values for each cell, real tokens alone."""
    (work / "reference").mkdir()
    theirs = answers(name, asked)
    right = answers(reference, replace(asked, work=str(work / "reference")))
    pairs = []
    for batch, a, b in zip(batches(asked), theirs, right, strict=True):
        assert a.values is not None and b.values is not None
        assert a.values.shape == b.values.shape
        assert a.values.dtype == b.values.dtype == np.float32
        real = batch.feeds["attention_mask"] > 0 if asked.task == "token-classification" else slice(None)
        pairs.append((a.values[real], b.values[real]))
    return pairs


def cosine(a: Array, b: Array) -> float:
    """The worst row's."""
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", EXACT)
def test_a_contender_in_float32_answers_as_torch_does(name: str, task: str, checkpoint: Path, tmp_path: Path) -> None:
    for theirs, right in compared(name, "torch_fp32", job(checkpoint, tmp_path, task), tmp_path):
        np.testing.assert_allclose(theirs, right, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_contender_in_lower_precision_answers_nearly_as_torch_does(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    for theirs, right in compared(name, "torch_fp32", job(checkpoint, tmp_path), tmp_path):
        assert cosine(theirs, right) > 0.97
        assert not np.array_equal(theirs, right)  # else nothing was rounded


@pytest.mark.slow
def test_torch_compile_answers_as_eager_torch_does(checkpoint: Path, tmp_path: Path) -> None:
    for theirs, right in compared("torch_compile", "torch_fp32", job(checkpoint, tmp_path), tmp_path):
        np.testing.assert_allclose(theirs, right, rtol=2e-3, atol=2e-4)


def test_pooling_by_the_first_token_reaches_every_export(checkpoint: Path, tmp_path: Path) -> None:
    asked = replace(job(checkpoint, tmp_path), pooling="cls")
    for theirs, right in compared("onnxruntime_fp32", "torch_fp32", asked, tmp_path):
        np.testing.assert_allclose(theirs, right, rtol=2e-3, atol=2e-4)


def test_the_pipelines_embeddings_are_torchs_of_the_same_tokens(checkpoint: Path, tmp_path: Path) -> None:
    asked = replace(job(checkpoint, tmp_path), clock=TEXT, cells=(Cell(4),))
    (found,) = answers("transformers_pipeline", asked)
    text = fakes.text_assets()
    for row, item in zip(found.values if found.values is not None else (), TEXTS, strict=True):
        ids = np.array([text.tokenizer.encode(item).ids])
        one = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        values = peers.get("torch_fp32").open(replace(asked, clock=MODEL)).run(Batch(Cell(1), one)).values
        assert values is not None
        np.testing.assert_allclose(row, values[0] / np.linalg.norm(values[0]), atol=1e-5)


def test_the_pipeline_gives_probabilities_in_the_order_of_the_labels(checkpoint: Path, tmp_path: Path) -> None:
    asked = replace(
        job(checkpoint, tmp_path, "sequence-classification"), clock=TEXT, cells=(Cell(4),), labels=("x", "y", "z")
    )
    (found,) = answers("transformers_pipeline", asked)
    assert found.values is not None
    assert found.values.shape == (4, 3)
    np.testing.assert_allclose(found.values.sum(1), 1, atol=1e-5)
    text = fakes.text_assets()
    ids = np.array([text.tokenizer.encode(TEXTS[0]).ids])
    one = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    logits = peers.get("torch_fp32").open(replace(asked, clock=MODEL)).run(Batch(Cell(1), one)).values
    assert logits is not None
    assert found.values[0].argsort().tolist() == logits[0].argsort().tolist()


def test_the_pipelines_entities_lie_on_words_of_the_text(checkpoint: Path, tmp_path: Path) -> None:
    asked = replace(job(checkpoint, tmp_path, "token-classification"), clock=TEXT, cells=(Cell(4),))
    (found,) = answers("transformers_pipeline", asked)
    assert len(found.spans) == 4
    assert any(found.spans)
    for spans, text in zip(found.spans, TEXTS, strict=True):
        for start, end, label in spans:
            assert label == "Disease"
            assert text[start:end].strip() == text[start:end] != ""


def test_generate_gives_as_many_tokens_as_asked_and_a_time_for_each(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = decoders.write_checkpoint("llama", tmp_path / "llama")
    asked = Job("llama", "generate", str(source), cells=(Cell(2, 9, 12), Cell(1, 5, 3)), work=str(tmp_path))
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for batch, found in zip(batches(asked), answers("transformers_generate", asked), strict=True):
        assert found.values is not None
        assert found.values.shape == (batch.cell.batch, batch.cell.new)
        assert found.first_ns > 0
        assert len(found.steps_ns) == batch.cell.new - 1
        assert min(found.steps_ns) > 0
        ids = batch.feeds["input_ids"]
        for k in range(batch.cell.new):  # the end token included: it means nothing
            with torch.inference_mode():
                logits = model(torch.from_numpy(ids)).logits[:, -1]
            chosen = logits.argmax(-1).numpy()
            np.testing.assert_array_equal(found.values[:, k], chosen)
            ids = np.concatenate([ids, chosen[:, None]], axis=1)
