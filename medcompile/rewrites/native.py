"""Our own CPU kernels in a graph: products with integer weights, and attention. kernels/native has them.

weights of blocks  DequantizeLinear -> MatMul          MatMulInt4, MatMulInt8: x is rounded to int8 block by block
dynamic int8       x rounded per row, MatMulInteger    MatMulInt8: one block is all of a row
both               followed by a bias, by Gelu         BiasedMatMulInt4, BiasedMatMulInt8
both               silu(x . gate) * (x . up)           GatedMatMulInt4, GatedMatMulInt8
PagedAttention                                         PagedAttention, which writes into the pools where they lie
softmax(q . k * scale + mask) . v                      SelfAttention, MaskedSelfAttention, of one q, k, v product
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medcompile.errors import BackendError
from medcompile.kernels import native
from medcompile.rewrites import TURN, constant, insert, only_user, other_input, paged, perm, producer, replace, stored
from medcompile.rewrites.dynamic_int8 import Rounding, roundings

if TYPE_CHECKING:
    import onnx_ir as ir

    from medcompile.kernels.launches import Float

    Array = np.ndarray[Any, Any]


def rewrite(model: ir.Model, *, products: bool, kv: Float, bfloat16: bool) -> dict[str, int]:
    """Rewrite the graph in place. How often each operator was put in.

    products: whether weights that alone are quantized may meet activations rounded to int8; kv: what a decoder's pools
    hold, float32 or bfloat16; bfloat16: whether an encoder's attention may compute in it.
    Raises BackendError where a pool is no input of the graph, or a decoder's heads are too wide.
    """
    from onnx_ir.passes import common

    for node in paged.nodes(model):
        _paged_attention(model, node, kv)
    for rounding in reversed(roundings(model)):  # what a product's end replaces is what a later one reads
        _dynamic(model, rounding)
    if products:
        for node in [n for n in model.graph if n.op_type == "MatMul" and n.domain == ""]:
            _weights_alone(model, node)
    for node in [n for n in model.graph if n.op_type == "Mul"]:
        _gated(model, node)
    if any(node.domain == native.DOMAIN for node in model.graph):  # else the library's own graph runs anywhere
        for node in [n for n in model.graph if n.op_type == "Softmax"]:
            _self_attention(model, node, bfloat16)
    common.RemoveUnusedNodesPass()(model)
    counts = Counter(node.op_type for node in model.graph if node.domain == native.DOMAIN)
    if counts:
        model.opset_imports[native.DOMAIN] = 1
    return dict(counts)


def _paged_attention(model: ir.Model, node: ir.Node, kv: Float) -> None:
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


def _weights_alone(model: ir.Model, node: ir.Node) -> None:
    """A product whose weight is dequantized from int4 or int8, block by block of its rows."""
    import onnx_ir as ir

    dequantize = producer(node.inputs[1], "DequantizeLinear")
    if dequantize is None or len(dequantize.inputs) != 2:  # a third one is a zero point
        return
    if node.inputs[0] is None or producer(node.inputs[0], "DequantizeLinear") is not None:
        return
    weight, scale = dequantize.inputs
    block = dequantize.attributes["block_size"].as_int() if "block_size" in dequantize.attributes else 0
    axis = dequantize.attributes["axis"].as_int() if "axis" in dequantize.attributes else 1
    bits = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}.get(weight.dtype) if weight is not None else None  # type: ignore[arg-type]
    values, scales = stored(weight), stored(scale)
    if bits is None or axis != 0 or block <= 0 or values is None or scales is None or values.ndim != 2:
        return
    if values.shape[0] % block == 0 and block % native.GROUP == 0:
        x = paged.as_float32(model, node, 0)
        _product(model, node, x, values, scales, bits, node.outputs[0])


def _dynamic(model: ir.Model, rounding: Rounding) -> None:
    """Products of one activation that is rounded row by row, where rows are of a length that the kernel takes."""
    for product in rounding.products:
        weight, scale = stored(product.weight), stored(product.weight_scale)
        if weight is None or scale is None:
            continue
        if len(weight) % native.GROUP == 0 and len(weight) <= native.LONGEST:
            scales = np.broadcast_to(scale.reshape(1, -1), (1, weight.shape[1]))
            _product(model, product.node, rounding.activation, weight, scales, 8, product.output)


def _product(
    model: ir.Model, node: ir.Node, x: ir.Value | None, weight: Array, scales: Array, bits: int, output: ir.Value
) -> None:
    """Put a product in front of node and its result, with bias and Gelu that follow, in the place of output's."""
    name, (k, n) = node.name or str(node.outputs[0].name), weight.shape
    packed = native.pack(weight.astype(np.int8), scales.astype(np.float32), bits)
    inputs = [x, constant(model, f"{name}/packed", packed)]
    attributes = {"K": k, "N": n, "block_size": k // len(scales)}
    form = "MatMul"
    add = only_user(output, "Add")
    bias = other_input(add, output) if add is not None else None
    array = stored(bias)
    if add is not None and array is not None and array.shape == (n,) and array.dtype == np.float32:
        form, output = "BiasedMatMul", add.outputs[0]
        inputs.append(bias)
        gelu = only_user(output, "Gelu")
        if gelu is not None and ("approximate" not in gelu.attributes or _plain(gelu)):
            output = gelu.outputs[0]
        attributes["gelu"] = int(output is not add.outputs[0])
    out = insert(model, node, f"{form}Int{bits}", inputs, f"{name}/native", attributes, native.DOMAIN)
    replace(output, paged.as_result(model, node, out) if output is node.outputs[0] else out)


def _plain(gelu: ir.Node) -> bool:
    return gelu.attributes["approximate"].as_string() == "none"


def _gated(model: ir.Model, node: ir.Node) -> None:
    """silu(x . gate) * (x . up), two products of one x."""
    silu, up = (_one_use(value) for value in node.inputs)
    if silu is None or silu.op_type != "Mul":
        silu, up = up, silu
    if silu is None or up is None or silu.op_type != "Mul":
        return
    sigmoid = next((s for value in silu.inputs if (s := producer(value, "Sigmoid"))), None)
    gate = sigmoid.inputs[0] if sigmoid is not None and _one_use(sigmoid.outputs[0]) is sigmoid else None
    product = gate.producer() if gate is not None and gate in silu.inputs and len(gate.uses()) == 2 else None
    if product is None or product.inputs[0] is not up.inputs[0] or product.attributes != up.attributes:
        return
    if up.domain != native.DOMAIN or product.op_type != up.op_type or not up.op_type.startswith("MatMul"):
        return
    inputs = [product.inputs[0], product.inputs[1], up.inputs[1]]
    attributes = {name: up.attributes[name].as_int() for name in ("K", "N", "block_size")}
    out = insert(model, node, f"Gated{up.op_type}", inputs, f"{node.name}/native", attributes, native.DOMAIN)
    replace(node.outputs[0], out)


def _one_use(value: ir.Value | None) -> ir.Node | None:
    """The node that makes value, if value is read once and stays in the graph."""
    return value.producer() if value is not None and len(value.uses()) == 1 and not value.is_graph_output() else None


# ---- attention of whole sequences to themselves


@dataclass(frozen=True)
class _Attention:
    """What one Softmax is part of. q, k, v: [batch, tokens, heads * head_dim]; mask: a number per key, or None."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    scale: float
    heads: int
    head_dim: int
    output: ir.Value
    last: ir.Node


def _self_attention(model: ir.Model, softmax: ir.Node, bfloat16: bool) -> None:
    found = _attention(softmax)
    if found is None or found.head_dim > native.HEAD_DIM:
        return
    qkv = _split(found) or _joined(model, found)
    if qkv is None:
        return
    attributes = {
        "heads": found.heads,
        "head_dim": found.head_dim,
        "scale": found.scale,
        "bfloat16": int(bfloat16),
    }
    name, kind = f"{softmax.name or softmax.outputs[0].name}/native", "SelfAttention"
    inputs: list[ir.Value | None] = [qkv]
    if found.mask is not None:
        inputs, kind = [qkv, found.mask], "MaskedSelfAttention"
    replace(found.output, insert(model, found.last, kind, inputs, name, attributes, native.DOMAIN))


def _attention(softmax: ir.Node) -> _Attention | None:
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    mixed = only_user(softmax.outputs[0], "MatMul")
    back = only_user(mixed.outputs[0], "Transpose") if mixed is not None else None
    flat = only_user(back.outputs[0], "Reshape") if back is not None else None
    if (
        axis not in (-1, 3)
        or mixed is None
        or back is None
        or flat is None
        or mixed.inputs[0] is not softmax.outputs[0]
    ):
        return None
    scores, mask, scale = softmax.inputs[0], None, 1.0
    add = producer(scores, "Add")
    if add is not None:
        scores = next((v for v in add.inputs if (producer(v, "Mul") and _number(v)) or producer(v, "MatMul")), None)
        mask = other_input(add, scores) if scores is not None else None
        if not _per_key(mask):
            return None
    mul = producer(scores, "Mul")
    if mul is not None and scores is not None:
        number = _number(scores)
        scores = next((v for v in mul.inputs if producer(v, "MatMul")), None)
        if number is None or scores is None:
            return None
        scale = number
    product = producer(scores, "MatMul")
    if product is None or perm(back) != TURN or not _one_use(scores):
        return None
    rows = [
        _rows(value, order)
        for value, order in zip((*product.inputs, mixed.inputs[1]), (TURN, [0, 2, 3, 1], TURN), strict=True)
    ]
    shape = stored(flat.inputs[1])
    if None in rows or shape is None or shape.size != 3:
        return None
    (q, heads, head_dim), (k, *of_k), (v, *of_v) = (row for row in rows if row is not None)
    if of_k != [heads, head_dim] or of_v != [heads, head_dim] or shape[2] not in (-1, heads * head_dim):
        return None
    return _Attention(q, k, v, mask, scale, heads, head_dim, flat.outputs[0], flat)


def _number(scaled: ir.Value | None) -> float | None:
    """What a Mul multiplies a product by, if it is one stored number."""
    mul = producer(scaled, "Mul")
    arrays = [a for value in mul.inputs if (a := stored(value)) is not None and a.size == 1] if mul is not None else []
    return float(arrays[0].item()) if len(arrays) == 1 else None


def _rows(value: ir.Value | None, order: list[int]) -> tuple[ir.Value, int, int] | None:
    """The [batch, tokens, heads * head_dim] that value is a turned view of, heads, and head_dim."""
    turn = producer(value, "Transpose")
    split = producer(turn.inputs[0], "Reshape") if turn is not None and perm(turn) == order else None
    dims = stored(split.inputs[1]) if split is not None else None
    x = split.inputs[0] if split is not None else None
    if x is None or dims is None or dims.size != 4 or dims[2] <= 0 or dims[3] <= 0:
        return None
    return x, int(dims[2]), int(dims[3])


def _per_key(mask: ir.Value | None) -> bool:
    """Whether mask is [batch, 1, 1, keys], a number for each key of each sequence."""
    while mask is not None:
        node = mask.producer()
        if node is not None and node.op_type == "Unsqueeze":
            axes = stored(node.inputs[1])
            return axes is not None and sorted(axes.tolist()) == [1, 2]
        if node is None or node.op_type not in ("Mul", "Add", "Sub", "Cast"):
            return False
        computed = [value for value in node.inputs if stored(value) is None]
        if len(computed) != 1 or any(a.size != 1 for value in node.inputs if (a := stored(value)) is not None):
            return False
        mask = computed[0]
    return False


def _split(found: _Attention) -> ir.Value | None:
    """The value that a Split into thirds makes q, k and v of."""
    parts = [producer(value, "Split") for value in (found.q, found.k, found.v)]
    split = parts[0]
    if split is None or any(part is not split for part in parts) or list(split.outputs) != [found.q, found.k, found.v]:
        return None
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    whole = len(split.inputs) == 1 or ((a := stored(split.inputs[1])) is not None and len(set(a.tolist())) == 1)
    return split.inputs[0] if axis in (2, -1) and whole else None


def _joined(model: ir.Model, found: _Attention) -> ir.Value | None:
    """One product in the place of those that make q, k and v of one x, if all three are ours and nothing else's."""
    parts = [_one_use(value) for value in (found.q, found.k, found.v)]
    first = parts[0]
    if first is None or first.domain != native.DOMAIN or "MatMulInt" not in first.op_type:
        return None
    for part in parts:
        same = part is not None and part.op_type == first.op_type and part.inputs[0] is first.inputs[0]
        if part is None or not same or part.attributes != first.attributes:
            return None
    n = first.attributes["N"].as_int()
    if n % native.COLUMNS or ("gelu" in first.attributes and first.attributes["gelu"].as_int()):
        return None
    arrays = [[stored(part.inputs[i]) for part in parts if part] for i in range(1, len(first.inputs))]
    name = f"{first.name}/qkv"
    inputs = [first.inputs[0]]
    for i, group in enumerate(arrays):
        inputs.append(constant(model, f"{name}/{i}", np.concatenate([a for a in group if a is not None])))
    attributes = {key: value.as_int() for key, value in first.attributes.items()} | {"N": 3 * n}
    return insert(model, found.last, first.op_type, inputs, name, attributes, native.DOMAIN)
