"""A decoder of two layers with paged attention, built by hand: norms, queries that share keys or not, a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from medcompile.program import Context, Graph, Program, Silent
from medcompile.rewrites import fresh_attention
from medcompile.run_onnx import run_onnx
from medcompile.spec import GraphSpec, Stage, TensorSpec, Variant

VOCABULARY, HIDDEN, INNER, HEADS, HEAD_DIM = 60, 32, 64, 4, 8
Array = np.ndarray[Any, Any]


class _Builder:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.stored: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def store(self, name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.stored.append(value)
        return value

    def matrix(self, name: str, *shape: int) -> ir.Value:
        array = self.rng.standard_normal(shape) / np.sqrt(shape[0]) * np.exp(self.rng.normal(0, 0.5, (shape[0], 1)))
        return self.store(name, array.astype(np.float32))

    def add(
        self, op: str, inputs: list[ir.Value], name: str, width: int, domain: str = "", **attributes: Any
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, domain=domain, name=f"{name}/{op}")
        node.outputs[0].name = f"{name}_{op}_output"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["tokens", width])
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, name: str, inputs: int, outputs: int) -> ir.Value:
        return self.add("MatMul", [x, self.matrix(f"{name}.weight", inputs, outputs)], name, outputs)

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        spread = np.exp(self.rng.normal(0, 0.8, HIDDEN)).astype(np.float32)
        size = self.add("ReduceL2", [x, self.store(f"{name}.axes", np.array([1]))], name, 1)
        return self.add(
            "Mul", [self.store(f"{name}.weight", spread), self.add("Div", [x, size], name, HIDDEN)], name, HIDDEN
        )


def program(kv_heads: int = 2) -> Program:
    b = _Builder()
    ids = b.input("input_ids", ir.DataType.INT64, "tokens")
    starts = b.input("query_starts", ir.DataType.INT32, "bounds")
    past = b.input("past_lens", ir.DataType.INT32, "sequences")
    table = b.input("block_table", ir.DataType.INT32, "sequences", "table")
    pools = [
        b.input(f"{n}_pool.{i}", ir.DataType.FLOAT, "blocks", kv_heads, "block_size", HEAD_DIM)
        for i in range(2)
        for n in "kv"
    ]
    x = b.add("Gather", [b.matrix("embed.weight", VOCABULARY, HIDDEN), ids], "embed", HIDDEN, axis=0)
    sizes = {"heads": HEADS, "kv_heads": kv_heads, "head_dim": HEAD_DIM, "scale": HEAD_DIM**-0.5, "sliding_window": 0}
    for i in range(2):
        n = f"layers.{i}"
        h = b.norm(x, f"{n}.norm")
        qkv = [
            b.linear(h, f"{n}.{p}", HIDDEN, w * HEAD_DIM) for p, w in (("q", HEADS), ("k", kv_heads), ("v", kv_heads))
        ]
        paged = [*qkv, *pools[2 * i : 2 * i + 2], starts, past, table]
        mixed = b.add("PagedAttention", paged, f"{n}.attention", HIDDEN, "medcompile", layer=i, **sizes)
        x = b.add("Add", [x, b.linear(mixed, f"{n}.o", HIDDEN, HIDDEN)], f"{n}.attention", HIDDEN)
        h = b.norm(x, f"{n}.mlp_norm")
        gate = b.add("Sigmoid", [b.linear(h, f"{n}.gate", HIDDEN, INNER)], f"{n}.gate", INNER)
        inner = b.add("Mul", [gate, b.linear(h, f"{n}.up", HIDDEN, INNER)], f"{n}.inner", INNER)
        x = b.add("Add", [x, b.linear(inner, f"{n}.down", INNER, HIDDEN)], f"{n}.mlp", HIDDEN)
    logits = b.linear(b.norm(x, "norm"), "lm_head", HIDDEN, VOCABULARY)
    logits.name = "logits"
    inputs = [ids, starts, past, table, *pools]
    opsets = {"": 21, "medcompile": 1}
    graph = ir.Graph(inputs, [logits], nodes=b.nodes, initializers=b.stored, opset_imports=opsets, name="generate")
    faces = tuple(TensorSpec(str(v.name), v.dtype.name.lower(), tuple(map(str, v.shape))) for v in inputs)  # type: ignore[union-attr,arg-type]
    spec = GraphSpec("generate", faces, (TensorSpec("logits", "float32", ("tokens", VOCABULARY)),), ())
    return Program("llama", {"generate": Graph(spec, ir.Model(graph, ir_version=10))}, Stage.SIMPLIFIED)


def feeds(batches: int = 12, seed: int = 0) -> list[dict[str, Array]]:
    """Steps over four fresh sequences each, with all that a step holds but the pools."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(batches):
        starts = np.cumsum([0, *rng.integers(3, 20, 4)])
        made.append(
            {
                "input_ids": rng.integers(0, VOCABULARY, starts[-1]),
                "query_starts": starts.astype(np.int32),
                "past_lens": np.zeros(4, np.int32),
                "block_table": np.zeros((4, 2), np.int32),
            }
        )
    return made


def context(scratch: Path, variant: Variant | None = None, run: Any = run_onnx) -> Context:
    data = feeds()
    return Context(scratch, Silent(), variant, lambda _: iter(data), run)


def logits(of: Program, seed: int = 9) -> Array:
    """The graph's answers to sequences that it was not calibrated on."""
    return next(values(of.graphs["generate"].model, feeds(1, seed), ("logits",)))["logits"]


def values(model: ir.Model, batches: list[dict[str, Array]], names: tuple[str, ...]) -> Iterator[dict[str, Array]]:
    portable = model.clone()
    fresh_attention.rewrite(portable)
    return run_onnx(portable, (fresh_attention.feeds_of(portable, f) for f in batches), names)
