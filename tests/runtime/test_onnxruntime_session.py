"""A bundle around a hand-made ONNX graph, run by the real ONNX Runtime backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import medcompile
from medcompile import backends
from medcompile.bundle import Writer
from medcompile.spec import Artifact, Variant
from tests.bundles import contents
from tests.runtime.fakes import HIDDEN, FakeExecutor, spec, write_assets
from tests.test_import_borders import BUILD_ONLY, loaded_by_a_fresh_process

onnx = pytest.importorskip("onnx", reason="the hand-made graph is written with onnx")
pytest.importorskip("onnxruntime", reason="needs medcompile[cpu]")


def write_embed_graph(path: Path) -> None:
    """FakeExecutor's embed as ONNX: embeddings times 1 + type, averaged over the attention mask."""
    from onnx import TensorProto, helper, numpy_helper

    table = FakeExecutor(spec("embed")).table.astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["types", "one"], ["factor"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["factor", "mask"], ["weight"]),
        helper.make_node("Unsqueeze", ["weight", "last"], ["weights"]),
        helper.make_node("Mul", ["rows", "weights"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "one_axis"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "one_axis"], ["count"], keepdims=1),
        helper.make_node("Div", ["total", "count"], ["embedding"]),
    ]
    constants = {"table": table, "one": np.float32(1), "last": np.array([2]), "one_axis": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "embed",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"])
            for n in ("input_ids", "attention_mask", "token_type_ids")
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", HIDDEN])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    backend = backends.for_target("onnxruntime-cpu")
    target = backend.probe("onnxruntime-cpu")
    with Writer(tmp_path / "b") as writer:
        write_assets(writer.path("assets/text.json").parent)
        typed = writer.path("graphs/fp32/embed.onnx")
        write_embed_graph(typed)
        out = writer.path("artifacts/onnxruntime-cpu/fp32/embed/x").parent
        built = backend.build(typed, spec("embed"), Variant("fp32"), target, out)
        path = (out / built.file).relative_to(writer.root).as_posix()
        writer.commit(contents([Artifact("embed", "fp32", built.target, path, "", 0)]))
    return tmp_path / "b"


def test_a_bundle_runs_on_onnxruntime_with_the_answers_of_numpy(place: Path) -> None:
    texts = ["chest pain", "", "metformin " * 100, "no fever, kidney injury"]
    graph = spec("embed")
    with medcompile.load(place, threads=1) as session:
        assert session.target.name == "onnxruntime-cpu"
        got = session.embed(texts)
        session.encoder._executors = {"embed": FakeExecutor(graph)}
        np.testing.assert_allclose(got, session.embed(texts), rtol=1e-5)


def test_a_fresh_process_that_runs_onnxruntime_loads_no_build_library(place: Path) -> None:
    shape, modules = loaded_by_a_fresh_process(place, "auto")
    assert shape == [1, HIDDEN]
    assert "onnxruntime" in modules
    assert modules.isdisjoint(BUILD_ONLY)
