"""ONNX Runtime's dialect for CUDA: paged attention as its own `com.microsoft::PagedAttention`.

The library has kernels of it for CUDA alone, in float16 and bfloat16. Its pools hold a token's heads side by side,
[blocks, block_size, kv_heads, head_dim]; they are inputs of the graph and change in place. It takes blocks of any
power of two from 16 on, but its paged FlashAttention only multiples of 256 tokens (128 for heads above 64 wide); with
smaller ones it gathers them first. Read in its source; checked against its schema, not run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medcompile.errors import BackendError
from medcompile.rewrites import paged, replace

if TYPE_CHECKING:
    import onnx_ir as ir

    from medcompile.kernels.launches import Float

_DOMAIN = "com.microsoft"
_NO_WINDOW = -1


def rewrite_attention(model: ir.Model, dtype: Float) -> int:
    """Turn every paged attention node of model, in place, into the library's. dtype: of the graph's floats. How many.

    Raises BackendError for a dtype that the library has no kernel for, or where a pool is no input of the graph.
    """
    import onnx_ir as ir

    nodes = paged.nodes(model)
    if nodes and dtype == "float32":
        raise BackendError(
            "ONNX Runtime's paged attention computes in 16 bits only",
            fix="set float: float16 or bfloat16 for the variant, or leave out target onnxruntime-cuda",
        )
    for node in nodes:
        heads, kv_heads, head_dim = paged.sizes(node)
        paged.bind_pools(model, node, dtype, ("block_size", kv_heads, head_dim))
        window = node.attributes["sliding_window"].as_int()
        attributes = {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": node.attributes["scale"].as_float(),
            "local_window_size": window or _NO_WINDOW,  # both count the token itself
        }
        own = ir.node("PagedAttention", list(node.inputs), attributes, domain=_DOMAIN, name=node.name)
        model.graph.insert_before(node, own)
        own.outputs[0].name = f"{node.outputs[0].name}/attention"
        replace(node.outputs[0], own.outputs[0])
        model.graph.remove(node, safe=True)
    if nodes:
        model.opset_imports[_DOMAIN] = 1
    return len(nodes)
