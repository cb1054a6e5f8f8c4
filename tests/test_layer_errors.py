"""Layer errors: a layer that was damaged is the one that is named, and a healthy variant names none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from medcompile import bundle, onnx_files, report, verify
from medcompile.bundle import Bundle
from medcompile.errors import BackendUnavailable, UsageError
from medcompile.layer_errors import layer_errors
from tests import tiny
from tests.command_line import call
from tests.tiny import Workshop

DAMAGED = ["encoder.layer.0.attention.self.query/MatMul", "encoder.layer.1.intermediate.dense/MatMul"]


@pytest.fixture(scope="module")
def healthy(small: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """fp32, int8 and fp16 of the tiny model."""
    variants = "variants={fp32: {}, int8: {weights: int8, activations: int8}, fp16: {float: float16}}"
    return small.build(out=tmp_path_factory.mktemp("layers") / "tiny", overrides=[variants])


def data(small: Workshop) -> Path:
    return small.root / "calibration/held-out.yaml"


def damage(found: Bundle, variant: str, node: str, place: Path) -> Bundle:
    """A copy in which the weight of that layer lies mirrored, and everything else as it was."""
    import onnx_ir as ir

    model = onnx_files.load(found.root / f"graphs/{variant}/embed.onnx")
    (layer,) = [n for n in model.graph if n.name == node]
    weight = layer.inputs[1]
    assert weight is not None
    producer = weight.producer()
    stored = producer.inputs[0] if producer is not None else weight
    assert stored is not None and stored.const_value is not None
    turned = np.ascontiguousarray(stored.const_value.numpy()[::-1, ::-1])
    stored.const_value = ir.tensor(turned, name=stored.name)
    folder = place.with_name("graphs")
    folder.mkdir()
    onnx_files.save({"embed": model}, folder)
    files = {f"graphs/{variant}/{file.name}": file for file in folder.iterdir()}
    return bundle.rewrite(found, place, found.artifacts, files, told=report.texts)


@pytest.mark.parametrize("variant", ["int8", "fp16"])
@pytest.mark.parametrize("node", DAMAGED)
def test_a_planted_damage_is_the_first_layer_that_jumps(
    small: Workshop, healthy: Bundle, tmp_path: Path, variant: str, node: str
) -> None:
    before = tiny.contents(healthy.root)
    place = damage(healthy, variant, node, tmp_path / "damaged").root
    done = call("verify", place, "--data", data(small), "--layers", "--variant", variant)
    assert done.exit_code == 0, done.stderr
    assert f"{variant}, embed: the error first jumps at {node}\n" in done.stdout
    assert tiny.contents(healthy.root) == before


def test_healthy_variants_have_small_errors_and_no_jump(small: Workshop, healthy: Bundle) -> None:
    done = call("verify", healthy.root, "--data", data(small), "--layers", "--json")
    assert done.exit_code == 0, done.stderr
    found = {row["variant"]: row for row in json.loads(done.stdout)}
    assert set(found) == {"int8", "fp16"}
    assert {row["first_jump"] for row in found.values()} == {None}
    layers = {name: {e["node"]: e["error"] for e in row["layers"]} for name, row in found.items()}
    assert layers["int8"].keys() == layers["fp16"].keys() and set(DAMAGED) < layers["int8"].keys()
    for node in DAMAGED:
        assert 0 < layers["fp16"][node] < 0.005 < layers["int8"][node] < 0.3


def test_what_cannot_be_compared_is_told(small: Workshop, healthy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = verify.evaluation(healthy, data(small))
    for variant in ("fp32", "int3"):
        with pytest.raises(UsageError, match=f"no variant '{variant}' to hold against fp32"):
            layer_errors(healthy, variant, "embed", dataset)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(BackendUnavailable, match="onnx_ir") as caught:
        layer_errors(healthy, "int8", "embed", dataset)
    assert "medcompile[build]" in caught.value.fix
    alone = call("verify", healthy.root, "--data", data(small), "--variant", "int8")
    assert alone.exit_code == 2 and "--layers" in alone.stderr
