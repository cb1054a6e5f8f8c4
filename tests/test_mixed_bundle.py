"""Mixed precision by layer, end to end: from a recipe's keys to a bundle that says which layer has which format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import medcompile
from medcompile import bundle
from medcompile.errors import QuantizeError
from medcompile.spec import LayerRule, Precision
from tests import tiny
from tests.tiny import Workshop

MIXED = {
    "weights": "int8",
    "activations": "int8",
    "symmetric": False,
    "bias_correction": True,
    "layers": {
        "encoder.layer.1.*": "float",
        "*.intermediate.dense": {"weights": "int8", "activations": "int8", "dynamic": True},
        "*.output.dense": {"weights": "int4", "block_size": 16},
    },
}


def workshop(folder: Path, **variants: object) -> Workshop:
    tiny.write_checkpoint(folder / "model")
    tiny.write_data(folder / "calibration", "notes", tiny.records(48, 1), role="calibration")
    tiny.write_data(folder / "calibration", "held-out", tiny.records(40, 2))
    document = tiny.recipe(variants={"fp32": {}, **variants}, targets=["onnxruntime-cpu", "openvino-cpu"])
    recipe = tiny.write_recipe(folder, document)
    return Workshop(folder, recipe, folder / "cache", folder / "engines" / "tiny")


@pytest.mark.slow
def test_a_mixed_variant_is_built_judged_and_told_by_layer(tmp_path: Path) -> None:
    made = workshop(tmp_path, mixed=MIXED)
    made.build()
    found = bundle.read(made.bundle)
    assert found.variants["mixed"].layers[0] == LayerRule("encoder.layer.1.*")
    assert found.variants["mixed"].layers[2] == LayerRule("*.output.dense", Precision.INT4, block_size=16)
    assert {(a.target.name, a.verdict) for a in found.artifacts if a.variant == "mixed"} == {
        ("onnxruntime-cpu", "non-inferior"),
        ("openvino-cpu", "non-inferior"),
    }
    rows = json.loads((found.root / "layers.json").read_text())["mixed"]["embed"]
    table = {row["name"]: row["precision"] for row in rows}
    assert table["encoder.layer.0.attention.self.query/MatMul"] == "int8 x int8"
    assert table["encoder.layer.0.intermediate.dense/MatMul/integer"] == "int8 x int8, scales at run time"
    assert table["encoder.layer.0.output.dense/MatMul"] == "float32 x int4 weights"
    assert table["encoder.layer.0.attention.output.dense/MatMul"] == "float32 x int4 weights"
    assert {p for n, p in table.items() if n.startswith("encoder.layer.1.")} == {"float32"}
    answers = []
    for backend in ("onnxruntime", "openvino"):
        for variant in ("fp32", "mixed"):
            with medcompile.load(found.root, backend=backend, variant=variant) as session:
                answers.append(session.embed(["chest pain since monday"]))
    assert 0 < np.abs(answers[1] - answers[0]).max() < 0.1
    assert np.abs(answers[3] - answers[1]).max() < 0.05
    again = tiny.Events()
    made.build(progress=again)
    assert not again.began, "the variant's rules read back from the cache as they were"


def test_a_pattern_that_matches_no_linear_layer_is_an_error_of_the_build(tmp_path: Path) -> None:
    made = workshop(tmp_path, mixed=MIXED | {"layers": {"decoder.*": "float"}})
    with pytest.raises(QuantizeError, match=r"layers pattern 'decoder\.\*' matches no linear layer") as caught:
        made.build()
    assert "encoder.layer.0" in caught.value.fix
