"""ONNX Runtime's dialect: one fused integer product per quantized linear layer, and keys that are not transposed twice.

    static    Q -> DQ -> MatMul <- DQ, + bias    Q (uint8) -> MatMulIntegerToFloat with bias
    dynamic   Div Round Add Cast, per row        one QuantizeLinear over the rows; MatMulIntegerToFloat times the rows
    keys      Transpose(0, 2, 3, 1) -> MatMul    Transpose(0, 2, 1, 3) -> FusedMatMul(transB)

The integers are the same to the last bit: an int8 tensor with zero point z is a uint8 tensor with zero point z + 128,
and uint8 activations are what the library has fast kernels for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from medcompile.rewrites import constant, insert, only_user, other_input, perm, producer, replace, stored
from medcompile.rewrites.dynamic_int8 import Rounding, roundings

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN = "com.microsoft"


def rewrite(model: ir.Model) -> dict[str, int]:
    """Rewrite model in place. How often each form was found: static, dynamic, keys."""
    from onnx_ir.passes import common

    counts = {
        "static": sum(_static(model, node) for node in list(model.graph) if node.op_type == "MatMul"),
        "dynamic": sum(_dynamic(model, rounding) for rounding in roundings(model)),
        "keys": sum(_keys(model, node) for node in list(model.graph) if node.op_type == "MatMul"),
    }
    model.opset_imports[_DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    return counts


def _static(model: ir.Model, node: ir.Node) -> bool:
    """MatMul of a dequantized activation and a dequantized stored int8 weight, and the bias that follows."""
    left, right = producer(node.inputs[0], "DequantizeLinear"), producer(node.inputs[1], "DequantizeLinear")
    quantize = producer(left.inputs[0], "QuantizeLinear") if left is not None else None
    if left is None or right is None or quantize is None or list(quantize.inputs[1:]) != list(left.inputs[1:]):
        return False
    weight, zeros = stored(right.inputs[0]), stored(right.inputs[2]) if len(right.inputs) > 2 else None
    scale, zero_point = stored(quantize.inputs[1]), stored(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if weight is None or weight.dtype != np.int8 or weight.ndim != 2 or (zeros is not None and zeros.any()):
        return False
    if scale is None or scale.size != 1 or zero_point is None or "block_size" in right.attributes:
        return False
    if right.inputs[1] is None or right.inputs[1].shape != (weight.shape[1],):
        return False
    if zero_point.dtype == np.int8:
        unsigned = constant(model, f"{quantize.name}/unsigned", (zero_point.astype(np.int16) + 128).astype(np.uint8))
        before, after = quantize.inputs[2], quantize.outputs[0]
        # Other readers of the codes (a DequantizeLinear that stays) move along: the same numbers, 128 higher.
        for use in list(after.uses()):
            if use.node.op_type != "DequantizeLinear" or use.node.inputs[2] is not before:
                return False
        for use in list(after.uses()):
            use.node.replace_input_with(2, unsigned)
        quantize.replace_input_with(2, unsigned)
        after.type = unsigned.type
    output, bias = node.outputs[0], None
    add = only_user(output, "Add")
    if add is not None:
        array = stored(other_input(add, output))
        if array is not None and array.shape == (weight.shape[1],):
            bias, output = other_input(add, output), add.outputs[0]
    inputs = [quantize.outputs[0], right.inputs[0], quantize.inputs[1], right.inputs[1], quantize.inputs[2], None, bias]
    inputs = inputs if bias is not None else inputs[:5]
    fused = insert(model, node, "MatMulIntegerToFloat", inputs, f"{node.name}/integer", domain=_DOMAIN)
    replace(output, fused)
    return True


def _dynamic(model: ir.Model, rounding: Rounding) -> int:
    """Round all rows in one pass, with the very same result, and scale each product by column inside the kernel."""
    x, first = rounding.activation, rounding.divide
    base = f"{x.name}/rows"
    channels = rounding.products[0].weight.shape
    assert channels is not None and isinstance(channels[0], int)
    flat = constant(model, f"rows/{channels[0]}", np.array([-1, channels[0]], np.int64))
    each, one = (
        constant(model, "rows/each", np.array([-1], np.int64)),
        constant(model, "rows/one", np.array(1, np.float32)),
    )
    middle = constant(model, "rows/middle", np.array(128, np.uint8))
    _signed_extremes(model, rounding)

    scale = insert(model, first, "Reshape", [rounding.rows, each], f"{base}/scale")
    count = insert(model, first, "Shape", [scale], f"{base}/count")
    zero_point = insert(model, first, "Expand", [middle, count], f"{base}/zero_point")
    codes = insert(model, first, "Reshape", [x, flat], f"{base}/flat")
    codes = insert(model, first, "QuantizeLinear", [codes, scale, zero_point], f"{base}/quantize", {"axis": 0})
    shape = insert(model, first, "Shape", [x], f"{base}/shape")
    codes = insert(model, first, "Reshape", [codes, shape], f"{base}/codes")
    for product in rounding.products:
        node, name = product.node, product.node.name or "product"
        inputs: list[ir.Value | None] = [codes, product.weight, one, product.weight_scale, middle]
        output = insert(model, node, "MatMulIntegerToFloat", inputs, f"{name}/fused", domain=_DOMAIN)
        output = insert(model, node, "Mul", [output, rounding.rows], f"{name}/by_row")
        replace(product.output, output)
    return len(rounding.products)


def _signed_extremes(model: ir.Model, rounding: Rounding) -> None:
    """max|x| as max(max x, -min x): two reductions that read x, where Abs would also write it."""
    for reduce in [n for n in model.graph if n.op_type == "ReduceMax"]:
        magnitude = producer(reduce.inputs[0], "Abs")
        if magnitude is None or magnitude.inputs[0] is not rounding.activation:
            continue
        x, axes, name = rounding.activation, reduce.inputs[1], reduce.name
        attributes = {"keepdims": 1}
        high = insert(model, reduce, "ReduceMax", [x, axes], f"{name}/high", attributes)
        low = insert(model, reduce, "ReduceMin", [x, axes], f"{name}/low", attributes)
        low = insert(model, reduce, "Neg", [low], f"{name}/minus_low")
        amax = insert(model, reduce, "Max", [high, low], f"{name}/amax")
        reduce.outputs[0].replace_all_uses_with(amax)


def _keys(model: ir.Model, node: ir.Node) -> bool:
    """q x k^T, where k^T is one transpose out of [batch, sequence, heads, head_dim]: let the product turn k."""
    turn = producer(node.inputs[1], "Transpose")
    if turn is None or perm(turn) != [0, 2, 3, 1] or len(turn.outputs[0].uses()) != 1:
        return False
    output = node.outputs[0]
    keys = insert(model, turn, "Transpose", [turn.inputs[0]], f"{turn.name}/heads", {"perm": [0, 2, 1, 3]})
    attributes = {"transB": 1, "alpha": 1.0}
    scores = insert(model, node, "FusedMatMul", [node.inputs[0], keys], f"{node.name}/turned", attributes, _DOMAIN)
    replace(output, scores)
    return True
