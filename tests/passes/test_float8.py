"""FP8 in the typed graph: what is stored, and what the graph says when it runs."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from medcompile import onnx_files
from medcompile.errors import QuantizeError
from medcompile.passes.linear import linear_groups
from medcompile.passes.quantize import Quantize
from medcompile.program import Context, Graph, Program, Silent
from medcompile.spec import Precision, Stage, Variant
from medcompile.statistics import Observer
from tests import graphs

FP8 = Variant("fp8", weights=Precision.FLOAT8, activations=Precision.FLOAT8)


def _quantized(variant: Variant = FP8) -> ir.Model:
    model, random = graphs.encoder(), np.random.default_rng(3)
    statistics = {}
    for group in linear_groups(model):
        observer = Observer()
        observer.add(random.standard_normal((64, group.channels)).astype(np.float32) * 2)
        statistics[group.tensor] = observer.statistics()
    graph = Graph(graphs.SPEC, model)
    program = Program("bert", {graph.name: graph}, Stage.SIMPLIFIED, {graph.name: statistics})
    return Quantize()(program, Context(Path(), Silent(), variant)).graphs[graph.name].model


def _run(model: ir.Model, folder: Path) -> np.ndarray:
    onnx_files.save({"graph": model}, folder)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(folder / "graph.onnx"), options, providers=["CPUExecutionProvider"])
    embedding: np.ndarray = session.run(None, graphs.feeds())[0]
    return embedding


def test_every_weight_is_e4m3_and_its_largest_magnitude_is_the_largest_number() -> None:
    weights = {
        name: value.const_value.numpy()
        for name, value in _quantized().graph.initializers.items()
        if name.endswith("MatMul/weight") and value.const_value is not None
    }
    assert len(weights) == 6
    for name, weight in weights.items():
        assert weight.dtype == ml_dtypes.float8_e4m3fn, name
        assert np.abs(weight.astype(np.float32)).max() == 448, name


def test_the_graph_runs_near_the_float_one(tmp_path: Path) -> None:
    (tmp_path / "fp8").mkdir()
    found, wanted = _run(_quantized(), tmp_path / "fp8"), _run(graphs.encoder(), tmp_path)
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.99
    assert not np.array_equal(found, wanted)


@pytest.mark.parametrize(
    "keys",
    [
        {"activations": None},
        {"weights": Precision.INT8},
        {"method": "smoothquant"},
        {"dynamic": True},
        {"symmetric": False},
        {"block_size": 32},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_what_float8_does_not_go_with_is_refused_with_a_fix(keys: dict[str, object]) -> None:
    with pytest.raises(QuantizeError, match="float8") as caught:
        _quantized(Variant("fp8", **{"weights": FP8.weights, "activations": FP8.activations, **keys}))  # type: ignore[arg-type]
    assert caught.value.fix
