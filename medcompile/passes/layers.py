"""The layer table of a typed graph: which operator computes in which precision. What `medcompile inspect` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# What moves or relabels data, and what only writes precision down.
_SILENT = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Cast", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Shape", "Concat"}
)


def layers(model: ir.Model) -> list[dict[str, str]]:
    """One row per computing node, in graph order: name, op, and precision in words (`int8 x int8`, `float32`)."""
    rows = []
    for node in model.graph:
        precision = _precision(node)
        if node.op_type not in _SILENT and precision:
            rows.append({"name": node.name or "", "op": node.op_type, "precision": precision})
    return rows


def _precision(node: ir.Node) -> str:
    """Empty for nodes over integers that are no arithmetic of the model (positions, shapes)."""
    if node.op_type == "MatMulInteger":
        return "int8 x int8, scales at run time"
    stored = [_stored(value) for value in node.inputs[:2]] if node.op_type in ("MatMul", "Gemm") else []
    if len(stored) == 2 and stored[1]:
        return f"{stored[0]} x {stored[1]}" if stored[0] else f"{_float(node)} x {stored[1]} weights"
    return _float(node)


def _stored(value: ir.Value | None) -> str:
    """The integer type behind a DequantizeLinear, as int8 or int4; uint8 with a zero point counts as int8."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
        return ""
    dtype = producer.inputs[0].dtype
    if dtype is None and len(producer.inputs) > 2 and producer.inputs[2] is not None:
        dtype = producer.inputs[2].dtype
    return dtype.name.lower().removeprefix("u") if dtype is not None else "int8"


def _float(node: ir.Node) -> str:
    dtype = node.outputs[0].dtype
    return dtype.numpy().name if dtype is not None and dtype.is_floating_point() else ""
