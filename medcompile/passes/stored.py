"""Stored: put a quantized checkpoint's own integers and scales into the graph, where the variant says weights: stored.

Codes come out of the dequantized weights by division, exactly (medcompile/stored.py says why). Forms: signed codes
are DequantizeLinear with no zero points, in blocks along the inputs or one scale per output; codes with zero points
are UINT4, or INT8, with them. Where a layer's blocks don't lie in order (act-order), its rows are sorted by block and
one Gather brings the input's channels into the same order, for all layers that read it so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medcompile.errors import QuantizeError
from medcompile.passes.dynamic_int8 import dynamic_matmuls
from medcompile.passes.edits import constant, insert
from medcompile.spec import Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from medcompile.passes.linear import LinearGroup
    from medcompile.stored import StoredLinear

    Array = np.ndarray[Any, Any]


def stored_matmuls(
    model: ir.Model, groups: Sequence[LinearGroup], table: Mapping[str, StoredLinear], variant: Variant
) -> None:
    """Let the MatMuls of groups read their weights as table, by weight name, says that they are stored.

    Layers that are not in table stay in float. Raises QuantizeError if table is empty, or variant asks for more.
    """
    if variant.activations or variant.dynamic or variant.block_size or variant.method != "rtn":
        raise QuantizeError(
            f"variant {variant.name}: stored weights have the formats that the checkpoint gave them",
            fix="leave out activations, dynamic, block_size and method",
        )
    if not table:
        raise QuantizeError(
            f"variant {variant.name}: the checkpoint's weights are floats, so none is stored quantized",
            fix="write weights: int8 or int4",
        )
    for group in groups:
        dynamic: list[tuple[ir.Node, Array, Array]] = []
        inputs: dict[tuple[object, ...], ir.Value] = {}
        for node in group.nodes:
            linear = table.get(_weight_name(node))
            if linear is None:
                continue
            codes = _codes(node, linear)
            if linear.dynamic:
                dynamic.append((node, codes, linear.scales[0]))
            else:
                activation = _input(model, group, node, linear, inputs)
                node.replace_input_with(1, _dequantized(model, node, linear, codes))
                node.replace_input_with(0, activation)
        if dynamic:
            nodes, values, scales = zip(*dynamic, strict=True)
            activation = nodes[0].inputs[0]
            dynamic_matmuls(model, nodes, activation, values, scales)


def _weight_name(node: ir.Node) -> str:
    """As the table has it: simplify calls a weight that it has turned .T."""
    weight = node.inputs[1]
    return str(weight.name).removesuffix(".T") if weight is not None else ""


def _codes(node: ir.Node, linear: StoredLinear) -> Array:
    """The codes [inputs, outputs], rows sorted by block, in the type that they have in the graph."""
    import ml_dtypes
    import numpy as np

    from medcompile.passes.derived import read

    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    array = read(weight.const_value)
    order = _order(linear)
    if order is not None:
        array = array[order]
    blocks = array.reshape(linear.blocks, -1, array.shape[1])
    scales = linear.scales[:, None, :]
    codes = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0)
    if linear.format == "float8":
        return codes.reshape(array.shape).astype(ml_dtypes.float8_e4m3fn)
    codes = np.rint(codes)
    if linear.zero_points is not None:
        codes += linear.zero_points[:, None, :]
    low, high = {"int8": (-128, 127), "int4": (-8, 7) if linear.zero_points is None else (0, 15)}[linear.format]
    assert codes.min() >= low and codes.max() <= high, f"{node.name}: codes outside {low}..{high}"
    return codes.reshape(array.shape).astype(_integer(linear))


def _integer(linear: StoredLinear) -> np.dtype[Any]:
    import ml_dtypes
    import numpy as np

    int4 = ml_dtypes.int4 if linear.zero_points is None else ml_dtypes.uint4
    found: np.dtype[Any] = np.dtype(np.int8 if linear.format == "int8" else int4)
    return found


def _order(linear: StoredLinear) -> Array | None:
    """Which input stands at each place once they are sorted by block."""
    import numpy as np

    return None if linear.groups is None else np.argsort(linear.groups, kind="stable")


def _input(
    model: ir.Model,
    group: LinearGroup,
    node: ir.Node,
    linear: StoredLinear,
    made: dict[tuple[object, ...], ir.Value],
) -> ir.Value:
    """The node's input, in the order of its blocks or rounded as the checkpoint says. made: those of this group."""
    import ml_dtypes
    import numpy as np

    activation, first = node.inputs[0], group.nodes[0]
    assert activation is not None
    order = _order(linear)
    if order is not None:
        key: tuple[object, ...] = (order.tobytes(),)
        if key not in made:
            name = f"{group.tensor}/by_block" + (f"_{len(made)}" if made else "")
            places = constant(model, f"{name}/order", order.astype(np.int64))
            made[key] = insert(model, first, "Gather", [activation, places], name, attributes={"axis": -1})
        return made[key]
    if linear.input_scale is None:
        return activation
    key = (linear.input_scale, linear.input_zero_point)
    if key not in made:
        base = f"{group.tensor}" + (f"/{len(made)}" if made else "")
        dtype = np.int8 if linear.format == "int8" else ml_dtypes.float8_e4m3fn
        scale = constant(model, f"{base}/scale", np.array(linear.input_scale, np.float32))
        zero = constant(model, f"{base}/zero_point", np.array(linear.input_zero_point).astype(dtype))
        codes = insert(model, first, "QuantizeLinear", [activation, scale, zero], f"{base}/quantize")
        made[key] = insert(model, first, "DequantizeLinear", [codes, scale, zero], f"{base}/dequantize")
    return made[key]


def _dequantized(model: ir.Model, node: ir.Node, linear: StoredLinear, codes: Array) -> ir.Value:
    import numpy as np

    base, scales, zeros = node.name or "", linear.scales, linear.zero_points
    attributes = {"axis": 1}
    if linear.blocks > 1:
        attributes = {"axis": 0, "block_size": len(codes) // linear.blocks}
    else:
        scales, zeros = scales[0], zeros[0] if zeros is not None else np.zeros(scales.shape[1])
    if linear.format == "float8" and (scales == scales[0]).all():
        scales, zeros, attributes = scales[0], np.zeros(()), {}
    inputs = [constant(model, f"{base}/weight", codes), constant(model, f"{base}/weight_scale", np.asarray(scales))]
    if zeros is not None:
        inputs.append(constant(model, f"{base}/weight_zero_point", zeros.astype(codes.dtype)))
    return insert(model, node, "DequantizeLinear", inputs, f"{base}/weight_dequantize", attributes=attributes)
