"""The two edits that quantization makes to a graph: a constant put in, and a node put in front of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]


def constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    """array as an initializer of model. int4 is held as it is written, two values to a byte."""
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir

    tensor: ir.TensorProtocol
    if array.dtype == ml_dtypes.int4 and array.size % 2 == 0:
        nibbles = array.reshape(-1).view(np.uint8) & 0x0F
        packed = nibbles[0::2] | nibbles[1::2] << 4
        tensor = ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape(array.shape), name=name)
    else:
        tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    name: str,
    *,
    attributes: Mapping[str, Any] | None = None,
    like: ir.Value | None = None,
) -> ir.Value:
    """A new node in front of another. Returns its output, shaped like the value like (the first input unless given)."""
    import onnx_ir as ir

    node = ir.node(op_type, inputs, dict(attributes or {}), name=name)
    output = node.outputs[0]
    output.name, output.shape = f"{name}/output", (like or inputs[0]).shape
    if op_type == "Cast":
        output.type = ir.TensorType(ir.DataType((attributes or {})["to"]))
    elif op_type == "MatMulInteger":
        output.type = ir.TensorType(ir.DataType.INT32)
    else:  # these two take the type of their zero point and scale; every other operator used here, of its first input
        output.type = inputs[{"QuantizeLinear": 2, "DequantizeLinear": 1}.get(op_type, 0)].type
    model.graph.insert_before(before, node)
    return output
