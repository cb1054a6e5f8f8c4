"""Our own CPU kernels in a decoder's graph: products with int4 weights, and paged attention over pools in place.

The typed graph's DequantizeLinear and MatMul become one MatMulInt4, which rounds activations to int8 block by block,
and two of them, of which one passes the other by SiLU, one GatedMatMulInt4; its PagedAttention becomes an operator
that writes into the pools where they lie. kernels/native has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from medcompile.errors import BackendError
from medcompile.kernels import native
from medcompile.rewrites import constant, insert, paged, producer, replace, stored

if TYPE_CHECKING:
    import onnx_ir as ir

    from medcompile.kernels.launches import Float


def rewrite(model: ir.Model, kv: Float, *, products: bool) -> dict[str, int]:
    """Rewrite the decoder's graph in place. How often each operator was put in.

    kv: what the pools hold, float32 or bfloat16. products: whether int4 products may round activations.
    Raises BackendError where a pool is no input of the graph, or heads are too wide.
    """
    from onnx_ir.passes import common

    nodes = paged.nodes(model)
    for node in nodes:
        _attention(model, node, kv)
    matmuls = [node for node in model.graph if node.op_type == "MatMul" and node.domain == ""] if products else []
    count = sum(_product(model, node) for node in matmuls)
    gated = sum(_gated(model, node) for node in list(model.graph) if node.op_type == "Mul") if count else 0
    model.opset_imports[native.DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    return {"PagedAttention": len(nodes), "MatMulInt4": count - 2 * gated, "GatedMatMulInt4": gated}


def _attention(model: ir.Model, node: ir.Node, kv: Float) -> None:
    import onnx_ir as ir

    heads, kv_heads, head_dim = paged.sizes(node)
    if head_dim > native.HEAD_DIM:
        raise BackendError(
            f"heads are {head_dim} wide; our kernel takes {native.HEAD_DIM}", fix="set compute.kernels: onnxruntime"
        )
    k_pool, v_pool = paged.bind_pools(model, node, kv, (kv_heads, native.ATTENTION_BLOCK, head_dim))
    blocks = k_pool.shape[0] if k_pool.shape else None
    k_pool.shape = ir.Shape([blocks, kv_heads, head_dim, native.ATTENTION_BLOCK])  # keys stand in columns
    rows = [paged.as_float32(model, node, index) for index in range(3)]
    attributes = {
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "head_dim": head_dim,
        "sliding_window": node.attributes["sliding_window"].as_int(),
        "scale": node.attributes["scale"].as_float(),
        "bfloat16": int(kv == "bfloat16"),
    }
    inputs = [*rows, k_pool, v_pool, *node.inputs[5:8]]
    out = insert(model, node, "PagedAttention", inputs, f"{node.name}/native", attributes, native.DOMAIN)
    replace(node.outputs[0], paged.as_result(model, node, out))


def _product(model: ir.Model, node: ir.Node) -> bool:
    """Put MatMulInt4 in the place of a product whose weight is dequantized from int4, block by block of its rows."""
    import onnx_ir as ir

    dequantize = producer(node.inputs[1], "DequantizeLinear")
    if dequantize is None or len(dequantize.inputs) != 2:  # a third one is a zero point
        return False
    weight, scale = dequantize.inputs
    block = dequantize.attributes["block_size"].as_int() if "block_size" in dequantize.attributes else 0
    axis = dequantize.attributes["axis"].as_int() if "axis" in dequantize.attributes else 1
    blocked = block > 0 and block % native.GROUP == 0 and axis == 0
    if not blocked or weight is None or weight.dtype != ir.DataType.INT4 or node.inputs[0] is None:
        return False
    values, scales = stored(weight), stored(scale)
    if values is None or scales is None or values.ndim != 2 or values.shape[0] % block:
        return False
    packed = native.pack(values.astype(np.int8), scales.astype(np.float32))
    name = node.name or str(node.outputs[0].name)
    attributes = {"K": values.shape[0], "N": values.shape[1], "block_size": block}
    inputs = [paged.as_float32(model, node, 0), constant(model, f"{weight.name}/packed", packed)]
    out = insert(model, node, "MatMulInt4", inputs, f"{name}/native", attributes, native.DOMAIN)
    replace(node.outputs[0], paged.as_result(model, node, out))
    return True


def _gated(model: ir.Model, node: ir.Node) -> bool:
    """Put GatedMatMulInt4 in the place of silu(x . gate) * (x . up), two products of one x."""
    silu, up = (_one_use(value) for value in node.inputs)
    if silu is None or silu.op_type != "Mul":
        silu, up = up, silu
    if silu is None or up is None or silu.op_type != "Mul":
        return False
    sigmoid = next((s for value in silu.inputs if (s := producer(value, "Sigmoid"))), None)
    gate = sigmoid.inputs[0] if sigmoid is not None and _one_use(sigmoid.outputs[0]) is sigmoid else None
    product = gate.producer() if gate is not None and gate in silu.inputs and len(gate.uses()) == 2 else None
    if product is None or any((p.domain, p.op_type) != (native.DOMAIN, "MatMulInt4") for p in (product, up)):
        return False
    if product.inputs[0] is not up.inputs[0] or product.attributes != up.attributes:
        return False
    inputs = [product.inputs[0], product.inputs[1], up.inputs[1]]
    attributes = {name: up.attributes[name].as_int() for name in ("K", "N", "block_size")}
    out = insert(model, node, "GatedMatMulInt4", inputs, f"{node.name}/native", attributes, native.DOMAIN)
    replace(node.outputs[0], out)
    return True


def _one_use(value: ir.Value | None) -> ir.Node | None:
    """The node that makes value, if value is read once and stays in the graph."""
    return value.producer() if value is not None and len(value.uses()) == 1 and not value.is_graph_output() else None
