"""A tiny graph with the features of an encoder that calibration and quantization care about, and a context to run it.

input_ids -> Gather -> (left MatMul, right MatMul, which share it) -> Add -> Gelu -> down MatMul -> logits
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from medcompile.program import Context, Graph, Program
from medcompile.spec import Axis, GraphSpec, Profile, Stage, TensorSpec, Variant

VOCABULARY, HIDDEN, INNER, LABELS = 50, 16, 32, 4
LAYERS = ("block/left/MatMul", "block/right/MatMul", "block/down/MatMul")


class Quiet:
    def step(self, message: str, done: int = 0, total: int = 0) -> None:
        pass


def weights(seed: int = 0, outlier: float = 1.0) -> dict[str, np.ndarray]:
    """outlier: how much larger the embedding's channel 3 is than the others, as trained encoders have it."""
    rng = np.random.default_rng(seed)
    made = {
        "embedding": rng.standard_normal((VOCABULARY, HIDDEN)),
        "left": rng.standard_normal((HIDDEN, INNER)) / 4,
        "right": rng.standard_normal((HIDDEN, INNER)) / 4,
        "down": rng.standard_normal((INNER, LABELS)) / 4,
    }
    made["embedding"][:, 3] *= outlier
    return {name: array.astype(np.float32) for name, array in made.items()}


def program(arrays: dict[str, np.ndarray] | None = None) -> Program:
    arrays = weights() if arrays is None else arrays
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"], "embeddings/Gather"),
        helper.make_node("MatMul", ["hidden", "left"], ["l"], LAYERS[0]),
        helper.make_node("MatMul", ["hidden", "right"], ["r"], LAYERS[1]),
        helper.make_node("Add", ["l", "r"], ["sum"], "block/Add"),
        helper.make_node("Gelu", ["sum"], ["act"], "block/Gelu"),
        helper.make_node("MatMul", ["act", "down"], ["logits"], LAYERS[2]),
    ]
    axes = ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, TensorProto.INT64, axes) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*axes, LABELS])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    profile = Profile("default", (Axis("batch", 1, 4, 64), Axis("sequence", 1, 8, 64)))
    inputs = tuple(TensorSpec(n, "int64", ("batch", "sequence")) for n in ("input_ids", "attention_mask"))
    spec = GraphSpec("tiny", inputs, (TensorSpec("logits", "float32", ("batch", "sequence", LABELS)),), (profile,))
    return Program("bert", {"tiny": Graph(spec, ir.from_proto(model))}, Stage.SIMPLIFIED)


def feeds(items: int = 40, batch: int = 8, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Batches [batch, 8] with ragged masks; padding holds token 0."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(0, items, batch):
        mask = (np.arange(8)[None] < rng.integers(3, 9, (batch, 1))).astype(np.int64)
        made.append({"input_ids": rng.integers(1, VOCABULARY, (batch, 8)) * mask, "attention_mask": mask})
    return made


def run_onnx(model: ir.Model, batches: Iterator[dict], names: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # as medcompile.run_onnx
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for batch in batches:
        yield dict(zip(names, session.run(list(names), dict(batch)), strict=True))


def context(batches: list[dict[str, np.ndarray]] | None = None, variant: Variant | None = None) -> Context:
    data = feeds() if batches is None else batches
    return Context(Path(), Quiet(), variant, lambda _: iter(data), run_onnx)


def logits(of: Program, batches: list[dict[str, np.ndarray]] | None = None) -> np.ndarray:
    """The graph's output on the real tokens of batches: [tokens, labels]."""
    data = feeds() if batches is None else batches
    results = run_onnx(of.graphs["tiny"].model, iter(data), ("logits",))
    return np.concatenate([r["logits"][b["attention_mask"].astype(bool)] for r, b in zip(results, data, strict=True)])
