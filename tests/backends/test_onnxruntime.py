from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from medcompile import backends
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.run_onnx import run_onnx
from medcompile.spec import Variant
from tests import graphs

BACKEND = backends.for_target("onnxruntime-cpu")


def _build(variant: Variant, folder: Path) -> backends.Built:
    """With the library's own operators alone."""
    variant = dataclasses.replace(variant, compute=variant.compute | {"kernels": "onnxruntime"})
    out = folder / "out"
    out.mkdir()
    source = graphs.write(variant, folder / "typed")
    return BACKEND.build(source, graphs.SPEC, variant, BACKEND.probe("onnxruntime-cpu"), out)


def test_the_artifact_holds_no_operator_whose_kernel_is_a_scalar_loop(tmp_path: Path) -> None:
    _build(graphs.VARIANTS["static"], tmp_path)
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert {"MatMulIntegerToFloat", "LayerNormalization", "Gelu"} <= operators
    assert not {"SkipLayerNormalization", "BiasGelu", "DequantizeLinear"} & operators


def test_the_artifact_holds_no_layout_of_one_instruction_set(tmp_path: Path) -> None:
    _build(graphs.VARIANTS["static"], tmp_path)
    assert {n.domain for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node} <= {"", "com.microsoft"}


def test_notes_say_what_was_fused_and_which_settings_mean_nothing_here(tmp_path: Path) -> None:
    variant = Variant("fp32", compute={"float": "bfloat16"})
    notes = _build(variant, tmp_path).notes
    assert notes[0] == "fused: 0 static, 0 dynamic, 1 keys"
    assert "float=bfloat16" in notes[1]


def test_a_graph_that_the_library_refuses_is_a_backend_error(tmp_path: Path) -> None:
    source = graphs.write(graphs.VARIANTS["fp32"], tmp_path)
    model = onnx.load(source, load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, source)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BackendError, match="NoSuchOperator") as caught:
        BACKEND.build(source, graphs.SPEC, graphs.VARIANTS["fp32"], BACKEND.probe("onnxruntime-cpu"), out)
    assert caught.value.fix


def test_static_and_dynamic_stay_close_to_float(tmp_path: Path) -> None:
    results = {}
    for name in ("fp32", "dynamic", "mixed"):
        folder = tmp_path / name
        folder.mkdir()
        built = _build(graphs.VARIANTS[name], folder)
        with BACKEND.load(folder / "out" / built.file, graphs.SPEC, graphs.VARIANTS[name], built.target, 1) as executor:
            results[name] = executor.run(graphs.feeds(4, 24))["embedding"]
    assert 0 < np.abs(results["dynamic"] - results["fp32"]).max() < 0.05
    typed = next(run_onnx(graphs.typed(graphs.VARIANTS["mixed"]), iter([graphs.feeds(4, 24)]), ("embedding",)))
    assert np.abs(results["mixed"] - typed["embedding"]).max() < 0.05


def test_a_mixed_graph_has_each_form_where_it_belongs(tmp_path: Path) -> None:
    notes = _build(graphs.VARIANTS["mixed"], tmp_path).notes
    assert notes == ("fused: 2 static, 1 dynamic, 1 keys", "accuracy_level=4", "kernels=onnxruntime")
    nodes = {node.name: node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert sum(op == "MatMulNBits" for op in nodes.values()) >= 1
    assert nodes["attention.key/MatMul"] in ("MatMul", "FusedMatMul", "Gemm")


def test_a_missing_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable) as caught:
        BACKEND.probe("onnxruntime-cpu")
    assert "medcompile[cpu]" in caught.value.fix
