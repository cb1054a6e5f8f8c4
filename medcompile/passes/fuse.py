"""Fuse: small operators that older exporters spell out become the single nodes that our own traces have.

LayerNormalization (single since opset 17) and Gelu (since 20), in the spellings of torch's exporters. Graphs traced
by export.py have both already, and pass through unchanged.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


def fuse(model: ir.Model) -> None:
    """Edit model in place. A fused node takes the path of the node that gave its result: `/LayerNorm/Add_1` becomes
    `/LayerNorm/LayerNormalization`."""
    from onnxscript.rewriter import RewriteRule, rewrite

    if not any(node.op_type in ("Erf", "ReduceMean") for node in model.graph):
        return
    names = {value.name: node.name or "" for node in model.graph for value in node.outputs}
    rules = [
        RewriteRule(_layer_norm, _to_layer_norm),
        RewriteRule(_gelu_half_last, _to_gelu),
        RewriteRule(_gelu_half_inside, _to_gelu),
    ]
    rewrite(model, pattern_rewrite_rules=rules)
    for node in model.graph:
        old = names.get(node.outputs[0].name, "")
        if node.op_type in ("LayerNormalization", "Gelu") and old and node.name != old:
            node.name = f"{old.rpartition('/')[0]}/{node.op_type}"


def _layer_norm(op: Any, x: Any, scale: Any, bias: Any, epsilon: Any) -> Any:
    deviation = op.Sub(x, op.ReduceMean(x, [-1]))
    variance = op.ReduceMean(op.Pow(deviation, 2.0), [-1])
    return op.Add(op.Mul(op.Div(deviation, op.Sqrt(op.Add(variance, epsilon))), scale), bias)


def _to_layer_norm(op: Any, x: Any, scale: Any, bias: Any, epsilon: Any) -> Any:
    return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=float(epsilon.const_value.numpy()))


def _gelu_half_last(op: Any, x: Any) -> Any:
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0)), 0.5)


def _gelu_half_inside(op: Any, x: Any) -> Any:
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0))


def _to_gelu(op: Any, x: Any) -> Any:
    return op.Gelu(x)
