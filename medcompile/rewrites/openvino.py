"""OpenVINO's dialect: dynamic INT8 becomes a stored int8 weight and a float activation.

The library's own integer kernel (DYNAMIC_QUANTIZATION_GROUP_SIZE) then rounds activations, per token and group of
inputs; the standard operators would run one by one, in float, several times slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medcompile.rewrites import insert, replace
from medcompile.rewrites.dynamic_int8 import roundings

if TYPE_CHECKING:
    import onnx_ir as ir

    from medcompile.spec import Variant


def told(count: int, variant: Variant) -> list[str]:
    """What an artifact says of rewrite(), which found so many products in a graph of variant."""
    words = [f"{count} products round activations per token and dynamic_group, the typed graph per token"]
    if variant.any_weight_only:
        words.append("dynamic_group is for a whole graph: it may round activations of weight-only products too")
    return words


def rewrite(model: ir.Model) -> int:
    """Turn every dynamic INT8 product of model, in place, into MatMul(x, DequantizeLinear(weight)). How many."""
    from onnx_ir.passes import common

    count = 0
    for rounding in roundings(model):
        for product in rounding.products:
            node, name = product.node, product.node.name or "product"
            inputs: list[ir.Value | None] = [product.weight, product.weight_scale]
            weight = insert(model, node, "DequantizeLinear", inputs, f"{name}/dequantize", {"axis": 1})
            output = insert(model, node, "MatMul", [rounding.activation, weight], f"{name}/float")
            replace(product.output, output)
            count += 1
    common.RemoveUnusedNodesPass()(model)
    return count
