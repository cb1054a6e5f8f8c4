"""Encoders on ONNX Runtime with our own kernels as its operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from medcompile import backends
from medcompile.errors import BackendError, BackendUnavailable
from medcompile.kernels import native
from medcompile.run_onnx import run_onnx
from medcompile.spec import Precision, Variant
from tests import graphs

if not native.available():
    pytest.skip("medcompile was installed without a C++ compiler", allow_module_level=True)

BACKEND = backends.for_target("onnxruntime-cpu")
FLOATS: dict[str, Any] = {"kernels": "medcompile", "attention": "float32"}
DYNAMIC = Variant("dynamic", weights=Precision.INT8, activations=Precision.INT8, dynamic=True, compute=FLOATS)
BLOCKS = Variant("blocks", weights=Precision.INT8, block_size=32, compute=FLOATS)


def built(folder: Path, variant: Variant) -> backends.Built:
    (folder / "out").mkdir(parents=True)
    source = graphs.write(variant, folder / "typed")
    return BACKEND.build(source, graphs.SPEC, variant, BACKEND.probe("onnxruntime-cpu"), folder / "out")


def run(folder: Path, made: backends.Built, variant: Variant, threads: int = 1) -> np.ndarray[Any, Any]:
    path = folder / "out" / made.file
    with BACKEND.load(path, graphs.SPEC, variant, made.target, threads) as executor:
        return executor.run(graphs.feeds(4, 24))["embedding"]


@pytest.mark.parametrize("threads", [1, 2])
def test_dynamic_int8_is_the_typed_graph_s(threads: int, tmp_path: Path) -> None:
    made = built(tmp_path, DYNAMIC)
    assert "kernels=medcompile" in made.notes and "attention=float32" in made.notes
    right = next(run_onnx(graphs.typed(DYNAMIC), iter([graphs.feeds(4, 24)]), ("embedding",)))["embedding"]
    # A code may round to its other neighbour; nothing else differs.
    np.testing.assert_allclose(run(tmp_path, made, DYNAMIC, threads), right, atol=2e-3)
    operators = Counter(n.op_type for n in onnx.load(tmp_path / "out" / made.file, load_external_data=False).graph.node)
    # Query, key and value are one product, each of the others has its bias, and one its Gelu.
    assert operators["BiasedMatMulInt8"] == 4
    assert operators["MaskedSelfAttention"] == 1
    assert not {"Softmax", "Gelu", "MatMul", "MatMulInteger", "Transpose", "QuantizeLinear"} & set(operators)


def test_a_product_without_a_bias_is_ours_too(tmp_path: Path) -> None:
    source = graphs.write(DYNAMIC, tmp_path / "typed")
    model = onnx.load(source)
    for node in model.graph.node:
        if node.name == "attention.key/Add":  # its product's result goes on as it is, and the sum stays an operator
            model.graph.output.append(onnx.helper.make_tensor_value_info(node.input[0], 1, None))
    onnx.save(model, source)
    (tmp_path / "out").mkdir()
    made = BACKEND.build(source, graphs.SPEC, DYNAMIC, BACKEND.probe("onnxruntime-cpu"), tmp_path / "out")
    operators = Counter(n.op_type for n in onnx.load(tmp_path / "out" / made.file, load_external_data=False).graph.node)
    assert operators["MatMulInt8"] == 1
    right = next(run_onnx(graphs.typed(DYNAMIC), iter([graphs.feeds(4, 24)]), ("embedding",)))["embedding"]
    np.testing.assert_allclose(run(tmp_path, made, DYNAMIC), right, atol=2e-3)


def test_int8_weights_in_blocks_meet_activations_rounded_block_by_block(tmp_path: Path) -> None:
    made = built(tmp_path, BLOCKS)
    right = next(run_onnx(graphs.typed(BLOCKS), iter([graphs.feeds(4, 24)]), ("embedding",)))["embedding"]
    assert 0 < np.abs(run(tmp_path, made, BLOCKS) - right).max() < 0.03
    operators = Counter(n.op_type for n in onnx.load(tmp_path / "out" / made.file, load_external_data=False).graph.node)
    assert operators["BiasedMatMulInt8"] == 4


def test_bfloat16_attention_is_the_default_and_changes_little(tmp_path: Path) -> None:
    rounded = Variant("dynamic", weights=Precision.INT8, activations=Precision.INT8, dynamic=True)
    made = built(tmp_path / "rounded", rounded)
    assert "attention=bfloat16" in made.notes
    exact = run(tmp_path / "exact", built(tmp_path / "exact", DYNAMIC), DYNAMIC)
    assert np.abs(run(tmp_path / "rounded", made, rounded) - exact).max() < 0.03


@pytest.mark.parametrize("variant", ["fp32", "static", "weights"])
def test_an_artifact_without_our_products_is_the_library_s_own(variant: str, tmp_path: Path) -> None:
    made = built(tmp_path, graphs.VARIANTS[variant])
    assert made.file == "model.onnx"
    assert not any("attention" in note for note in made.notes)
    assert {n.domain for n in onnx.load(tmp_path / "out" / made.file).graph.node} <= {"", "com.microsoft"}


def test_a_mask_between_queries_and_keys_is_left_to_the_library(tmp_path: Path) -> None:
    source = graphs.write(DYNAMIC, tmp_path / "typed")
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name == "axes":  # [batch, tokens, 1, 1]: one number per query
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))
    onnx.save(model, source)
    (tmp_path / "out").mkdir()
    made = BACKEND.build(source, graphs.SPEC, DYNAMIC, BACKEND.probe("onnxruntime-cpu"), tmp_path / "out")
    operators = {n.op_type for n in onnx.load(tmp_path / "out" / made.file, load_external_data=False).graph.node}
    assert {"Softmax", "BiasedMatMulInt8"} <= operators
    assert "MaskedSelfAttention" not in operators


def test_an_attention_that_nobody_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"compute\.attention is 'int8'"):
        built(tmp_path, Variant("fp32", compute={"attention": "int8"}))


def test_without_the_compiled_library_an_artifact_that_needs_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = built(tmp_path, DYNAMIC)
    native.library.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    try:
        with pytest.raises(BackendUnavailable, match=r"install a C\+\+17 compiler"):
            run(tmp_path, made, DYNAMIC)
    finally:
        native.library.cache_clear()
