"""Checkpoints that come quantized, end to end: weights: stored in a bundle, judged against the dequantized ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import medcompile
from medcompile import bundle
from medcompile.runtime.sampling import Sampling
from tests import decoders, quantized_checkpoints, tiny
from tests.tiny import Workshop


@pytest.mark.slow
def test_a_stored_variant_is_judged_says_what_it_is_and_generates(tmp_path: Path) -> None:
    quantized_checkpoints.write("awq", tmp_path / "model")
    tiny.write_data(tmp_path / "calibration", "held-out", tiny.records(40, 2))
    recipe = tiny.write_recipe(
        tmp_path,
        tiny.recipe(
            model={"family": "llama", "tasks": ["generate"], "source": "path:../model"},
            shapes={"batch": [1, 4, 8], "sequence": [1, 32, decoders.POSITIONS]},
            budget={"perplexity": {"max_drop": 0.5}, "top1_agreement": {"max_drop": 0.9}},
            variants={"fp32": {}, "awq": {"weights": "stored"}},
            calibration=None,
            targets=["onnxruntime-cpu", "openvino-cpu"],
        ),
    )
    Workshop(tmp_path, recipe, tmp_path / "cache", tmp_path / "engines" / "tiny").build()
    found = bundle.read(tmp_path / "engines" / "tiny")
    judged = {(a.variant, a.target.name): a.verdict for a in found.artifacts}
    assert judged == dict.fromkeys(
        ((v, t) for v in ("fp32", "awq") for t in ("onnxruntime-cpu", "openvino-cpu")), "non-inferior"
    )
    told = json.loads((found.root / "bundle.json").read_text())["provenance"]
    assert "quantized/model.safetensors" in told["source_files"]
    assert any("came quantized by awq" in note for note in told["notes"])
    table = json.loads((found.root / "layers.json").read_text())["awq"]["generate"]
    assert {row["precision"] for row in table if row["name"].endswith("_proj/MatMul")} == {"float32 x int4 weights"}
    weights = {v: (found.root / f"graphs/{v}/weights.bin").stat().st_size for v in ("fp32", "awq")}
    assert weights["awq"] < weights["fp32"] / 2
    with medcompile.load(found.root, backend="onnxruntime", variant="awq") as session:
        (done,) = session.generate(["chest pain"], Sampling(max_tokens=8))
    assert len(done.token_ids) > 0
