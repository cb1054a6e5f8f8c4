"""TensorRT's dialect: paged attention as its plugin takes it, and pools that engines update in place; products of
integers that it would not compute in integers as they stand.

The plugin (kernels/tensorrt_plugin.py) has the pools as outputs too, aliased to its inputs; nothing reads them, and the
graph's face stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medcompile.errors import BackendError
from medcompile.kernels.launches import Face, Float
from medcompile.rewrites import paged

if TYPE_CHECKING:
    import onnx_ir as ir


def rewrite(model: ir.Model, dtype: Float, pool_dtype: Float, block_size: int) -> Face | None:
    """Turn every paged attention node of model, in place, into the plugin's. What its kernels are compiled for.

    dtype: of the graph's floats. None where the model has no such node. Raises BackendError where its layers differ in
    more than their window and scale, or where a pool is no input of the graph.
    """
    faces = set()
    for node in paged.nodes(model):
        heads, kv_heads, head_dim = paged.sizes(node)
        faces.add(Face(heads, kv_heads, head_dim, block_size, dtype, pool_dtype))
        pools = paged.bind_pools(model, node, pool_dtype, (kv_heads, block_size, head_dim))
        node.resize_outputs(1 + len(pools))
        for output, pool in zip(node.outputs[1:], pools, strict=True):
            output.name, output.type, output.shape = f"{pool.name}/updated", pool.type, pool.shape
    if len(faces) > 1:
        raise BackendError(
            f"its attention layers differ: {', '.join(map(str, sorted(faces, key=str)))}",
            fix="leave out the TensorRT targets: an engine holds the kernels of one kind of layer",
        )
    return faces.pop() if faces else None


def split_products(model: ir.Model) -> int:
    """Turn every static integer product whose columns are then split evenly (query, key and value in one weight) into
    one product per part, in place; how many there were.

    The library slices such a weight itself, and to do so makes it float first; parts it merges again, in integers
    (seen in TensorRT-RTX 1.7). Numbers don't change.
    """
    found = [parts for node in model.graph if (parts := _split_product(node)) is not None]
    for split, add, product in found:
        _split(model, split, add, product)
    return len(found)


def _split_product(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """The Split itself, the Add of a bias and the MatMul before it, where nothing else reads these."""
    if node.op_type != "Split" or (len(node.inputs) > 1 and node.inputs[1] is not None):
        return None
    add = _before(node, "Add", 0)
    product = _before(add, "MatMul", 0)
    if add is None or product is None or _before(product, "QuantizeLinear", 0, through="DequantizeLinear") is None:
        return None
    weight, bias, axis = _before(product, "DequantizeLinear", 1), add.inputs[1], node.attributes.get("axis")
    if weight is None or bias is None or bias.const_value is None or add.outputs[0].shape is None:
        return None
    stored = [value.const_value for value in weight.inputs if value is not None]
    between = (*add.outputs, *product.outputs, *weight.outputs)
    if None in stored or any(len(value.uses()) != 1 for value in between):
        return None
    if any(value.is_graph_output() for value in (*between, *node.outputs)):
        return None
    columns, last = weight.inputs[0].shape[1], len(add.outputs[0].shape) - 1  # type: ignore[index,union-attr]
    even = isinstance(columns, int) and columns % len(node.outputs) == 0 and bias.const_value.size == columns
    return (node, add, product) if even and axis is not None and axis.as_int() in (last, -1) else None


def _before(node: ir.Node | None, kind: str, index: int, through: str = "") -> ir.Node | None:
    """What makes that input of node, if it is of that kind; through: the kind of a node between."""
    if through:
        node = _before(node, through, index)
    value = node.inputs[index] if node is not None else None
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == kind else None


def _split(model: ir.Model, split: ir.Node, add: ir.Node, product: ir.Node) -> None:
    import numpy as np
    import onnx_ir as ir

    weight = _before(product, "DequantizeLinear", 1)
    assert weight is not None
    operands = [value.const_value for value in (*weight.inputs, add.inputs[1]) if value is not None]
    arrays = [operand.numpy() for operand in operands if operand is not None]
    width = arrays[0].shape[1] // len(split.outputs)
    for i, output in enumerate(list(split.outputs)):
        part, columns = f"{product.name}/{i}", slice(i * width, (i + 1) * width)
        stored = []
        for role, array in enumerate(arrays):
            cut = array[..., columns] if array.ndim and array.shape[-1] == width * len(split.outputs) else array
            tensor = ir.tensor(np.ascontiguousarray(cut))
            name, kind = f"{part}/stored_{role}", ir.TensorType(tensor.dtype)
            value = ir.Value(name=name, type=kind, shape=ir.Shape(cut.shape), const_value=tensor)
            model.graph.register_initializer(value)
            stored.append(value)
        scaled = ir.node("DequantizeLinear", stored[:-1], {"axis": 1}, name=f"{part}/weight_dequantize")
        multiplied = ir.node("MatMul", [product.inputs[0], scaled.outputs[0]], name=part)
        shifted = ir.node("Add", [multiplied.outputs[0], stored[-1]], name=f"{add.name}/{i}")
        for node in (scaled, multiplied, shifted):
            node.outputs[0].name, node.outputs[0].type = f"{node.name}_output", output.type
            model.graph.insert_before(split, node)
        shifted.outputs[0].shape = output.shape
        ir.convenience.replace_all_uses_with(output, shifted.outputs[0])
    for node in (split, add, product, weight):
        model.graph.remove(node, safe=True)
