"""Fold: dividing a tensor's channels by constants, done inside the node that makes it, where that costs nothing.

Exact but for rounding: what scales a channel before (a norm's weight, the columns of a linear layer, quantized or
not, and its bias) takes the division. Nothing is folded into a value that anything else reads too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from medcompile.passes.edits import constant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

_SAME_CHANNELS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Gather", "Identity"})


def fold(model: ir.Model, value: ir.Value, readers: Collection[ir.Node], factor: Array) -> bool:
    """Multiply value [..., channels] by factor [channels] in what makes it. False, and no change, where that can't be.

    readers: the nodes that read value and expect it so.
    """
    if value.is_graph_output() or any(use.node not in readers for use in value.uses()):
        return False
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return _through_attention(model, node, factor)
    if node.op_type in _SAME_CHANNELS:
        source = node.inputs[0]
        if source is None or not _is_computed(source) or (node.op_type == "Gather" and not _picks_rows(node, factor)):
            return False
        # A reshape may part channels into heads on the way, as long as they end in one axis again.
        return fold(model, source, (node,), factor)
    if node.op_type == "Mul":
        return any(_into(model, node, i, value, factor) for i in (0, 1))
    if node.op_type == "MatMul":
        return _into(model, node, 1, value, factor)
    if node.op_type == "Add":
        return any(_with_bias(model, node, i, factor) for i in (0, 1))
    return False


def _with_bias(model: ir.Model, node: ir.Node, index: int, factor: Array) -> bool:
    """Into both that an Add reads: a stored vector at index, and what makes the other."""
    bias, other = node.inputs[index], node.inputs[1 - index]
    tensor = bias.const_value if bias is not None else None
    if bias is None or tensor is None or other is None or tuple(tensor.shape.numpy()) != factor.shape:
        return False
    if not _is_computed(other) or not fold(model, other, (node,), factor):
        return False
    node.replace_input_with(index, constant(model, f"{bias.name}/folded", _times(tensor, factor)))
    return True


def _through_attention(model: ir.Model, node: ir.Node | None, factor: Array) -> bool:
    """Attention mixes values of one channel alone; but heads that share values would have to share factors."""
    if node is None or node.op_type != "PagedAttention":
        return False
    if node.attributes["heads"].as_int() != node.attributes["kv_heads"].as_int():
        return False
    values = node.inputs[2]
    return values is not None and fold(model, values, (node,), factor)


def _into(model: ir.Model, node: ir.Node, index: int, value: ir.Value, factor: Array) -> bool:
    """Into the node's input at index: a stored vector or matrix, its DequantizeLinear's scale, or what computes it."""
    operand = node.inputs[index]
    if operand is None or _channels(operand) != len(factor) or _channels(value) != len(factor):
        return False
    if _is_computed(operand):
        dequantize = operand.producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return node.op_type == "Mul" and fold(model, operand, (node,), factor)
        node, index, operand = dequantize, 1, dequantize.inputs[1]
        if operand is None or _channels(operand) != len(factor):
            return False
    elif node.op_type == "Mul" and len(operand.shape or ()) != 1:
        return False
    tensor = operand.const_value
    if tensor is None:
        return False
    node.replace_input_with(index, constant(model, f"{operand.name}/folded", _times(tensor, factor)))
    return True


def _times(tensor: ir.TensorProtocol, factor: Array) -> Array:
    product: Array = (tensor.numpy() * factor).astype(tensor.dtype.numpy())
    return product


def _picks_rows(node: ir.Node, factor: Array) -> bool:
    """True of a Gather along another axis than the channels'."""
    source, axis = node.inputs[0], node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if source is None or source.shape is None:
        return False
    return axis not in (-1, len(source.shape) - 1) and _channels(source) == len(factor)


def _is_computed(value: ir.Value) -> bool:
    return value.producer() is not None


def _channels(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape else None
    return size if isinstance(size, int) else None
