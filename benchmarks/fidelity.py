"""How close int8 embeddings stay to fp32: medcompile's variants beside ONNX Runtime's and NNCF's own quantization.

    python benchmarks/fidelity.py BUNDLE DATA_FOLDER [--out benchmarks/results/fidelity.md]

BUNDLE: built from recipes/quickstart.yaml. DATA_FOLDER: holds text/pubmedqa_dev.jsonl, medquad_sample.jsonl and
mts_dialog_train.jsonl (calibration/*.yaml name their public sources). Cosine of mean-pooled, normalized embeddings to
the same model in torch fp32, on sentences drawn from all three; the peers are calibrated on the same project data as
the bundle. A peer that is not installed is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import medcompile
from medcompile import bundle
from medcompile.runtime.text import TextAssets

SENTENCES = 400
CALIBRATION = 256
SOURCES = {
    "pubmedqa_dev.jsonl": "context",
    "medquad_sample.jsonl": "answer",
    "mts_dialog_train.jsonl": "section_text",
}


def sentences(folder: Path) -> list[str]:
    """The same draw every time: up to 8 to 60 words, whole sentences."""
    found = []
    for name, field in SOURCES.items():
        for line in (folder / "text" / name).open(encoding="utf-8"):
            found += [s.strip() + "." for s in json.loads(line)[field].replace("\n", " ").split(". ")]
    kept = sorted({s for s in found if 8 <= len(s.split()) <= 60})
    return random.Random(0).sample(kept, SENTENCES)


def batches(text: TextAssets, texts: list[str]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(texts), 8):
        encoded = text.tokenizer.encode_batch(texts[start : start + 8])
        length = max(len(e.ids) for e in encoded)
        ids = np.array([e.ids + [0] * (length - len(e.ids)) for e in encoded], np.int64)
        mask = np.array([[1] * len(e.ids) + [0] * (length - len(e.ids)) for e in encoded], np.int64)
        yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def normalized(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def over(run: Callable[[dict[str, Any]], Any], text: TextAssets, texts: list[str]) -> Any:
    return normalized(np.concatenate([run(feeds) for feeds in batches(text, texts)]))


def reference(folder: Path, text: TextAssets, texts: list[str]) -> Any:
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()

    def run(feeds: dict[str, Any]) -> Any:
        with torch.inference_mode():
            hidden = model(**{k: torch.from_numpy(v) for k, v in feeds.items()}).last_hidden_state.numpy()
        mask = feeds["attention_mask"][:, :, None]
        return (hidden * mask).sum(1) / mask.sum(1)

    return over(run, text, texts)


def onnxruntime_peers(
    graph: Path, text: TextAssets, calibration: list[str]
) -> Iterator[tuple[str, Callable[..., Any]]]:
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = batches(text, calibration)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    folder = Path(tempfile.mkdtemp())
    extra = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
    for name, per_channel in (("ONNX Runtime dynamic, per channel", True), ("ONNX Runtime dynamic, default", False)):
        file = folder / f"dynamic{per_channel}.onnx"
        quantize_dynamic(
            graph,
            file,
            per_channel=per_channel,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            extra_options=extra,
        )
        yield name, _session(ort, file)
    # The library's percentile and entropy calibrators want every batch of one shape, which text does not have.
    file = folder / "static.onnx"
    quantize_static(
        graph,
        file,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"MatMulConstBOnly": True},
    )
    yield "ONNX Runtime static Q/DQ, minmax", _session(ort, file)


def _session(ort: Any, file: Path) -> Callable[..., Any]:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return lambda feeds: session.run(None, {k: v for k, v in feeds.items() if k in names})[0]


def nncf_peer(graph: Path, text: TextAssets, calibration: list[str]) -> Iterator[tuple[str, Callable[..., Any]]]:
    import nncf
    import openvino

    core = openvino.Core()
    dataset = nncf.Dataset(list(batches(text, calibration)))
    model = nncf.quantize(
        core.read_model(graph), dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration) // 8
    )
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    yield "OpenVINO NNCF PTQ", lambda feeds: compiled(feeds)[0]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--model", type=Path, required=True, help="the checkpoint's folder, for the reference")
    arguments.add_argument("--notes", type=Path, default=Path("calibration/clinical-notes.jsonl"))
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()

    texts = sentences(given.data)
    found = bundle.read(given.bundle)
    text = TextAssets.read(found.root / "assets")
    expected = reference(given.model, text, texts)
    rows: list[tuple[str, str, str, str]] = []

    def judge(name: str, values: Any) -> None:
        cosine = (values * expected).sum(axis=1)
        nearest = [np.argsort(-(m @ m.T), axis=1)[:, 1] for m in (values, expected)]
        rows.append((name, f"{cosine.mean():.5f}", f"{cosine.min():.5f}", f"{(nearest[0] == nearest[1]).mean():.3f}"))

    for artifact in found.artifacts:
        with medcompile.load(given.bundle, backend=artifact.target.name, variant=artifact.variant) as session:
            judge(f"medcompile {artifact.variant}, {artifact.target.name}", session.embed(texts))
    notes = [json.loads(line)["text"] for line in given.notes.open(encoding="utf-8")]
    calibration = random.Random(0).sample(notes, CALIBRATION)
    graph = found.root / "graphs/fp32/embed.onnx"
    for peers in (onnxruntime_peers, nncf_peer):
        try:
            for name, run in peers(graph, text, calibration):
                judge(name, over(run, text, texts))
        except ImportError as error:
            rows.append((peers.__name__, f"not installed: {error}", "", ""))
    lines = [
        "# Fidelity of int8 embeddings",
        "",
        f"all-MiniLM-L6-v2, {SENTENCES} sentences drawn from PubMedQA, MedQuAD and MTS-Dialog; cosine to torch fp32 of",
        f"mean-pooled, normalized vectors. Static ones are calibrated on {CALIBRATION} of the project's clinical",
        "notes, none of which comes from these corpora. Made by `benchmarks/fidelity.py`.",
        "",
        "| method | cosine, mean | worst | same nearest neighbour |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
