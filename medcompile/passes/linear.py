"""Where a graph's linear layers are: MatMuls with a stored weight, grouped by the tensor they read.

Calibrate, quantize and sensitivity share this view, so that they mean the same nodes by the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class LinearGroup:
    """The MatMuls [..., channels] x [channels, n] that read one tensor, in graph order (Q, K and V, say)."""

    tensor: str
    channels: int
    nodes: tuple[ir.Node, ...]


def linear_groups(model: ir.Model) -> tuple[LinearGroup, ...]:
    """Every linear layer of model, one group per distinct input, in graph order. Inputs that are themselves stored,
    and weights that aren't float matrices, make no linear layer."""
    import onnx_ir as ir

    found: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        activation, weight = node.inputs
        if activation is None or weight is None or activation.is_initializer() or weight.const_value is None:
            continue
        if len(weight.const_value.shape) == 2 and weight.const_value.dtype == ir.DataType.FLOAT:
            found.setdefault(activation, []).append(node)
    groups = []
    for activation, nodes in found.items():
        weight = nodes[0].inputs[1]
        assert weight is not None and weight.const_value is not None and activation.name is not None
        groups.append(LinearGroup(activation.name, weight.const_value.shape.numpy()[0], tuple(nodes)))
    return tuple(groups)
