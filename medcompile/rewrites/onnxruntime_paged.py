"""Paged attention for ONNX Runtime on a CPU: standard operators, over pools that are updated where they lie.

Each pool is an input of the graph and, written to by ScatterND, an output as well. Bound to one buffer, as
backends/_onnxruntime_paged.py binds them, nothing of it is copied. Ragged queries are cut into tiles of one width; a
tile's context is gathered from the pool block by block, and the rest is MatMul, Add and Softmax over all tiles:

    slots     int64 [tokens, kv_heads, 3]           where each new key goes: block, head, place in the block
    grid      int64 [tiles, width]                  each query's token; a tile is of one sequence, padded at its end
    back      int64 [tokens]                        where in the grid, counted through, each token is
    context.W int64 [tiles, kv_heads, table, 2]     block and head of the blocks in a tile's sight, for window W
    bias.W    float32 [tiles, 1, width, 1, context] 0 where a query sees a key, -inf elsewhere

These take the place of query_starts, past_lens and block_table. Context beyond what bias lets see is multiplied by
zero, so pools must hold numbers everywhere, not NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medcompile.errors import BackendError
from medcompile.rewrites import insert, ints, paged, replace

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN = "com.microsoft"
_REPLACED = ("query_starts", "past_lens", "block_table")


def rewrite(model: ir.Model) -> dict[str, int]:
    """Rewrite the decoder's attention in place; how often it was found.

    Raises BackendError where a pool is no input of the graph, or layers differ in their keys' heads.
    """
    from onnx_ir.passes import common

    nodes = paged.nodes(model)
    if not nodes:
        return {}
    if len({paged.sizes(node) for node in nodes}) > 1:
        raise BackendError("its attention layers differ in their heads", fix="leave out onnxruntime-cpu")
    kv_heads = paged.sizes(nodes[0])[1]
    inputs = {
        "slots": _input(model, "slots", "INT64", ["tokens", kv_heads, 3]),
        "grid": _input(model, "grid", "INT64", ["tiles", "width"]),
        "back": _input(model, "back", "INT64", ["tokens"]),
    }
    windows: dict[int, _Window] = {}
    for node in nodes:
        window = node.attributes["sliding_window"].as_int()
        if window not in windows:
            windows[window] = _Window(model, window, node)
        _attention(model, node, inputs, windows[window])
    model.opset_imports[_DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if value.name in _REPLACED:
            model.graph.inputs.remove(value)
    return {"paged attention": len(nodes)}


class _Window:
    """What layers of one sliding window share: their context, its mask, and shapes that follow from it."""

    def __init__(self, model: ir.Model, window: int, first: ir.Node) -> None:
        heads, kv_heads, head_dim = paged.sizes(first)
        group, name = heads // kv_heads, f"window.{window}"
        self.context = _input(model, f"context.{window}", "INT64", ["tiles", kv_heads, f"table.{window}", 2])
        self.bias = _input(model, f"bias.{window}", "FLOAT", ["tiles", 1, "width", 1, f"keys.{window}"])

        def shape(what: str, parts: list[ir.Value | None]) -> ir.Value:
            return insert(model, first, "Concat", parts, f"{name}/{what}", {"axis": 0})

        width = insert(model, first, "Shape", [self.bias], f"{name}/width", {"start": 2, "end": 3})
        keys = insert(model, first, "Shape", [self.bias], f"{name}/keys", {"start": 4, "end": 5})
        same = ints(model, 0, 0)
        self.masked = shape("masked", [same, width, ints(model, group), keys])
        self.flat = shape("flat", [same, ints(model, -1), keys])
        self.mixed = shape("mixed", [same, width, ints(model, group, head_dim)])


def _attention(model: ir.Model, node: ir.Node, given: dict[str, ir.Value], window: _Window) -> None:
    heads, kv_heads, head_dim = paged.sizes(node)
    group, name = heads // kv_heads, node.name or "attention"

    def op(op_type: str, inputs: list[ir.Value | None], what: str, **attributes: object) -> ir.Value:
        domain = _DOMAIN if op_type == "FusedMatMul" else ""
        return insert(model, node, op_type, inputs, f"{name}/{what}", attributes, domain)

    def context(what: str, rows: ir.Value | None, pool: ir.Value) -> ir.Value:
        """The rows written into the pool; then what each tile sees of it, [tiles, kv_heads, keys, head_dim]."""
        new = op("Reshape", [rows, ints(model, 0, kv_heads, head_dim)], f"{what}/rows")
        updated = op("ScatterND", [pool, given["slots"], new], f"{what}/updated")
        updated.name, updated.type, updated.shape = f"{pool.name}/updated", pool.type, pool.shape
        model.graph.outputs.append(updated)
        blocks = op("GatherND", [updated, window.context], f"{what}/blocks")
        return op("Reshape", [blocks, ints(model, 0, 0, -1, head_dim)], f"{what}/context")

    q, k, v = (paged.as_float32(model, node, i) for i in range(3))
    k_pool, v_pool = paged.bind_pools(model, node, "float32", (kv_heads, "block_size", head_dim))
    keys, values = context("k", k, k_pool), context("v", v, v_pool)
    tiles = op("Gather", [q, given["grid"]], "tiles", axis=0)  # [tiles, width, heads * head_dim]
    tiles = op("Reshape", [tiles, ints(model, 0, 0, kv_heads, group, head_dim)], "tiles/heads")
    tiles = op("Transpose", [tiles], "tiles/turned", perm=[0, 2, 1, 3, 4])
    # Queries that share their keys are rows of one product.
    tiles = op("Reshape", [tiles, ints(model, 0, 0, -1, head_dim)], "tiles/rows")
    scale = node.attributes["scale"].as_float()
    scores = op("FusedMatMul", [tiles, keys], "scores", transB=1, alpha=scale)
    scores = op("Reshape", [scores, window.masked], "scores/by_query")  # [tiles, kv_heads, width, group, keys]
    scores = op("Add", [scores, window.bias], "scores/masked")
    weights = op("Softmax", [scores], "weights", axis=-1)
    weights = op("Reshape", [weights, window.flat], "weights/rows")
    mixed = op("MatMul", [weights, values], "mixed")
    mixed = op("Reshape", [mixed, window.mixed], "mixed/by_query")
    mixed = op("Transpose", [mixed], "mixed/turned", perm=[0, 2, 1, 3, 4])
    mixed = op("Reshape", [mixed, ints(model, -1, heads * head_dim)], "mixed/flat")
    out = op("Gather", [mixed, given["back"]], "out", axis=0)
    replace(node.outputs[0], paged.as_result(model, node, out))


def _input(model: ir.Model, name: str, dtype: str, shape: list[int | str]) -> ir.Value:
    import onnx_ir as ir

    value = ir.Value(name=name, type=ir.TensorType(ir.DataType[dtype]), shape=ir.Shape(shape))
    model.graph.inputs.append(value)
    return value
