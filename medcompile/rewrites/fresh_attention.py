"""Paged attention over fresh sequences, in standard operators: how a decoder graph runs whole on any ONNX runtime.

For what needs no history: calibration, perplexity and KL divergence, where every sequence of a ragged batch begins at
its own first token. There are no pools and nothing is kept between runs; a step that goes on from earlier tokens is
the backends' business. Scores of all tokens with all others are made, so memory grows with the square of a batch's
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.rewrites import constant, insert, replace

if TYPE_CHECKING:
    import onnx_ir as ir


def rewrite(model: ir.Model) -> int:
    """Write out every PagedAttention of model, in place, for past_lens of 0. How many.

    Inputs that only paging needs (past_lens, block_table, the pools) leave the graph's face; input_ids, positions,
    query_starts and logit_rows stay, and feeds_of() picks them. Token rows from query_starts[-1] on see each other
    alone. Arithmetic is float32, whatever the operator's type.
    """
    from onnx_ir.passes import common

    nodes = [node for node in model.graph if (node.domain, node.op_type) == ("medcompile", "PagedAttention")]
    masks: dict[tuple[int, int], ir.Value] = {}
    for node in nodes:
        starts = node.inputs[5]
        assert starts is not None
        window = node.attributes["sliding_window"].as_int()
        key = (id(starts), window)
        if key not in masks:
            masks[key] = _hidden(model, node, starts, window)
        paged, plain = node.outputs[0], _attention(model, node, masks[key])
        name = paged.name
        replace(paged, plain)
        paged.name, plain.name = f"{name}/paged", name
        model.graph.remove(node, safe=True)
    if nodes:
        common.RemoveUnusedNodesPass()(model)
        model.graph.inputs[:] = [v for v in model.graph.inputs if v.uses() or v.is_graph_output()]
    return len(nodes)


def feeds_of(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Those of feeds that model has as inputs: what is left of a step's feeds for a rewritten graph."""
    return {str(value.name): feeds[str(value.name)] for value in model.graph.inputs if value.name in feeds}


def _hidden(model: ir.Model, before: ir.Node, starts: ir.Value, window: int) -> ir.Value:
    """[tokens, tokens] float32: 0 where the row's token sees the column's, -inf elsewhere."""
    import onnx_ir as ir

    base = f"{before.name}/hidden"

    def add(op_type: str, inputs: list[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        return insert(model, before, op_type, inputs, f"{base}/{name}", attributes)

    def number(name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return constant(model, f"fresh_attention/{name}", array)

    first, last = number("first", np.array([0])), number("last", np.array([1]))
    tokens = add("Squeeze", [add("Shape", [before.inputs[0]], "shape", start=0, end=1)], "tokens")
    at = add("Range", [number("zero", np.array(0)), tokens, number("one", np.array(1))], "at")
    row, column = add("Unsqueeze", [at, last], "row"), add("Unsqueeze", [at, first], "column")
    # A token's sequence is told by how many sequences have begun by then; empty ones begin where the next does.
    begun = add("Cast", [starts], "starts", to=int(ir.DataType.INT64))
    begun = add("GreaterOrEqual", [row, add("Unsqueeze", [begun, first], "begins")], "begun")
    begun = add("Cast", [begun], "counted", to=int(ir.DataType.INT64))
    sequence = add("ReduceSum", [begun, last], "sequence", keepdims=1)
    own = add("Equal", [sequence, add("Transpose", [sequence], "other", perm=[1, 0])], "own")
    seen = add("And", [own, add("LessOrEqual", [column, row], "earlier")], "seen")
    if window:
        reach = add("Add", [column, number(f"window_{window}", np.array(window))], "reach")
        seen = add("And", [seen, add("Greater", [reach, row], "near")], "seen_near")
    ends = number("shown", np.array(0, np.float32)), number("hidden", np.array(-np.inf, np.float32))
    return add("Where", [seen, *ends], "bias")


def _attention(model: ir.Model, node: ir.Node, hidden: ir.Value) -> ir.Value:
    import onnx_ir as ir

    heads, kv_heads, head_dim = (node.attributes[name].as_int() for name in ("heads", "kv_heads", "head_dim"))
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    low = dtype if dtype not in (None, ir.DataType.FLOAT) else None

    def add(op_type: str, inputs: list[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        return insert(model, node, op_type, inputs, f"{node.name}/{name}", attributes)

    def shaped(value: ir.Value, sizes: list[int], name: str) -> ir.Value:
        shape = constant(model, f"fresh_attention/shape_{'_'.join(map(str, sizes))}", np.array(sizes))
        return add("Reshape", [value, shape], name)

    def by_head(index: int, group: int, perm: list[int]) -> ir.Value:
        value = node.inputs[index]
        assert value is not None
        name = "qkv"[index]
        if low:
            value = add("Cast", [value], f"{name}_float", to=int(ir.DataType.FLOAT))
        return add("Transpose", [shaped(value, [-1, kv_heads, group, head_dim], f"{name}_heads")], name, perm=perm)

    # Query heads that share keys lie side by side on an axis of their own, over which keys and values broadcast.
    query = by_head(0, heads // kv_heads, [1, 2, 0, 3])
    key = by_head(1, 1, [1, 2, 3, 0])
    value = by_head(2, 1, [1, 2, 0, 3])
    scale = constant(model, f"{node.name}/scale", np.array(node.attributes["scale"].as_float(), np.float32))
    scores = add("Mul", [add("MatMul", [query, key], "scores"), scale], "scaled")
    weights = add("Softmax", [add("Add", [scores, hidden], "masked")], "weights", axis=-1)
    mixed = add("Transpose", [add("MatMul", [weights, value], "mixed")], "by_token", perm=[2, 0, 1, 3])
    out = shaped(mixed, [-1, heads * head_dim], "out")
    return add("Cast", [out], "rounded", to=int(low)) if low else out
