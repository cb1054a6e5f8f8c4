"""A one-layer BERT as a typed graph, made without torch: what a backend is given, in every variant.

Weights are random, and the graph is built as passes/simplify.py leaves one; passes/quantize.py makes the variants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from medcompile import onnx_files
from medcompile.passes.linear import linear_groups
from medcompile.passes.quantize import Quantize
from medcompile.program import Context, Graph, Program
from medcompile.spec import Axis, GraphSpec, LayerRule, Precision, Profile, Stage, TensorSpec, Variant
from medcompile.statistics import Observer

VOCABULARY, HIDDEN, HEADS, INNER, POSITIONS = 60, 32, 4, 64, 40
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SPEC = GraphSpec(
    "embed",
    tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in INPUTS),
    (TensorSpec("embedding", "float32", ("batch", HIDDEN)),),
    (Profile("default", (Axis("batch", 1, 2, 4), Axis("sequence", 2, 16, 32))),),
)
_INT8: dict[str, Any] = {"weights": Precision.INT8, "activations": Precision.INT8}
VARIANTS = {
    "fp32": Variant("fp32"),
    "static": Variant("static", **_INT8),
    "asymmetric": Variant("asymmetric", symmetric=False, **_INT8),
    "dynamic": Variant("dynamic", dynamic=True, **_INT8),
    "weights": Variant("weights", weights=Precision.INT8),
    "mixed": Variant(
        "mixed",
        layers=(
            LayerRule("attention.key"),
            LayerRule("attention.value", dynamic=True, **_INT8),
            LayerRule("attention.output", Precision.INT8),
            LayerRule("intermediate", Precision.INT4, block_size=16),
        ),
        **_INT8,
    ),
    "mixed static": Variant(
        "mixed static", layers=(LayerRule("attention.key"), LayerRule("output", Precision.INT8)), **_INT8
    ),
}


class _Quiet:
    def step(self, message: str, done: int = 0, total: int = 0) -> None: ...


def feeds(batch: int = 3, sequence: int = 16, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random ids; every second row is padded in its last third."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, sequence), np.int64)
    mask[1::2, -(sequence // 3) or sequence :] = 0
    ids = rng.integers(0, VOCABULARY, (batch, sequence))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def encoder() -> ir.Model:
    rng = np.random.default_rng(7)
    nodes: list[Any] = []
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def stored(name: str, array: Any) -> str:
        arrays[name] = np.asarray(array)
        return name

    def add(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}_output"], name, **attributes))
        return f"{name}_output"

    def normal(name: str, *shape: int, scale: float = 1.0) -> str:
        return stored(name, (rng.standard_normal(shape) * scale).astype(np.float32))

    def linear(x: str, name: str, inputs: int, outputs: int) -> str:
        weight = normal(f"{name}.weight.T", inputs, outputs, scale=inputs**-0.5)
        product = add("MatMul", [x, weight], f"{name}/MatMul")
        return add("Add", [product, normal(f"{name}.bias", outputs, scale=0.1)], f"{name}/Add")

    def norm(x: str, name: str) -> str:
        weights = [normal(f"{name}.weight", HIDDEN), normal(f"{name}.bias", HIDDEN, scale=0.1)]
        return add("LayerNormalization", [x, *weights], f"{name}/LayerNormalization", axis=-1, epsilon=1e-12)

    def heads(x: str, name: str, perm: list[int]) -> str:
        split = add("Reshape", [x, stored("heads", np.array([0, 0, HEADS, HIDDEN // HEADS]))], f"{name}/Reshape")
        return add("Transpose", [split], f"{name}/Transpose", perm=perm)

    one, axes = stored("one", np.float32(1)), stored("axes", np.array([1, 2]))
    real = add("Cast", ["attention_mask"], "mask/Cast", to=TensorProto.FLOAT)
    absent = add("Unsqueeze", [add("Sub", [one, real], "mask/Sub"), axes], "mask/Unsqueeze")
    mask = add("Mul", [absent, stored("masked", np.float32(-10000))], "mask/Mul")
    tables = [("word", "input_ids", VOCABULARY), ("type", "token_type_ids", 2)]
    word, kind = (add("Gather", [normal(f"{t}.weight", n, HIDDEN), i], f"{t}/Gather") for t, i, n in tables)
    x = norm(add("Add", [word, kind], "embeddings/Add"), "embeddings.LayerNorm")
    query, key, value = (linear(x, f"attention.{part}", HIDDEN, HIDDEN) for part in ("query", "key", "value"))
    scores = add("MatMul", [heads(query, "query", [0, 2, 1, 3]), heads(key, "key", [0, 2, 3, 1])], "scores/MatMul")
    scores = add("Mul", [scores, stored("scale", np.float32((HIDDEN / HEADS) ** -0.5))], "scores/Mul")
    weights = add("Softmax", [add("Add", [scores, mask], "scores/Add")], "scores/Softmax", axis=-1)
    context = add("MatMul", [weights, heads(value, "value", [0, 2, 1, 3])], "context/MatMul")
    context = add("Transpose", [context], "context/Transpose", perm=[0, 2, 1, 3])
    context = add("Reshape", [context, stored("merged", np.array([0, 0, HIDDEN]))], "context/Reshape")
    x = norm(add("Add", [linear(context, "attention.output", HIDDEN, HIDDEN), x], "attention/Add"), "attention.norm")
    inner = add("Gelu", [linear(x, "intermediate", HIDDEN, INNER)], "intermediate/Gelu")
    x = norm(add("Add", [linear(inner, "output", INNER, HIDDEN), x], "output/residual"), "output.norm")
    weight = add("Unsqueeze", [real, stored("last", np.array([-1]))], "pool/Unsqueeze")
    total = add(
        "ReduceSum", [add("Mul", [x, weight], "pool/Mul"), stored("rows", np.array([1]))], "pool/sum", keepdims=0
    )
    count = add("ReduceSum", [weight, "rows"], "pool/count", keepdims=0)
    nodes.append(helper.make_node("Div", [total, count], ["embedding"], "pool/Div"))
    graph = helper.make_graph(
        nodes,
        SPEC.name,
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"]) for n in INPUTS],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", HIDDEN])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def typed(variant: Variant) -> ir.Model:
    """The encoder in that variant. Statistics are made up: a backend has to give what the graph says, good or bad."""
    model, rng = encoder(), np.random.default_rng(3)
    statistics = {}
    for group in linear_groups(model):
        observer = Observer()
        observer.add((rng.standard_normal((64, group.channels)) + 0.5).astype(np.float32))
        statistics[group.tensor] = observer.statistics()
    program = Program("bert", {SPEC.name: Graph(SPEC, model)}, Stage.SIMPLIFIED, {SPEC.name: statistics})
    quantized = Quantize()(program, Context(Path(), _Quiet(), variant))
    return quantized.graphs[SPEC.name].model


def write(variant: Variant, folder: Path) -> Path:
    """The typed graph of that variant as files in folder. The path of its .onnx."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx_files.save({SPEC.name: typed(variant)}, folder)
    return folder / f"{SPEC.name}.onnx"
