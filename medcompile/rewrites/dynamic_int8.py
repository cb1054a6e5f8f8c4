"""Finding dynamic INT8 products in a typed graph: the standard operators that passes/dynamic_int8.py writes.

rows = max(max|x| / 127, least)     codes = Cast(Round(x / rows) + 128)
output = Cast(MatMulInteger(codes, weight, 128)) * rows * weight scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcompile.rewrites import only_user, other_input, producer, stored

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Product:
    """One linear layer. node: its MatMulInteger; weight: int8 [K, N]; weight_scale: float32 [N]; output: of all."""

    node: ir.Node
    weight: ir.Value
    weight_scale: ir.Value
    output: ir.Value


@dataclass(frozen=True)
class Rounding:
    """One activation [..., K], rounded per row, and the products that share it. rows: float32 [..., 1] scales."""

    activation: ir.Value
    rows: ir.Value
    codes: ir.Value
    divide: ir.Node
    products: tuple[Product, ...]


def roundings(model: ir.Model) -> list[Rounding]:
    """Every rounding whose users are all products of this form, in graph order."""
    found = []
    for cast in list(model.graph):
        if cast.op_type != "Cast":
            continue
        shift = producer(cast.inputs[0], "Add")
        rounded = producer(shift.inputs[0], "Round") if shift is not None else None
        divide = producer(rounded.inputs[0], "Div") if rounded is not None else None
        if divide is None:
            continue
        activation, rows = divide.inputs
        codes = cast.outputs[0]
        if activation is None or rows is None:
            continue
        products = [_product(use.node, rows) for use in codes.uses()]
        if products and None not in products:
            found.append(Rounding(activation, rows, codes, divide, tuple(p for p in products if p is not None)))
    return found


def _product(node: ir.Node, rows: ir.Value) -> Product | None:
    if node.op_type != "MatMulInteger" or stored(node.inputs[1]) is None:
        return None
    cast = only_user(node.outputs[0], "Cast")
    by_row = only_user(cast.outputs[0], "Mul") if cast is not None else None
    if cast is None or by_row is None or other_input(by_row, cast.outputs[0]) is not rows:
        return None
    by_column = only_user(by_row.outputs[0], "Mul")
    scale = other_input(by_column, by_row.outputs[0]) if by_column is not None else None
    weight = node.inputs[1]
    if by_column is None or scale is None or weight is None or stored(scale) is None:
        return None
    return Product(node, weight, scale, by_column.outputs[0])
