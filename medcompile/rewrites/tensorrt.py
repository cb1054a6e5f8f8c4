"""TensorRT's dialect: paged attention as its plugin takes it, and pools that engines update in place.

The plugin (kernels/tensorrt_plugin.py) has the pools as outputs too, aliased to its inputs; nothing reads them, and the
graph's face stays as it is. Pools come to the plugin as they are bound, so a cast on the way gives way to an input of
the dtype that it cast to: a cast would be a copy, and what is written into a copy is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medcompile.errors import BackendError
from medcompile.kernels.launches import Face, Float

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, OPERATOR = "medcompile", "PagedAttention"
_POOLS = (3, 4)
"""The operator's inputs that are pools."""
_TYPES: dict[Float, str] = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT"}


def rewrite(model: ir.Model, dtype: Float, pool_dtype: Float, block_size: int) -> Face | None:
    """Turn every paged attention node of model, in place, into the plugin's. What its kernels are compiled for.

    dtype: of the graph's floats. None where the model has no such node. Raises BackendError where its layers differ in
    more than their window and scale, or where a pool is no input of the graph.
    """
    import onnx_ir as ir

    nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    faces = set()
    for node in nodes:
        heads, kv_heads, head_dim = (node.attributes[n].as_int() for n in ("heads", "kv_heads", "head_dim"))
        faces.add(Face(heads, kv_heads, head_dim, block_size, dtype, pool_dtype))
        pools = [_bind(model, node, index, pool_dtype) for index in _POOLS]
        for pool in pools:
            blocks = pool.shape[0] if pool.shape else None
            pool.shape = ir.Shape([blocks, kv_heads, block_size, head_dim])
        out = node.outputs[0]
        node.resize_outputs(1 + len(pools))
        assert node.outputs[0] is out
        for output, pool in zip(node.outputs[1:], pools, strict=True):
            output.name, output.type, output.shape = f"{pool.name}/updated", pool.type, pool.shape
    if len(faces) > 1:
        raise BackendError(
            f"its attention layers differ: {', '.join(map(str, sorted(faces, key=str)))}",
            fix="leave out the TensorRT targets: an engine holds the kernels of one kind of layer",
        )
    return faces.pop() if faces else None


def _bind(model: ir.Model, node: ir.Node, index: int, dtype: Float) -> ir.Value:
    """The graph's input that is this pool, made of that dtype and bound to the node without a cast between them."""
    import onnx_ir as ir

    pool = node.inputs[index]
    cast = pool.producer() if pool is not None else None
    if cast is not None and cast.op_type == "Cast":
        pool = cast.inputs[0]
    if pool is None or pool not in model.graph.inputs:
        raise BackendError(
            f"input {index} of {node.name}, a pool of keys or values, is no input of the graph",
            fix="build the graph by models/llama.py, which binds pools so",
        )
    pool.type = ir.TensorType(ir.DataType[_TYPES[dtype]])
    node.replace_input_with(index, pool)
    if cast is not None and not cast.outputs[0].uses():
        model.graph.remove(cast, safe=True)
    return pool
