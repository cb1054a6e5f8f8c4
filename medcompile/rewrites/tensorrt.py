"""TensorRT's dialect: paged attention as its plugin takes it, and pools that engines update in place.

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
