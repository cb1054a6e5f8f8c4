"""A decoder of a few layers with the ragged face of our graphs, and random weights: for backends that build engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from medcompile.kernels.reference import paged_attention
from medcompile.spec import Axis, GraphSpec, Profile, TensorSpec

Array = np.ndarray[Any, Any]

HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 2, 32, 96
WIDTH = HEADS * HEAD_DIM
SIZES = {"blocks": (1, 64, 1024), "table": (1, 8, 64), "block_size": (32, 32, 32)}
PROFILES = {
    "prefill": {"tokens": (1, 128, 512), "sequences": (1, 1, 8), "bounds": (2, 2, 9), "rows": (1, 1, 8)},
    "decode": {"tokens": (1, 8, 32), "sequences": (1, 8, 32), "bounds": (2, 9, 33), "rows": (1, 8, 32)},
}
INTEGERS = {
    "input_ids": ("int64", ("tokens",)),
    "query_starts": ("int32", ("bounds",)),
    "past_lens": ("int32", ("sequences",)),
    "block_table": ("int32", ("sequences", "table")),
    "logit_rows": ("int64", ("rows",)),
}


def spec(layers: int) -> GraphSpec:
    pools = [f"{name}.{layer}" for layer in range(layers) for name in ("k_pool", "v_pool")]
    inputs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in INTEGERS.items()]
    inputs += [TensorSpec(name, "float32", ("blocks", KV_HEADS, "block_size", HEAD_DIM)) for name in pools]
    profiles = tuple(
        Profile(name, tuple(Axis(axis, *ends) for axis, ends in (sizes | SIZES).items()))
        for name, sizes in PROFILES.items()
    )
    return GraphSpec("generate", tuple(inputs), (TensorSpec("logits", "float32", ("rows", VOCABULARY)),), profiles)


def write(path: Path, layers: int = 2, *, dtype: str = "FLOAT16", cast_pools: bool = False) -> GraphSpec:
    """The graph in that dtype inside, with float32 logits. cast_pools: pools are float32 and cast to it."""
    rng = np.random.default_rng(0)
    kind = getattr(TensorProto, dtype)
    nodes, weights = [], []

    def weight(name: str, *shape: int) -> str:
        values = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        weights.append(helper.make_tensor(name, kind, shape, values.ravel()))
        return name

    def node(operator: str, inputs: list[str], name: str, domain: str = "", **attributes: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [f"{name}_out"], name=name, domain=domain, **attributes))
        return f"{name}_out"

    x = node("Gather", [weight("embedding", VOCABULARY, WIDTH), "input_ids"], "embed")
    for layer in range(layers):
        name = f"layers.{layer}"
        rows = [
            node("MatMul", [x, weight(f"{name}.{part}.weight", WIDTH, heads * HEAD_DIM)], f"{name}.{part}")
            for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        ]
        pools = [f"k_pool.{layer}", f"v_pool.{layer}"]
        if cast_pools:
            pools = [node("Cast", [pool], f"{pool}/cast", to=kind) for pool in pools]
        mixed = node(
            "PagedAttention",
            [*rows, *pools, "query_starts", "past_lens", "block_table"],
            f"{name}.attention",
            "medcompile",
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            scale=HEAD_DIM**-0.5,
            sliding_window=16 * layer,
            layer=layer,
        )
        x = node("Add", [x, node("MatMul", [mixed, weight(f"{name}.o", WIDTH, WIDTH)], f"{name}.o")], f"{name}.add")
    wanted = node("Gather", [x, "logit_rows"], "rows", axis=0)
    logits = node("MatMul", [wanted, weight("head", WIDTH, VOCABULARY)], "lm_head")
    nodes.append(helper.make_node("Cast", [logits], ["logits"], name="logits/cast", to=TensorProto.FLOAT))
    face = spec(layers)
    pool_kind = TensorProto.FLOAT if cast_pools else kind
    inputs = [
        helper.make_tensor_value_info(
            t.name, getattr(TensorProto, t.dtype.upper()) if t.name in INTEGERS else pool_kind, t.shape
        )
        for t in face.inputs
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", VOCABULARY])]
    graph = helper.make_graph(nodes, "generate", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("medcompile", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return face


def answer(path: Path, feeds: dict[str, Array]) -> Array:
    """The graph's logits by onnx's own reference and ours for attention; the pools in feeds change in place."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class PagedAttention(OpRun):  # type: ignore[misc]
        op_domain = "medcompile"

        def _run(self, *inputs: Array, layer: int = 0, **face: Any) -> tuple[Array]:
            return (paged_attention(*inputs, **face),)

    result: Array = ReferenceEvaluator(str(path), new_ops=[PagedAttention]).run(None, feeds)[0]
    return result


def feeds(past: list[int], new: list[int], layers: int = 2, blocks: int = 64) -> dict[str, Array]:
    """A step of sequences with so many tokens in the pools, which hold random float16, and so many new ones."""
    rng = np.random.default_rng(1)
    starts = np.cumsum([0, *new]).astype(np.int32)
    given: dict[str, Array] = {
        "input_ids": rng.integers(0, VOCABULARY, starts[-1]),
        "query_starts": starts,
        "past_lens": np.array(past, np.int32),
        "block_table": rng.permutation(blocks)[: 8 * len(past)].reshape(len(past), 8).astype(np.int32),
        "logit_rows": starts[1:].astype(np.int64) - 1,
    }
    for layer in range(layers):
        for name in ("k_pool", "v_pool"):
            given[f"{name}.{layer}"] = rng.standard_normal((blocks, KV_HEADS, 32, HEAD_DIM)).astype(np.float16)
    return given
